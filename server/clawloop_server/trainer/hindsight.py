"""Hindsight: what a step's answer should have known, turned into an advantage of each of its tokens.

The policy is its own teacher. With h the hint's tokens put into the prompt c, a token y_t of the answer gets

    A_t += w clip(log pi(y_t | c + h, y_<t) - log pi(y_t | c, y_<t), -C, C)

both under the current policy and without gradient: what the hint makes likelier is encouraged, what it makes unlikelier
is discouraged, and the loss stays as it is. Sources: OpenClaw-RL, https://arxiv.org/abs/2603.10165 (hints written in
hindsight); SDPO, https://arxiv.org/abs/2601.20802 (the policy as its own teacher).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from clawloop_server.trainer.engine import OversizedSamples
from clawloop_shared.records import Hint, Trajectory
from clawloop_shared.rows import Sample

Logprobs = Callable[[Sequence[Sample]], list[list[float]]]
"""of each sample's trained tokens, under the current policy"""
Hints = dict[tuple[int, str], Hint]
"""by the place of a trajectory in its update, and the id of a step"""


def latest_hints(trajectories: Iterable[Trajectory], *, vocab_size: int) -> Hints:
    """The newest hint of each step that has one within its prompt, of tokens which the model has. Only what judges a
    trajectory may hint at its steps: the steps of another may be of another device."""
    found: Hints = {}
    for index, trajectory in enumerate(trajectories):
        prompts = {step.step_id: len(step.prompt_ids) for step in trajectory.steps}
        for signal in sorted(trajectory.signals, key=lambda s: (s.created_ms, s.signal_id)):
            hint = signal.hint
            if hint is None or not 0 < hint.at <= prompts.get(hint.step_id, 0):
                continue
            if max(hint.token_ids) < vocab_size:
                found[index, hint.step_id] = hint
    return found


def with_hint(sample: Sample, hint: Hint, *, max_tokens: int) -> Sample | None:
    """The sample as its policy would have answered with the hint in its prompt; None if that does not fit: the hint is
    not within the prompt, or there is no room for it."""
    size = len(hint.token_ids)
    if not 0 < hint.at <= sample.trained[0] or len(sample.token_ids) + size > max_tokens:
        return None
    return replace(
        sample,
        token_ids=[*sample.token_ids[: hint.at], *hint.token_ids, *sample.token_ids[hint.at :]],
        trained=[at + size for at in sample.trained],
    )


def with_hindsight(
    samples: Sequence[Sample],
    hints: Hints,
    *,
    logprobs: Logprobs,
    weight: float,
    clip: float,
    max_tokens: int,
) -> tuple[list[Sample], int]:
    """Samples whose advantages know what the hints say, and for how many of them there was one to use.

    A hint under which the policy gives no finite number teaches nothing, nor do those of a trajectory that does not fit
    the memory with them.

    Raises:
        OversizedSamples: samples that do not fit the memory without a hint.
    """
    found = {
        index: hinted
        for index, sample in enumerate(samples)
        if (hint := hints.get((sample.trajectory, sample.step_id))) is not None
        and (hinted := with_hint(sample, hint, max_tokens=max_tokens)) is not None
    }
    if not found or not weight:
        return list(samples), 0
    plain = dict(zip(found, logprobs([samples[index] for index in found]), strict=True))
    taught = _fitting(found, logprobs)
    told, used = list(samples), 0
    for index, after in taught.items():
        before = plain[index]
        gains = [weight * min(clip, max(-clip, b - a)) for a, b in zip(before, after, strict=True)]
        if all(map(math.isfinite, [*before, *after])):
            advantages = [a + gain for a, gain in zip(samples[index].advantages, gains, strict=True)]
            told[index], used = replace(samples[index], advantages=advantages), used + 1
    return told, used


def _fitting(hinted: dict[int, Sample], logprobs: Logprobs) -> dict[int, list[float]]:
    """The logprobs of each, without the trajectories that do not fit the memory."""
    while hinted:
        try:
            return dict(zip(hinted, logprobs(list(hinted.values())), strict=True))
        except OversizedSamples as error:
            hinted = {at: sample for at, sample in hinted.items() if sample.trajectory not in error.trajectories}
    return {}
