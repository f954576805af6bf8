"""Inner products of updates, and what averaging their factors would get wrong: from the factors alone, never dense.

`<b_i a_i, b_j a_j> = tr((b_j.T b_i)(a_i a_j.T))`. All of it in float64. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clawloop_server.aggregate.updates import Factors, Update


def inner_products(updates: Sequence[Update]) -> Tensor:
    """(N, N): the inner product of each pair of updates over all layers; a layer that one has not is zero there."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for path in sorted({path for update in updates for path in update}):
        members = [n for n, update in enumerate(updates) if path in update]
        at = torch.tensor(members)
        gram[at[:, None], at[None, :]] += layer_inner_products([updates[n][path] for n in members]).cpu()
    return gram


def layer_inner_products(layer: Sequence[Factors]) -> Tensor:
    """(n, n): the inner product of each pair of matrices of one layer, whatever their ranks."""
    b = torch.cat([factors.b.double() for factors in layer], dim=1)
    a = torch.cat([factors.a.double() for factors in layer], dim=0)
    products = (b.T @ b) * (a @ a.T)
    owner = torch.repeat_interleave(torch.tensor([factors.rank for factors in layer], device=b.device))
    rows = torch.zeros(len(layer), products.shape[1], dtype=torch.float64, device=b.device)
    rows.index_add_(0, owner, products)
    blocks = torch.zeros(len(layer), len(layer), dtype=torch.float64, device=b.device)
    return blocks.index_add_(1, owner, rows)


def inner(x: Factors, y: Factors) -> float:
    """<x, y>, the sum of products of entries."""
    return float(((x.b.double().T @ y.b.double()) * (x.a.double() @ y.a.double().T)).sum())


def norm_of(factors: Factors) -> float:
    """The Frobenius norm."""
    return math.sqrt(max(0.0, inner(factors, factors)))


def weighted_norm(gram: Tensor, weights: Sequence[float]) -> float:
    """The Frobenius norm of `sum(weight * matrix)`."""
    weights_N = gram.new_tensor(list(weights))
    return math.sqrt(max(0.0, float(weights_N @ gram @ weights_N)))


def factor_mean_error(terms: Sequence[tuple[float, Factors]], gram: Tensor) -> float:
    """The Frobenius norm of `sum(w b a) - (sum w b)(sum w a)` with weights that are first made to sum to 1.

    That is what FedAvg of factors gets wrong in this layer, the covariance `sum w (b - mean b)(a - mean a)`; factors of
    a smaller rank count as filled up with zeros, as HetLoRA does. `gram` (n, n) has the terms' inner products. Below
    1e-8 of the sum it is rounding.
    """
    total = sum(weight for weight, _ in terms)
    rank = max(factors.rank for _, factors in terms)
    weights = [weight / total for weight, _ in terms]
    mean = Factors(*mean_factors([(w, _filled(factors, rank)) for w, (_, factors) in zip(weights, terms, strict=True)]))
    along = sum(weight * inner(factors, mean) for weight, (_, factors) in zip(weights, terms, strict=True))
    return math.sqrt(max(0.0, weighted_norm(gram, weights) ** 2 - 2 * along + inner(mean, mean)))


def mean_factors(terms: Sequence[tuple[float, Factors]]) -> tuple[Tensor, Tensor]:
    """The weighted means of b and of a, in float64; of equal ranks, weights that sum to 1."""
    b = torch.stack([weight * factors.b.double() for weight, factors in terms]).sum(dim=0)
    a = torch.stack([weight * factors.a.double() for weight, factors in terms]).sum(dim=0)
    return b, a


def _filled(factors: Factors, rank: int) -> Factors:
    b, a, more = factors.b.double(), factors.a.double(), rank - factors.rank
    b = torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
    return Factors(b, torch.cat([a, a.new_zeros(more, a.shape[1])], dim=0))
