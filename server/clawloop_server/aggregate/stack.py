"""Sums of low-rank matrices, exactly, and the best matrix of a smaller rank. Pure functions of factors.

A sum of `b_i @ a_i` is `[b_1 .. b_n] @ [a_1; ..; a_n]` (FLoRA, https://arxiv.org/abs/2409.05976), whatever their ranks.
Cutting it is a truncated SVD (Eckart and Young, 1936): nothing of that rank is nearer. All of it is computed in float64,
and never is the matrix itself made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clawloop_server.aggregate.updates import Factors

EXACT_COLUMNS = 1024
"""as wide a stack is cut in one step; of a wider one, parts are cut first. 64 updates of rank 16 are just not"""
FOLD_TIMES = 16
"""a part keeps so many times the rank that is wanted in the end, and at most half of its columns"""


@dataclass(frozen=True)
class Cut:
    """A matrix cut to a rank, and what that lost: the Frobenius norm of the difference, and of what was cut."""

    factors: Factors
    lost: float
    norm: float


def stacked(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """`sum(weight * b @ a)` as one pair of factors, in float64: b (outputs, sum of ranks), a (sum of ranks, inputs).

    Terms that share a factor are added in the other one: their sum needs no more rank than one of them. At least one
    term; all of the same outputs and inputs.
    """
    merged: list[tuple[Tensor, Tensor]] = []
    for weight, factors in terms:
        b, a = weight * factors.b.double(), factors.a.double()
        for at, (sum_b, sum_a) in enumerate(merged):
            if torch.equal(sum_a, a):
                merged[at] = (sum_b + b, sum_a)
                break
        else:
            merged.append((b, a))
    return Factors(torch.cat([b for b, _ in merged], dim=1), torch.cat([a for _, a in merged], dim=0))


def truncated(stack: Factors, rank: int) -> Cut:
    """The nearest matrix of at most `rank`, with balanced factors (`b.T @ b == a @ a.T`, diagonal) in float64.

    Stacks up to `EXACT_COLUMNS` wide lose what Eckart and Young say that they must; wider ones are folded first, and
    may lose a little more. `lost` is what they did lose.
    """
    whole = stack
    while stack.rank > EXACT_COLUMNS:
        stack = _folded(stack, rank)
    kept = _svd(stack, rank)
    norm_squared = _inner(whole, whole)
    if stack is whole:
        lost_squared = norm_squared - _inner(kept, kept)
    else:
        lost_squared = norm_squared - 2 * _inner(whole, kept) + _inner(kept, kept)
    return Cut(kept, lost=max(0.0, lost_squared) ** 0.5, norm=max(0.0, norm_squared) ** 0.5)


def _folded(stack: Factors, rank: int) -> Factors:
    """The stack with each `EXACT_COLUMNS` of its columns cut to several times `rank`."""
    keep = min(FOLD_TIMES * rank, EXACT_COLUMNS // 2)
    b_parts, a_parts = stack.b.split(EXACT_COLUMNS, dim=1), stack.a.split(EXACT_COLUMNS, dim=0)
    parts = [_svd(Factors(b, a), keep) for b, a in zip(b_parts, a_parts, strict=True)]
    return Factors(torch.cat([part.b for part in parts], dim=1), torch.cat([part.a for part in parts], dim=0))


def _svd(stack: Factors, rank: int) -> Factors:
    """Truncated SVD by QR of both factors and an SVD of what is between them, (columns, columns)."""
    left_q, left_r = torch.linalg.qr(stack.b)
    right_q, right_r = torch.linalg.qr(stack.a.T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    root = s.sqrt()
    b, a = left_q @ (u * root), (root[:, None] * vh) @ right_q.T
    sign = _signs(b)
    return Factors(b * sign, a * sign[:, None])


def _signs(b: Tensor) -> Tensor:
    """+-1 for each column, so that its largest entry is positive: an SVD leaves the sign open."""
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(b.dtype)


def _inner(x: Factors, y: Factors) -> float:
    """<x, y>, the sum of products of entries: tr((b_y.T b_x)(a_x a_y.T))."""
    return float(((x.b.T @ y.b) * (x.a @ y.a.T)).sum())
