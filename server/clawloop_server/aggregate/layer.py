"""One layer of a joined round: its updates become one, are added to what was there, and cut to a rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clawloop_server.aggregate.gram import factor_mean_error, norm_of, weighted_norm
from clawloop_server.aggregate.methods import FEDAVG, METHODS, Terms, method_for
from clawloop_server.aggregate.stack import stacked, truncated
from clawloop_server.aggregate.updates import Factors

_NOTHING = 1e-6
"""a singular value so many times smaller than the largest is rounding of float32"""


@dataclass(frozen=True)
class JoinedLayer:
    """What became of a layer. Norms are Frobenius': of the update as it was made, of the exact mean of the updates
    (weights summing to 1), of what averaging their factors gets wrong in that, and of what the cut lost."""

    factors: Factors
    method: str = ""
    why_not: str = ""
    norm: float = 0.0
    mean: float = 0.0
    wrong: float = 0.0
    lost: float = 0.0


def joined_layer(
    terms: Terms, gram: Tensor, before: Factors | None, *, aggregation: str, server_lr: float, rank: int, seed: int
) -> JoinedLayer:
    """`before + server_lr * sum(weight * update)`, cut to `rank`; there is a `before`, or at least one term.

    `gram` (terms, terms) has the inner products of the updates of this layer.
    """
    old = [] if before is None else [(1.0, before)]
    if not terms:
        return JoinedLayer(filled(truncated(stacked(old), rank).factors, rank, seed=seed))
    method, why_not = method_for(aggregation, terms)
    made = METHODS[method](terms)
    weights = [weight for weight, _ in terms]
    exact_norm = weighted_norm(gram, weights)
    cut = truncated(stacked([(server_lr, made), *old]), rank)
    return JoinedLayer(
        filled(cut.factors, rank, seed=seed),
        method,
        why_not,
        norm=server_lr * (norm_of(made) if method == FEDAVG else exact_norm),
        mean=exact_norm / sum(weights),
        wrong=factor_mean_error(terms, gram),
        lost=cut.lost,
    )


def filled(cut: Factors, rank: int, *, seed: int) -> Factors:
    """The same matrix with factors of exactly `rank`, in float32: where it has less, b is 0 and a random, as LoRA
    starts (each entry within 1 / sqrt(inputs)), so that what is not learned yet can be. Zeros in both never could.
    """
    sizes = cut.a.norm(dim=1)
    kept = sizes > _NOTHING**0.5 * sizes.max() if float(sizes.sum()) > 0 else torch.zeros(cut.rank, dtype=torch.bool)
    b, a = cut.b[:, kept], cut.a[kept]
    missing, inputs = rank - b.shape[1], a.shape[1]
    generator = torch.Generator().manual_seed(seed)
    fresh = (2 * torch.rand(missing, inputs, generator=generator, dtype=torch.float64) - 1) / inputs**0.5
    b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return Factors(b.float(), torch.cat([a, fresh.to(a.device)], dim=0).float())


def relative(parts: Mapping[str, tuple[float, float]]) -> tuple[float, float, str]:
    """How large a part is beside a norm, given by layer: of all layers together, and of the worst with its name."""
    whole = sum(norm**2 for _, norm in parts.values()) ** 0.5
    by_layer = {path: part / norm for path, (part, norm) in parts.items() if norm > 0}
    if not by_layer or whole == 0:
        return 0.0, 0.0, ""
    worst = max(by_layer, key=lambda path: by_layer[path])
    return sum(part**2 for part, _ in parts.values()) ** 0.5 / whole, by_layer[worst], worst
