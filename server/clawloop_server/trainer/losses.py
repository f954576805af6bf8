"""The policy-gradient loss on what other, older policies sampled. Pure functions of tensors.

With l_t = log pi(t) - log mu(t), mu the policy that sampled, w_t = min(exp(l_t), C) without gradient, A_t advantages:

    L = 1/N sum_i c_i s_i g_i sum_{t in i} [ m_t policy_t + beta w_t (log pi(t) - log base(t))^2 / 2
                                             + lambda l_t^2 / 2 ]

    tis     policy_t = -w_t A_t log pi(t)
    cispo   policy_t = -clip(r_t) A_t log pi(t)              r_t = exp(l_t), in the factor without gradient
    ppo     policy_t = -min(r_t A_t, clip(r_t) A_t)          clip(x) = x within [1 - low, 1 + high]
    gspo    policy_t = -min(q_t A_t, clip(q_t) A_t) N / (S |y|)     q_t = the ratio of t's call: exp(mean l over y)

N counts the trained tokens of the whole optimizer step, each trajectory's scaled by its s_i, before any mask, so that
masking never scales up the rest; S its calls in the same way. What g and m leave out, and where each part comes from,
is in docs/training.md. Knows no model, row layout or optimizer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clawloop_shared.objective import LossSettings, clips_of
from clawloop_shared.rows import LEAST_LOGPROB
from clawloop_shared.whole_step import MAX_LOG_RATIO, Sums


@dataclass(frozen=True)
class Calls:
    """Which call each of P tokens is of, numbered within the row (a call is never split over rows); and how many calls
    the step has in all, each scaled by the cap of its trajectory."""

    call_P: Tensor
    total: float


@dataclass(frozen=True)
class Distance:
    """mean_U and lowest_U of the log ratios of a trajectory's tokens."""

    mean_U: Tensor
    lowest_U: Tensor


@dataclass(frozen=True)
class LossInputs:
    """P trained tokens of U units. Only `logprobs_P` carries a gradient; `reference_P` is the base model's, or None.

    `normalizer` is N: trained tokens of the optimizer step, all rows (and ranks) together, each scaled by its `cap_U`,
    which is s in the whole step (`share_caps`). `calls` is needed where a call has a weight of its own (`gspo`).
    `whole` is the distance of trajectories of which other rows hold parts; NaN for those that are here whole.
    """

    logprobs_P: Tensor
    behaviour_P: Tensor
    advantage_P: Tensor
    unit_P: Tensor
    weight_U: Tensor
    gap_U: Tensor
    cap_U: Tensor
    normalizer: float
    reference_P: Tensor | None = None
    calls: Calls | None = None
    whole: Distance | None = None


@dataclass(frozen=True)
class Masks:
    """Which tokens take part: `data_P` in anything, `policy_P` in the policy term. `parts` has each mask by name."""

    data_P: Tensor
    policy_P: Tensor
    parts: dict[str, Tensor]


Term = tuple[Tensor, Tensor]
"""policy_P, and of which tokens the ratio was cut"""
PolicyTerm = Callable[[LossInputs, LossSettings, Tensor], Term]
"""of the inputs, the settings, and log_ratio_P without gradient"""


def tis(inputs: LossInputs, settings: LossSettings, log_ratio_P: Tensor) -> Term:
    """Truncated importance sampling on the logprobs of the policy that sampled: the gradient of log pi, weighted by the
    ratio up to a cap. Source for a quantised sampler: FlashRL, https://fengyao.notion.site/flash-rl."""
    ratio_P = log_ratio_P.exp()
    weight_P = ratio_P.clamp(max=settings.tis_cap)
    return -weight_P * inputs.advantage_P * inputs.logprobs_P, ratio_P > settings.tis_cap


def cispo(inputs: LossInputs, settings: LossSettings, log_ratio_P: Tensor) -> Term:
    """CISPO, https://arxiv.org/abs/2506.13585 eq. 4-5: the clipped ratio is a weight, so that no token loses its
    gradient."""
    low, high = clips_of(settings)
    ratio_P = log_ratio_P.exp()
    weight_P = ratio_P.clamp(1.0 - low, 1.0 + high)
    return -weight_P * inputs.advantage_P * inputs.logprobs_P, weight_P != ratio_P


