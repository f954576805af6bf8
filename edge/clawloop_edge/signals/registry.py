"""Scorers by name. An entry imports its file when it is opened, not before. Knows no storage and no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from clawloop_edge.engine.protocol import Engine, TextEngine
    from clawloop_edge.signals.asking import Border
    from clawloop_edge.signals.protocol import Scorer
    from clawloop_edge.signals.settings import SignalsSettings


@dataclass(frozen=True, kw_only=True)
class Deps:
    """What scorers are made of. `engine` is the local model, if one is served here; `folder` is the edge's home;
    `border` is what may go to other machines: without one nothing may. `port` is the gateway's: no model is asked
    through it, since what goes there is kept as an agent's call.

    Factories run on the event loop's thread, must not block, and connect to nothing: that is for the first `score`.
    """

    settings: SignalsSettings
    engine: Engine | TextEngine | None
    folder: Path
    border: Border | None = None
    port: int = 0


def _rule(deps: Deps) -> Scorer:
    from clawloop_edge.signals.rule import RuleScorer

    return RuleScorer(deps.settings.rule)


def _exact(deps: Deps) -> Scorer:
    from clawloop_edge.signals.answer import ExactScorer

    return ExactScorer(deps.settings.exact)


def _regex(deps: Deps) -> Scorer:
    from clawloop_edge.signals.answer import RegexScorer

    return RegexScorer(deps.settings.regex)


def _tool_outcome(deps: Deps) -> Scorer:
    from clawloop_edge.signals.tool_outcome import ToolOutcomeScorer

    return ToolOutcomeScorer(deps.settings.tool_outcome)


def _next_state(deps: Deps) -> Scorer:
    from clawloop_edge.signals.next_state import NextStateScorer

    return NextStateScorer(deps)


def _judge(deps: Deps) -> Scorer:
    from clawloop_edge.signals.judge import JudgeScorer

    return JudgeScorer(deps)


def _reward_model(deps: Deps) -> Scorer:
    from clawloop_edge.signals.reward_model import RewardModelScorer

    return RewardModelScorer(deps)


def _hindsight(deps: Deps) -> Scorer:
    from clawloop_edge.signals.hindsight import HindsightScorer

    return HindsightScorer(deps)


SCORERS: dict[str, Callable[[Deps], Scorer]] = {
    "rule": _rule,
    "exact": _exact,
    "regex": _regex,
    "tool-outcome": _tool_outcome,
    "next-state": _next_state,
    "judge": _judge,
    "reward-model": _reward_model,
    "hindsight": _hindsight,
}
