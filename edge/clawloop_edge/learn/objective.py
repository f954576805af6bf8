"""The policy-gradient loss at home: the server's (`trainer/losses.py`), in MLX, of all tokens of an optimizer step.

The formula and the sources of its terms are in docs/training.md. What the samples' logprobs are is found first, for
the whole step; then the loss is a function of P numbers, and so is its slope by each of them. So the masks that judge a
trajectory see all of it, whatever part of it fits into memory at a time. Knows no model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from clawloop_shared.objective import LossSettings, clips_of
from clawloop_shared.rows import LEAST_LOGPROB, Sample
from clawloop_shared.whole_step import MAX_LOG_RATIO, Sums, WholeStep

Array = Any
"""of MLX; axes as in the name: P trained tokens, U trajectories"""


@dataclass(frozen=True)
class LossInputs:
    """P trained tokens of U trajectories and C calls: a whole optimizer step. `reference_P` is the base model's."""

    behaviour_P: Array
    advantage_P: Array
    unit_P: Array
    call_P: Array
    weight_U: Array
    gap_U: Array
    cap_U: Array
    calls: int
    all_calls: float
    normalizer: float
    reference_P: Array | None = None

    @classmethod
    def of(
        cls, samples: Sequence[Sample], settings: LossSettings, *, reference: Sequence[Sequence[float]] | None = None
    ) -> "LossInputs":
        """Of all samples of a step, at least one; `reference` are the base's logprobs of each."""
        step = WholeStep.of(samples, settings, normalizer=None, split={})
        weights = {sample.trajectory: sample.weight for sample in samples}
        units = {trajectory: at for at, trajectory in enumerate(weights)}
        return cls(
            behaviour_P=_flat(sample.logprobs for sample in samples),
            advantage_P=_flat(sample.advantages for sample in samples),
            unit_P=mx.array([units[s.trajectory] for s in samples for _ in s.trained]),
            call_P=mx.array([at for at, s in enumerate(samples) for _ in s.trained]),
            weight_U=mx.array([weights[t] for t in units]),
            gap_U=mx.array([step.gaps[t] for t in units]),
            cap_U=mx.array([step.caps[t] for t in units]),
            calls=len(samples),
            all_calls=step.all_calls,
            normalizer=step.normalizer,
            reference_P=None if reference is None else _flat(reference),
        )


def _flat(parts: Any) -> Array:
    return mx.array([float(number) for part in parts for number in part], dtype=mx.float32)


Term = tuple[Array, Array]
"""policy_P, and of which tokens the ratio was cut"""
PolicyTerm = Callable[[LossInputs, LossSettings, Array, Array], Term]
"""of the inputs, the settings, logprobs_P and, without gradient, log_ratio_P"""


def _tis(inputs: LossInputs, settings: LossSettings, logprobs_P: Array, log_ratio_P: Array) -> Term:
    ratio_P = mx.exp(log_ratio_P)
    weight_P = mx.minimum(ratio_P, settings.tis_cap)
    return -weight_P * inputs.advantage_P * logprobs_P, ratio_P > settings.tis_cap


def _cispo(inputs: LossInputs, settings: LossSettings, logprobs_P: Array, log_ratio_P: Array) -> Term:
    low, high = clips_of(settings)
    ratio_P = mx.exp(log_ratio_P)
    weight_P = mx.clip(ratio_P, 1.0 - low, 1.0 + high)
    return -weight_P * inputs.advantage_P * logprobs_P, weight_P != ratio_P


def _ppo(inputs: LossInputs, settings: LossSettings, logprobs_P: Array, log_ratio_P: Array) -> Term:
    return _surrogate(mx.exp(_drift(inputs, logprobs_P)), inputs.advantage_P, settings)


def _gspo(inputs: LossInputs, settings: LossSettings, logprobs_P: Array, log_ratio_P: Array) -> Term:
    mean_C = _means(log_ratio_P, inputs.call_P, units=inputs.calls)
    size_C = mx.zeros(inputs.calls).at[inputs.call_P].add(mx.ones_like(log_ratio_P))
    token_P = mx.exp(logprobs_P - mx.stop_gradient(logprobs_P))  # 1, with the gradient of log pi
    term_P, clipped_P = _surrogate(mx.exp(mean_C)[inputs.call_P] * token_P, inputs.advantage_P, settings)
    return term_P * (inputs.normalizer / inputs.all_calls) / size_C[inputs.call_P], clipped_P


def _surrogate(ratio_P: Array, advantage_P: Array, settings: LossSettings) -> Term:
    low, high = clips_of(settings)
    cut_P = mx.clip(ratio_P, 1.0 - low, 1.0 + high)
    plain_P, clipped_P = ratio_P * advantage_P, cut_P * advantage_P
    return -mx.minimum(plain_P, clipped_P), clipped_P < plain_P


POLICIES: dict[str, PolicyTerm] = {"tis": _tis, "ppo": _ppo, "gspo": _gspo, "cispo": _cispo}