def ppo(inputs: LossInputs, settings: LossSettings, log_ratio_P: Tensor) -> Term:
    """The clipped surrogate of PPO, https://arxiv.org/abs/1707.06347 eq. 7, clipped higher above than below as in DAPO,
    https://arxiv.org/abs/2503.14476 eq. 10; the old policy is the one that sampled."""
    drift_P = (inputs.logprobs_P - inputs.behaviour_P).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return _surrogate(drift_P.exp(), inputs.advantage_P, settings)


def gspo(inputs: LossInputs, settings: LossSettings, log_ratio_P: Tensor) -> Term:
    """GSPO, https://arxiv.org/abs/2507.18071, in its form for an advantage a token (eq. 13-14), which is eq. 5 where a
    sequence has one: a call's ratio is the geometric mean of its tokens', and each call weighs the same.

    A sequence is one model call, the y that was sampled given x. A trajectory is none: other tokens stand between its
    calls, and a history that was rewritten makes two contexts of it.

    Raises:
        ValueError: the inputs do not say which call a token is of.
    """
    calls = inputs.calls
    if calls is None:
        raise ValueError("gspo weighs calls; give LossInputs.calls")
    number = int(calls.call_P.max()) + 1 if len(calls.call_P) else 0
    mean_C = unit_means(log_ratio_P, calls.call_P, units=number)
    size_P = torch.bincount(calls.call_P, minlength=number)[calls.call_P]
    token_P = (inputs.logprobs_P - inputs.logprobs_P.detach()).exp()  # 1, with the gradient of log pi
    term_P, clipped_P = _surrogate(mean_C.exp()[calls.call_P] * token_P, inputs.advantage_P, settings)
    return term_P * (inputs.normalizer / calls.total) / size_P, clipped_P


def _surrogate(ratio_P: Tensor, advantage_P: Tensor, settings: LossSettings) -> Term:
    """-min(r A, clip(r) A), and where the clip stops the gradient."""
    low, high = clips_of(settings)
    cut_P = ratio_P.clamp(1.0 - low, 1.0 + high)
    plain_P, clipped_P = ratio_P * advantage_P, cut_P * advantage_P
    return -torch.minimum(plain_P, clipped_P), clipped_P.detach() < plain_P.detach()


POLICIES: dict[str, PolicyTerm] = {"tis": tis, "ppo": ppo, "gspo": gspo, "cispo": cispo}


def policy_loss(inputs: LossInputs, settings: LossSettings) -> tuple[Tensor, Sums]:
    """The loss (scalar, with gradient) of these tokens' part of the optimizer step, and what to log."""
    drift_P = (inputs.logprobs_P - inputs.behaviour_P).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio_P = drift_P.detach()
    weight_P = log_ratio_P.exp().clamp(max=settings.tis_cap)
    masks = make_masks(inputs, settings, log_ratio_P=log_ratio_P)
    policy_P, clipped_P = POLICIES[settings.policy](inputs, settings, log_ratio_P)
    per_token_P = masks.policy_P * policy_P
    if inputs.reference_P is not None and settings.kl_beta:
        per_token_P = per_token_P + settings.kl_beta * weight_P * (inputs.logprobs_P - inputs.reference_P).square() / 2
    if settings.anchor:
        per_token_P = per_token_P + settings.anchor * drift_P.square() / 2
    importance_U = inputs.weight_U * inputs.cap_U
    loss = (importance_U[inputs.unit_P] * masks.data_P * per_token_P).sum() / inputs.normalizer
    masks = Masks(masks.data_P, masks.policy_P, masks.parts | {"clipped": clipped_P})
    return loss, _sums(inputs, masks, loss=loss, log_ratio_P=log_ratio_P, weight_P=weight_P)


