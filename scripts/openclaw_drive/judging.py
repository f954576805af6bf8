"""What was said of answers in OpenClaw, and what must have become of it in the edge: signals on those very steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from openclaw_drive.check import Conversation, Finding, Kept

CORRECTION = "No, that is wrong. I asked for something else."
PLUGIN, NEXT_STATE = "openclaw", "next-state"
"""the sources of signals: our plugin in OpenClaw, and the edge's own reading of what came next"""
NOTED = "Noted."


@dataclass(frozen=True)
class Judgement:
    """An answer, by the completion id that OpenClaw got, whether it was called good, and in which words."""

    step_id: str
    good: bool
    words: str


@dataclass(frozen=True)
class Judged:
    """All that was said of answers; what OpenClaw answered to the commands; and which answer was then corrected."""

    judgements: tuple[Judgement, ...] = ()
    replies: tuple[str, ...] = ()
    corrected: str = ""


def check_judgements(conversations: Sequence[Conversation], judged: Judged) -> list[Finding]:
    """Each command and reaction is one signal on the answer that it was about; a correction speaks against its own."""
    steps = [step for conversation in conversations for step in conversation.steps]
    told = tuple(f"OpenClaw answered {reply!r}" for reply in judged.replies if reply != NOTED)
    return [
        Finding("/good and /bad are answered once they are kept", told),
        Finding("/good, /bad and reactions are signals on the answers they are about", _words(steps, judged)),
        Finding("a correcting next message speaks against the answer before it", _correction(steps, judged)),
    ]


def _words(steps: Sequence[Kept], judged: Judged) -> tuple[str, ...]:
    wanted = Counter((each.step_id, each.good, each.words) for each in judged.judgements)
    signals = {signal.signal_id: signal for step in steps for signal in step.signals if signal.source == PLUGIN}
    found = Counter((each.target_id, each.value > 0, each.comment) for each in signals.values())
    lost = [f"{step_id}: no signal of {words!r}" for step_id, _, words in wanted - found]
    return (
        *lost,
        *(f"{step_id}: {words!r} was said of another answer or twice" for step_id, _, words in found - wanted),
    )


def _correction(steps: Sequence[Kept], judged: Judged) -> tuple[str, ...]:
    against = {
        signal.target_id for step in steps for signal in step.signals if _speaks_against(signal.source, signal.value)
    }
    names = {name for step in steps if step.step_id == judged.corrected for name in (step.step_id, step.run_id)}
    missing = () if names & against else (f"{judged.corrected}: no {NEXT_STATE} signal below 0 on it or its run",)
    return missing if judged.corrected else ()


def _speaks_against(source: str, value: float) -> bool:
    return source == NEXT_STATE and value < 0
