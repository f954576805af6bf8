"""How the updates of one layer become one: a table from name to function. Pure functions of weighted factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from clawloop_server.aggregate.gram import mean_factors
from clawloop_server.aggregate.stack import stacked
from clawloop_server.aggregate.updates import Factors

Terms = Sequence[tuple[float, Factors]]
"""what a layer's updates are multiplied with, and the updates; at least one, of the same outputs and inputs"""
Mean = Callable[[Terms], Factors]
"""`sum(weight * b @ a)`, or what is taken for it, as factors"""

SVD, FEDAVG, LINEAR = "svd", "fedavg", "linear"


def fedavg(terms: Terms) -> Factors:
    """The product of the factors' means: wrong by `gram.factor_mean_error`, and what most do. Of equal ranks."""
    total = sum(weight for weight, _ in terms)
    b, a = mean_factors([(weight / total, factors) for weight, factors in terms])
    return Factors(total * b, a)


METHODS: dict[str, Mean] = {SVD: stacked, FEDAVG: fedavg, LINEAR: stacked}
"""`linear`: all share a factor, as those of FFA-LoRA and of a RoLoRA phase do, so that the mean of the other one is
exact, and has the rank of one; `stacked` does just that with them"""


def method_for(wanted: str, terms: Terms) -> tuple[str, str]:
    """The name in `METHODS` of how a layer is joined, and why not as `wanted` (empty: it is, or nothing differs)."""
    if len(terms) > 1 and _share_a_factor(terms):
        return LINEAR, ""
    ranks = sorted({factors.rank for _, factors in terms})
    if wanted == FEDAVG and len(ranks) > 1:
        return SVD, f"factors of ranks {ranks} have no mean: joined by {SVD}, not by {FEDAVG}"
    return wanted, ""


def _share_a_factor(terms: Terms) -> bool:
    (_, first), *others = terms
    return all(_same(first.a, factors.a) for _, factors in others) or all(
        _same(first.b, factors.b) for _, factors in others
    )


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x is y or torch.equal(x, y)
