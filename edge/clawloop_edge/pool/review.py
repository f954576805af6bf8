"""What most needs a person's word: steps whose trajectories were judged in doubt, weakly or not at all, latest first.

A trajectory is shown by its last step. One that its owner has judged or curated needs no word, nor one from which
nothing can be learned, unless it has the tag `review`. Reads one snapshot; changes nothing.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import msgspec

from clawloop_edge.pool.picking import LOOKED_AT, Picked, PickedPool, Picker, Seen, candidates
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Json, StepLine
from clawloop_edge.sessions.tree import text_of, user_texts
from clawloop_shared.signals import OWNER, RewardRules, account_of

TAG = "review"
ENDED_MS = 1_800_000
"""a session in which nothing came for so long is taken for ended: half an hour"""
APART = 1.0
"""sources that differ by so much disagree: one says good where the other says bad, or has nothing to say"""
WEAK = 0.6
"""a reward of less weight than this is a model's guess, or read from what came next"""
SHOWN_CHARS = 600
_MAIN = "main"


class Needed(msgspec.Struct, frozen=True, kw_only=True):
    """A step that needs a word, and why, in words; what was asked, and what was answered, as far as they are short."""

    step: Seen
    why: list[str]
    question: str
    answer: str

    def facts(self) -> dict[str, Any]:
        """It as JSON values."""
        return {**self.step.facts(), "why": self.why, "question": self.question, "answer": self.answer}


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """What needs a word, latest first, and where the next page begins (None: this was the last)."""

    steps: list[Needed]
    next: int | None


def queue(
    pool: PickedPool,
    *,
    rules: RewardRules,
    now_ms: int,
    limit: int,
    before_seq: int | None = None,
    look_at: int = LOOKED_AT,
) -> Queue:
    """Up to `limit` steps that need a word, of those kept before the change `before_seq`; `look_at` are looked at."""
    found: list[Needed] = []
    with pool.reading() as reading:
        picker, picked = Picker(reading, Picked(), rules=rules), Picked()
        last, looked = None, 0
        for line in islice(candidates(pool, reading, picked, before_seq=before_seq), look_at):
            last, looked = line.seq, looked + 1
            seen = picker.look(line) if line.kind == _MAIN else None
            if seen is not None and (why := _why(reading, seen, rules=rules, now_ms=now_ms)):
                found.append(_needed(reading, seen, why))
            if len(found) == limit:
                break
    more = len(found) == limit or looked == look_at
    return Queue(steps=found, next=last if more else None)


def _needed(reading: Reading, seen: Seen, why: list[str]) -> Needed:
    kept = reading.kept(seen.line.step_id)
    asked, said = ("", "") if kept is None else (_asked(kept.messages), _said(kept.reply))
    return Needed(step=seen, why=why, question=_short(asked), answer=_short(said))


def _asked(messages: Sequence[Json]) -> str:
    """What a person wrote last."""
    texts = (user_texts(each.get("content")) for each in reversed(messages) if each.get("role") == "user")
    return "\n".join(next(filter(None, texts), []))


def _said(reply: Json) -> str:
    """What was answered, and which tools were called."""
    functions = (call.get("function") for call in reply.get("tool_calls") or () if isinstance(call, dict))
    calls = [f"→ {each.get('name')} {each.get('arguments')}" for each in functions if isinstance(each, dict)]
    return "\n".join(filter(None, [text_of(reply.get("content")), *calls]))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _why(reading: Reading, seen: Seen, *, rules: RewardRules, now_ms: int) -> list[str]:
    flagged = [f"tagged {TAG}"] if TAG in seen.curated.tags else []
    if seen.line.untrainable or _has_word(seen) or not _is_last(reading, seen.line):
        return flagged
    account = account_of(seen.signals, rules)
    voices = [voice for voice in account.voices if voice.share > 0.0]
    if not voices:
        return (
            [*flagged, "nothing was said of it, and its run has ended"]
            if _ended(reading, seen.line, now_ms)
            else flagged
        )
    low, high = min(voices, key=lambda v: v.value), max(voices, key=lambda v: v.value)
    if high.value - low.value >= APART:
        return [*flagged, f"{low.source} says {low.value:+.1f}, {high.source} says {high.value:+.1f}"]
    if account.reward is not None and account.reward.weight < WEAK:
        return [*flagged, f"only weak signs, of {', '.join(sorted(voice.source for voice in voices))}"]
    return flagged


def _has_word(seen: Seen) -> bool:
    """Whether its owner has judged or curated it."""
    said = seen.curated.trainable is not None or seen.curated.quality is not None
    return said or any(signal.source in OWNER for signal in seen.signals)


def _is_last(reading: Reading, line: StepLine) -> bool:
    """Whether no later main-line step is rewarded with it."""
    return all(each.seq <= line.seq or each.kind != _MAIN for each in reading.rewarded_with(line, limit=8))


def _ended(reading: Reading, line: StepLine, now_ms: int) -> bool:
    """Whether its run goes on no more: another came after it, or nothing came for a while."""
    session = reading.session(line.session_id)
    query = "SELECT 1 FROM steps WHERE session_id = ? AND seq > ? AND run_id != ? LIMIT 1"
    later = reading.database.conn.execute(query, (line.session_id, line.seq, line.run_id)).fetchone()
    return later is not None or (session is not None and now_ms - session.last_ms >= ENDED_MS)