def make_masks(inputs: LossInputs, settings: LossSettings, *, log_ratio_P: Tensor) -> Masks:
    """Every mask of the loss, as 0 or 1 a token.

    Staleness, veto and geometric band judge the data, and take a whole trajectory out of the loss. OPSM and the trust
    region only stop the policy term: what they stop may still be pulled towards the base.
    """
    far = distance(log_ratio_P, inputs.unit_P, units=len(inputs.weight_U))
    if inputs.whole is not None:
        far = Distance(*(torch.where(w.isnan(), own, w) for w, own in _pairs(inputs.whole, far)))
    ratio_U = far.mean_U.exp()
    moved_P = inputs.logprobs_P.detach().exp() - inputs.behaviour_P.exp()
    wanted_P = inputs.advantage_P.sign()
    parts = {
        "stale": (inputs.gap_U <= settings.max_staleness_versions)[inputs.unit_P],
        "veto": (far.lowest_U.exp() >= settings.veto)[inputs.unit_P],
        "geometric": ((ratio_U >= settings.geometric_low) & (ratio_U <= settings.geometric_high))[inputs.unit_P],
        "opsm": ~((inputs.advantage_P < 0) & (-far.mean_U > settings.opsm_delta)[inputs.unit_P]),
        "trust": ~(wanted_P * moved_P > settings.trust_region),
    }
    data_P = parts["stale"] & parts["veto"] & parts["geometric"]
    policy_P = parts["opsm"] & parts["trust"]
    real = log_ratio_P.dtype
    return Masks(data_P.to(real), policy_P.to(real), parts | {"": data_P & policy_P})


def distance(log_ratio_P: Tensor, unit_P: Tensor, *, units: int) -> Distance:
    """Of each unit's tokens: mean 0 and lowest inf for one without any."""
    mean_U = unit_means(log_ratio_P, unit_P, units=units)
    return Distance(mean_U, torch.full_like(mean_U, math.inf).scatter_reduce(0, unit_P, log_ratio_P, "amin"))


def _pairs(one: Distance, other: Distance) -> list[tuple[Tensor, Tensor]]:
    return [(one.mean_U, other.mean_U), (one.lowest_U, other.lowest_U)]


def unit_means(values_P: Tensor, unit_P: Tensor, *, units: int) -> Tensor:
    """mean_U of the tokens of each unit; 0 for a unit without tokens."""
    zeros = torch.zeros(units, dtype=values_P.dtype, device=values_P.device)
    count_U = zeros.index_add(0, unit_P, torch.ones_like(values_P)).clamp(min=1)
    return zeros.index_add(0, unit_P, values_P) / count_U


def _sums(inputs: LossInputs, masks: Masks, *, loss: Tensor, log_ratio_P: Tensor, weight_P: Tensor) -> Sums:
    logprobs_P = inputs.logprobs_P.detach()
    reference_P = logprobs_P if inputs.reference_P is None else inputs.reference_P
    found = {
        "loss": loss.detach(),
        "log_ratio": log_ratio_P.sum(),
        "k3": (log_ratio_P.exp() - 1 - log_ratio_P).sum(),
        "weight": weight_P.sum(),
        "weight_squared": weight_P.square().sum(),
        "base_distance": (logprobs_P - reference_P).square().sum() / 2,
        "surprise": -inputs.behaviour_P.clamp(min=LEAST_LOGPROB).sum(),
        "positive": (inputs.advantage_P > 0).sum(),
        "negative": (inputs.advantage_P < 0).sum(),
        "clipped": masks.parts["clipped"].sum(),
    }
    found |= {f"kept_{name}".rstrip("_"): mask.sum() for name, mask in masks.parts.items() if name != "clipped"}
    if len(log_ratio_P):
        found["max_log_ratio"] = log_ratio_P.abs().max()
    # All at once: to ask a GPU for each number would wait for it as often.
    real = torch.promote_types(loss.dtype, torch.float32)
    numbers = torch.stack([number.to(real) for number in found.values()]).tolist()
    return Sums(tokens=float(len(log_ratio_P)), **dict(zip(found, numbers, strict=True)))