def slopes(logprobs: Sequence[Sequence[float]], inputs: LossInputs, settings: LossSettings) -> tuple[Array, Sums]:
    """slope_P, the loss's derivative by the logprob of each trained token, and what to log; `logprobs` are the current
    policy's, of each sample."""
    values_P = _flat(logprobs)
    loss, slope_P = mx.value_and_grad(lambda logprobs_P: _loss(logprobs_P, inputs, settings)[0])(values_P)
    _, found = _loss(values_P, inputs, settings)
    stacked: Any = mx.stack([mx.array(number, dtype=mx.float32) for number in (loss, *found.values())])
    numbers: list[float] = stacked.tolist()
    return slope_P, Sums(tokens=float(values_P.size), **dict(zip(("loss", *found), numbers, strict=True)))


def _loss(logprobs_P: Array, inputs: LossInputs, settings: LossSettings) -> tuple[Array, dict[str, Array]]:
    """The loss, and the sums of what is watched."""
    drift_P = _drift(inputs, logprobs_P)
    log_ratio_P = mx.stop_gradient(drift_P)
    weight_P = mx.minimum(mx.exp(log_ratio_P), settings.tis_cap)
    masks = _masks(inputs, settings, mx.stop_gradient(logprobs_P), log_ratio_P=log_ratio_P)
    data_P = masks["stale"] & masks["veto"] & masks["geometric"]
    policy_mask_P = masks["opsm"] & masks["trust"]
    policy_P, masks["clipped"] = POLICIES[settings.policy](inputs, settings, logprobs_P, log_ratio_P)
    per_token_P = mx.where(policy_mask_P, policy_P, 0.0)
    if inputs.reference_P is not None and settings.kl_beta:
        per_token_P = per_token_P + settings.kl_beta * weight_P * mx.square(logprobs_P - inputs.reference_P) / 2
    if settings.anchor:
        per_token_P = per_token_P + settings.anchor * mx.square(drift_P) / 2
    importance_U = inputs.weight_U * inputs.cap_U
    loss = mx.where(data_P, importance_U[inputs.unit_P] * per_token_P, 0.0).sum() / inputs.normalizer
    masks[""] = data_P & policy_mask_P
    return loss, _watched(inputs, masks, logprobs_P, log_ratio_P=log_ratio_P, weight_P=weight_P)


def _drift(inputs: LossInputs, logprobs_P: Array) -> Array:
    return mx.clip(logprobs_P - inputs.behaviour_P, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _masks(inputs: LossInputs, settings: LossSettings, logprobs_P: Array, *, log_ratio_P: Array) -> dict[str, Array]:
    """Which tokens each mask lets through."""
    units = len(inputs.weight_U)
    mean_U = _means(log_ratio_P, inputs.unit_P, units=units)
    lowest_U = mx.full((units,), math.inf).at[inputs.unit_P].minimum(log_ratio_P)
    ratio_U = mx.exp(mean_U)
    moved_P = mx.exp(logprobs_P) - mx.exp(inputs.behaviour_P)
    wanted_P = mx.sign(inputs.advantage_P)
    return {
        "stale": (inputs.gap_U <= settings.max_staleness_versions)[inputs.unit_P],
        "veto": (mx.exp(lowest_U) >= settings.veto)[inputs.unit_P],
        "geometric": ((ratio_U >= settings.geometric_low) & (ratio_U <= settings.geometric_high))[inputs.unit_P],
        "opsm": ~((inputs.advantage_P < 0) & (-mean_U > settings.opsm_delta)[inputs.unit_P]),
        "trust": ~(wanted_P * moved_P > settings.trust_region),
    }


def _means(values_P: Array, unit_P: Array, *, units: int) -> Array:
    """mean_U of the tokens of each unit; 0 for a unit without tokens."""
    count_U = mx.zeros(units).at[unit_P].add(mx.ones_like(values_P))
    return mx.zeros(units).at[unit_P].add(values_P) / mx.maximum(count_U, 1.0)


def _watched(
    inputs: LossInputs, masks: dict[str, Array], logprobs_P: Array, *, log_ratio_P: Array, weight_P: Array
) -> dict[str, Array]:
    reference_P = logprobs_P if inputs.reference_P is None else inputs.reference_P
    found = {
        "log_ratio": log_ratio_P.sum(),
        "k3": (mx.exp(log_ratio_P) - 1 - log_ratio_P).sum(),
        "weight": weight_P.sum(),
        "weight_squared": mx.square(weight_P).sum(),
        "base_distance": mx.square(logprobs_P - reference_P).sum() / 2,
        "surprise": -mx.maximum(inputs.behaviour_P, LEAST_LOGPROB).sum(),
        "positive": (inputs.advantage_P > 0).sum(),
        "negative": (inputs.advantage_P < 0).sum(),
        "clipped": masks["clipped"].sum(),
        "max_log_ratio": mx.abs(log_ratio_P).max(),
    }
    return found | {f"kept_{name}".rstrip("_"): masks[name].sum() for name in masks if name != "clipped"}
