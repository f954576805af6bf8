"""From rewarded trajectories to training samples: one sample a step, with the very ids that the engine used.

A token whose logprob is masked (it was redacted, or could not be scored after what was) is context and nothing else: no
loss, no importance weight, not counted. What must not be learned from is rejected here with a reason and counted, never
repaired. Knows no tensor library.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from clawloop_shared.records import Channel, Step, Trajectory
from clawloop_shared.signals import DEFAULT_RULES, RewardRules

TEMPERATURES = (0.05, 5.0)
"""beyond them a step's logprobs are a few huge numbers, or all the same"""
LEAST_LOGPROB = -100.0
"""no sampler draws what is less likely"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One model call, ready to be trained on.

    `trained` are the indices in `token_ids` of the P tokens that the policy sampled and whose logprobs are known (never
    0: something must predict them); `logprobs` and `advantages` have one entry for each. `trajectory` counts the
    trajectories of one update.
    """

    step_id: str
    trajectory: int
    token_ids: Sequence[int]
    trained: Sequence[int]
    logprobs: Sequence[float]
    advantages: Sequence[float]
    weight: float = 1.0
    temperature: float = 1.0
    version_gap: int = 0


@dataclass(frozen=True)
class Limits:
    """What a step must fit to be learned from by this model (its line, its vocabulary, its context), and how what was
    said of it is weighed."""

    line_id: str
    vocab_size: int
    max_tokens: int
    rules: RewardRules = DEFAULT_RULES


@dataclass(frozen=True)
class Screened:
    """Trajectories with only the steps that may be learned from, and why the others may not (reason to count)."""

    trajectories: list[Trajectory] = field(default_factory=list)
    rejected_steps: Counter[str] = field(default_factory=Counter)
    rejected_trajectories: dict[str, str] = field(default_factory=dict)


def screen(trajectories: Sequence[Trajectory], limits: Limits) -> Screened:
    """Leave out the steps that may not be learned from, and the trajectories that have no other."""
    found = Screened()
    for trajectory in trajectories:
        reasons = [reason_against(step, limits) for step in trajectory.steps]
        found.rejected_steps.update(reason for reason in reasons if reason)
        steps = [step for step, reason in zip(trajectory.steps, reasons, strict=True) if not reason]
        if not math.isfinite(trajectory.reward) or not 0.0 < trajectory.weight <= 1.0:
            found.rejected_trajectories[trajectory.trajectory_id] = "no usable reward"
        elif not steps:
            found.rejected_trajectories[trajectory.trajectory_id] = reasons[0] if reasons else "no steps"
        else:
            found.trajectories.append(_with_steps(trajectory, steps))
    return found


def _with_steps(trajectory: Trajectory, steps: list[Step]) -> Trajectory:
    return msgspec.structs.replace(trajectory, steps=steps)


def reason_against(step: Step, limits: Limits) -> str:
    """Why `step` may not be learned from; empty if it may."""
    length = len(step.prompt_ids) + len(step.response_ids)
    rules = (
        ("marked untrainable", step.trainable),
        ("not for training", step.channel is Channel.TRAIN),
        ("another model line", step.policy.line == limits.line_id),
        ("sampler cut the distribution", not step.sampling.truncates),
        ("temperature without a distribution", step.sampling.temperature > 0),
        ("temperature out of range", TEMPERATURES[0] <= step.sampling.temperature <= TEMPERATURES[1]),
        ("empty prompt or response", bool(step.prompt_ids) and bool(step.response_ids)),
        ("logprob missing", len(step.response_logprobs) == len(step.response_ids)),
        ("logprob not finite", all(p is None or math.isfinite(p) for p in step.response_logprobs)),
        ("logprob out of range", all(p is None or p >= LEAST_LOGPROB for p in step.response_logprobs)),
        ("redaction left nothing to learn from", any(p is not None for p in step.response_logprobs)),
        ("longer than the context", length <= limits.max_tokens),
    )
    broken = next((reason for reason, holds in rules if not holds), "")
    if not broken and not all(0 <= token < limits.vocab_size for token in step.token_ids):
        return "token outside the vocabulary"
    return broken


def make_samples(
    trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float | None]], *, version: int
) -> list[Sample]:
    """One sample a step of screened trajectories. `advantages` has, for each trajectory, one of each of its steps,
    which is that of each of its trained tokens; a step without one teaches nothing and has no sample.

    `version` is the current one; the gap is counted both ways, since a rollback makes samples of later versions stale.
    """
    return [
        _sample(step, index, advantage=advantage, weight=trajectory.weight, version=version)
        for index, trajectory in enumerate(trajectories)
        for step, advantage in zip(trajectory.steps, advantages[index], strict=True)
        if advantage is not None
    ]


def _sample(step: Step, trajectory: int, *, advantage: float, weight: float, version: int) -> Sample:
    known = [(at, p) for at, p in enumerate(step.response_logprobs, len(step.prompt_ids)) if p is not None]
    return Sample(
        step_id=step.step_id,
        trajectory=trajectory,
        token_ids=step.token_ids,
        trained=[at for at, _ in known],
        logprobs=[logprob for _, logprob in known],
        advantages=[advantage] * len(known),
        weight=weight,
        temperature=step.sampling.temperature,
        version_gap=abs(version - step.policy.version),
    )
