"""From verdicts to signals: what each judges, and an id that is the same whenever the same is judged. Pure."""

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import msgspec

from clawloop_edge.signals.protocol import Case, Verdict
from clawloop_shared.records import Signal, Target, check_signal

MAX_EVIDENCE_CHARS, MAX_COMMENT_CHARS = 500, 4_000


def settings_digest(settings: msgspec.Struct) -> str:
    """What stands for a scorer's settings: judged by others, a case is judged anew."""
    return sha256(msgspec.json.encode(settings, order="sorted")).hexdigest()[:16]


def signals_of(source: str, case: Case, verdicts: Sequence[Verdict], *, digest: str, now_ms: int) -> list[Signal]:
    """The signals of a case's verdicts; one of no weight makes none.

    Raises:
        RecordError: a value outside [-1, 1], or a weight outside [0, 1].
    """
    numbers: Counter[tuple[Target, str]] = Counter()
    signals = []
    for verdict in verdicts:
        if verdict.weight == 0:
            continue
        target, target_id = verdict.target or case.target, verdict.target_id or case.target_id
        number = numbers[target, target_id]
        numbers[target, target_id] += 1
        answer = case.answer.step  # another one, where a run or trajectory went on after it was judged
        named = (digest, case.moment, case.target, case.target_id, answer.session_id, answer.step_id)
        signals.append(
            check_signal(
                Signal(
                    signal_id=_signal_id(source, (*named, target, target_id, number)),
                    target=target,
                    target_id=target_id,
                    source=source,
                    value=verdict.value,
                    weight=verdict.weight,
                    created_ms=now_ms,
                    evidence=_text(verdict.evidence)[:MAX_EVIDENCE_CHARS],
                    comment=_text(verdict.comment)[:MAX_COMMENT_CHARS],
                    hint=verdict.hint,
                )
            )
        )
    return signals


def _text(words: str) -> str:
    """What can be kept of words: JSON lets a model write half a character, and no file takes that."""
    return words.encode("utf-8", "replace").decode()


def _signal_id(source: str, named: tuple[object, ...]) -> str:
    return f"{source}-{sha256(msgspec.json.encode(named)).hexdigest()[:32]}"
