"""The gate: whether a candidate adapter may take the place of the current one. A pure decision on measured scores.

Both adapters play the same tasks; they are compared task by task, so that hard and easy tasks cancel out. Knows no
model, file or database; the tasks are played by trainer/tasks.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from clawloop_shared.manifest import Evaluation

if TYPE_CHECKING:
    from clawloop_server.trainer.tasks import Scores

NOT_EVALUATED = Evaluation(suite="", episodes=0, reward=0.0, reward_before=0.0, standard_error=0.0)


class GateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[gate]` table of the server's configuration."""

    tasks: str = ""
    """JSONL file of scripted tool tasks; empty: nothing can be evaluated"""
    required: bool = True
    """whether a candidate that could not be evaluated is held instead of passed"""
    samples: int = 2
    """how often each task is played by each adapter"""
    temperature: float = 1.0
    max_tokens: int = 64
    """of each reply"""
    z: float = 1.64
    """how many standard errors worse a candidate may be; 1.64 is one-sided 5 %"""
    max_format_drop: float = 0.05
    """how much smaller the share of well-formed episodes may be, beyond its own noise"""
    seed: int = 0


class Verdict(StrEnum):
    """What the gate says."""

    PASSED = "passed"
    """at least as good as the current adapter, as far as can be told"""
    NOT_EVALUATED = "passed (not evaluated)"
    """nothing to evaluate with, and the operator allows that"""
    REFUSED = "refused"
    """worse than the current adapter, or broken"""
    HELD = "held"
    """nothing to evaluate with; the operator must decide"""

    @property
    def passes(self) -> bool:
        """Whether the candidate may be released."""
        return self in (Verdict.PASSED, Verdict.NOT_EVALUATED)


class Decision(msgspec.Struct, frozen=True):
    """The verdict, its reason in words, and what was measured."""

    verdict: Verdict
    reason: str
    evaluation: Evaluation = NOT_EVALUATED


def decide(candidate: Scores, current: Scores, *, settings: GateSettings, suite: str) -> Decision:
    """Refuse a candidate whose mean reward is worse by more than z standard errors, or whose form broke."""
    gain, error = paired_difference(candidate.rewards, current.rewards)
    form, form_error = paired_difference(candidate.valid, current.valid)
    evaluation = Evaluation(
        suite=suite,
        episodes=sum(map(len, candidate.rewards)),
        reward=_mean(candidate.rewards),
        reward_before=_mean(current.rewards),
        standard_error=error,
    )
    measured = (
        f"{evaluation.reward:.3f} against {evaluation.reward_before:.3f}, difference {gain:+.3f} (se {error:.3f})"
    )
    if gain < -settings.z * error:
        return Decision(Verdict.REFUSED, f"reward is worse: {measured}", evaluation)
    if form < -max(settings.max_format_drop, settings.z * form_error):
        broken = f"well-formed episodes fell from {_mean(current.valid):.3f} to {_mean(candidate.valid):.3f}"
        return Decision(Verdict.REFUSED, broken, evaluation)
    return Decision(Verdict.PASSED, f"reward {measured}", evaluation)


def decide_unevaluated(settings: GateSettings) -> Decision:
    """The decision where there are no tasks."""
    if settings.required:
        return Decision(Verdict.HELD, "no [gate] tasks to evaluate with; release it by hand, or set tasks")
    return Decision(Verdict.NOT_EVALUATED, "no [gate] tasks, and [gate] required = false")


def refuse(reason: str) -> Decision:
    """A refusal without an evaluation, e.g. of a round that collapsed."""
    return Decision(Verdict.REFUSED, reason)


def paired_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over tasks of the difference of the tasks' means, and its standard error (0 with fewer than two tasks)."""
    differences = [sum(a) / len(a) - sum(b) / len(b) for a, b in zip(one, other, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return mean, 0.0
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return mean, math.sqrt(variance / count)


def _mean(scores: Sequence[Sequence[float]]) -> float:
    flat = [score for task in scores for score in task]
    return sum(flat) / len(flat)
