"""The policy-gradient loss on what other, older policies sampled. Pure functions of tensors.

With l_t = log pi(t) - log mu(t), mu the policy that sampled, w_t = min(exp(l_t), C) without gradient, A_t advantages:

    L = 1/N sum_i c_i s_i g_i sum_{t in i} [ -m_t w_t A_t log pi(t) + beta w_t (log pi(t) - log base(t))^2 / 2
                                             + lambda l_t^2 / 2 ]

N counts the trained tokens of the whole optimizer step before any mask, so that masking never scales up the rest. What
g and m leave out, and where each part comes from, is in docs/training.md. Knows no model, row layout or optimizer.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from clawloop_server.trainer.settings import LossSettings

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossInputs:
    """P trained tokens of U units. Only `logprobs_P` carries a gradient; `reference_P` is the base model's, or None.

    `normalizer` is N: trained tokens of the optimizer step, all rows (and ranks) together.
    """

    logprobs_P: Tensor
    behaviour_P: Tensor
    advantage_P: Tensor
    unit_P: Tensor
    weight_U: Tensor
    gap_U: Tensor
    trajectory_tokens_U: Tensor
    normalizer: float
    reference_P: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """What a step is watched by, as sums over its tokens, so that rows add up."""

    tokens: float = 0.0
    loss: float = 0.0
    kept: float = 0.0
    kept_stale: float = 0.0
    kept_veto: float = 0.0
    kept_geometric: float = 0.0
    kept_opsm: float = 0.0
    kept_trust: float = 0.0
    log_ratio: float = 0.0
    k3: float = 0.0
    weight: float = 0.0
    weight_squared: float = 0.0
    base_distance: float = 0.0
    entropy: float = 0.0
    positive: float = 0.0
    negative: float = 0.0
    max_log_ratio: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        """Both together; the largest log ratio is the larger one."""
        total = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Sums(**total | {"max_log_ratio": max(self.max_log_ratio, other.max_log_ratio)})

    def metrics(self) -> dict[str, float]:
        """Means over tokens, and the effective sample size (sum w)^2 / (N sum w^2) in (0, 1]."""
        count = max(self.tokens, 1.0)
        shares = {f.name: getattr(self, f.name) / count for f in fields(self) if f.name.startswith("kept")}
        return shares | {
            "loss": self.loss,
            "tokens": self.tokens,
            "mean_log_ratio": self.log_ratio / count,
            "max_log_ratio": self.max_log_ratio,
            "k3": self.k3 / count,
            "ess": self.weight**2 / (count * self.weight_squared) if self.weight_squared else 0.0,
            "k2_base": self.base_distance / count,
            "entropy": self.entropy / count,
            "positive_tokens": self.positive,
            "negative_tokens": self.negative,
        }


@dataclass(frozen=True)
class Masks:
    """Which tokens take part: `data_P` in anything, `policy_P` in the policy term. `parts` has each mask by name."""

    data_P: Tensor
    policy_P: Tensor
    parts: dict[str, Tensor]


def policy_loss(inputs: LossInputs, settings: LossSettings) -> tuple[Tensor, Sums]:
    """The loss (scalar, with gradient) of these tokens' part of the optimizer step, and what to log."""
    log_ratio_P = (inputs.logprobs_P.detach() - inputs.behaviour_P).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight_P = log_ratio_P.exp().clamp(max=settings.tis_cap)
    masks = make_masks(inputs, settings, log_ratio_P=log_ratio_P)
    per_token_P = -masks.policy_P * weight_P * inputs.advantage_P * inputs.logprobs_P
    if inputs.reference_P is not None and settings.kl_beta:
        per_token_P = per_token_P + settings.kl_beta * weight_P * (inputs.logprobs_P - inputs.reference_P).square() / 2
    if settings.anchor:
        drift_P = (inputs.logprobs_P - inputs.behaviour_P).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        per_token_P = per_token_P + settings.anchor * drift_P.square() / 2
    importance_U = inputs.weight_U * share_caps(inputs, settings)
    loss = (importance_U[inputs.unit_P] * masks.data_P * per_token_P).sum() / inputs.normalizer
    return loss, _sums(inputs, masks, loss=loss, log_ratio_P=log_ratio_P, weight_P=weight_P)


def share_caps(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """s_U: what a unit's tokens are scaled with so that no trajectory has more than its largest share of N."""
    return (settings.max_trajectory_share * inputs.normalizer / inputs.trajectory_tokens_U).clamp(max=1.0)


def make_masks(inputs: LossInputs, settings: LossSettings, *, log_ratio_P: Tensor) -> Masks:
    """Every mask of the loss, as 0 or 1 a token.

    Staleness, veto and geometric band judge the data, and take a whole unit out of the loss. OPSM and the trust region
    only stop the policy term: what they stop may still be pulled towards the base.
    """
    mean_U = unit_means(log_ratio_P, inputs.unit_P, units=len(inputs.weight_U))
    lowest_U = torch.full_like(mean_U, math.inf).scatter_reduce(0, inputs.unit_P, log_ratio_P, "amin")
    ratio_U = mean_U.exp()
    moved_P = inputs.logprobs_P.detach().exp() - inputs.behaviour_P.exp()
    wanted_P = inputs.advantage_P.sign()
    parts = {
        "stale": (inputs.gap_U <= settings.max_staleness_versions)[inputs.unit_P],
        "veto": (lowest_U.exp() >= settings.veto)[inputs.unit_P],
        "geometric": ((ratio_U >= settings.geometric_low) & (ratio_U <= settings.geometric_high))[inputs.unit_P],
        "opsm": ~((inputs.advantage_P < 0) & (-mean_U > settings.opsm_delta)[inputs.unit_P]),
        "trust": ~(wanted_P * moved_P > settings.trust_region),
    }
    data_P = parts["stale"] & parts["veto"] & parts["geometric"]
    policy_P = parts["opsm"] & parts["trust"]
    real = log_ratio_P.dtype
    return Masks(data_P.to(real), policy_P.to(real), parts | {"": data_P & policy_P})


def unit_means(values_P: Tensor, unit_P: Tensor, *, units: int) -> Tensor:
    """mean_U of the tokens of each unit; 0 for a unit without tokens."""
    zeros = torch.zeros(units, dtype=values_P.dtype, device=values_P.device)
    count_U = zeros.index_add(0, unit_P, torch.ones_like(values_P)).clamp(min=1)
    return zeros.index_add(0, unit_P, values_P) / count_U


def _sums(inputs: LossInputs, masks: Masks, *, loss: Tensor, log_ratio_P: Tensor, weight_P: Tensor) -> Sums:
    logprobs_P = inputs.logprobs_P.detach()
    reference_P = logprobs_P if inputs.reference_P is None else inputs.reference_P
    kept = {("kept_" + name).rstrip("_"): float(mask.sum()) for name, mask in masks.parts.items()}
    return Sums(
        tokens=float(len(log_ratio_P)),
        loss=float(loss.detach()),
        log_ratio=float(log_ratio_P.sum()),
        k3=float((log_ratio_P.exp() - 1 - log_ratio_P).sum()),
        weight=float(weight_P.sum()),
        weight_squared=float(weight_P.square().sum()),
        base_distance=float((logprobs_P - reference_P).square().sum() / 2),
        positive=float((inputs.advantage_P > 0).sum()),
        negative=float((inputs.advantage_P < 0).sum()),
        max_log_ratio=float(log_ratio_P.abs().max()) if len(log_ratio_P) else 0.0,
        **kept,
    )
