"""Sums of low-rank matrices, exactly, and the best matrix of a smaller rank. Pure functions of factors.

A sum of `b_i @ a_i` is `[b_1 .. b_n] @ [a_1; ..; a_n]` (FLoRA, https://arxiv.org/abs/2409.05976), whatever their ranks.
Cutting it is a truncated SVD (Eckart and Young, 1936): nothing of that rank is nearer. All of it is in float64, and the
matrix itself is never made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clawloop_server.aggregate.gram import inner
from clawloop_server.aggregate.updates import Factors

EXACT_COLUMNS = 1280
"""as wide a stack is cut in one step; of a wider one, parts are cut first. 64 updates of rank 16 and what
they are added to are not"""
FOLD_TIMES = 16
"""a part keeps so many times the rank that is wanted in the end, and at most half of its columns"""


@dataclass(frozen=True)
class Cut:
    """A matrix cut to a rank, and the Frobenius norm of what that lost."""

    factors: Factors
    lost: float


def stacked(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """`sum(weight * b @ a)` as one pair of factors, in float64: b (outputs, sum of ranks), a (sum of ranks, inputs).

    Terms that share a factor are added in the other one: their sum needs no more rank than one of them. At least one
    term; all of the same outputs and inputs.
    """
    merged: list[_Term] = []
    by_a: dict[tuple[object, ...], list[_Term]] = {}
    by_b: dict[tuple[object, ...], list[_Term]] = {}
    for weight, factors in terms:
        of_a, of_b = by_a.setdefault(_glimpse(factors.a), []), by_b.setdefault(_glimpse(factors.b), [])
        if same := next((term for term in of_a if term.adds_b and _same(term.first.a, factors.a)), None):
            same.b, same.adds_a = same.b + weight * factors.b.double(), False
        elif same := next(
            (term for term in of_b if term.adds_a and term.weight and _same(term.first.b, factors.b)), None
        ):
            same.a, same.adds_b = same.a + weight / same.weight * factors.a.double(), False
        else:
            term = _Term(weight, factors, weight * factors.b.double(), factors.a.double())
            for known in (merged, of_a, of_b):
                known.append(term)
    return Factors(torch.cat([term.b for term in merged], dim=1), torch.cat([term.a for term in merged], dim=0))


@dataclass
class _Term:
    """A part of a stack, and which of its factors others may still be added to: adding in one changes it, so that the
    other one alone is shared from then on."""

    weight: float
    first: Factors
    b: Tensor
    a: Tensor
    adds_a: bool = True
    adds_b: bool = True


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.double(), y.double())


def _glimpse(factor: Tensor) -> tuple[object, ...]:
    """Equal for equal factors, and cheap: comparing all factors of a round with each other is not."""
    return (*factor.shape, *factor[0, :4].tolist(), *factor[-1, -4:].tolist())


def truncated(stack: Factors, rank: int) -> Cut:
    """The nearest matrix of at most `rank`, with balanced factors (`b.T @ b == a @ a.T`, diagonal) in float64.

    Stacks up to `EXACT_COLUMNS` wide lose what Eckart and Young say that they must; wider ones are folded first, and
    may lose a little more. `lost` is what they did lose.
    """
    narrow = stack
    while narrow.rank > EXACT_COLUMNS:
        narrow = _folded(narrow, rank)
    kept, rest = _svd(narrow, rank)
    if narrow is stack:
        return Cut(kept, lost=float(rest.norm()))
    difference = inner(stack, stack) - 2 * inner(stack, kept) + inner(kept, kept)
    return Cut(kept, lost=max(0.0, difference) ** 0.5)


def _folded(stack: Factors, rank: int) -> Factors:
    """The stack with equal parts of its columns, as few as can be, each cut to several times `rank`."""
    keep = min(FOLD_TIMES * rank, EXACT_COLUMNS // 2)
    width = math.ceil(stack.rank / math.ceil(stack.rank / EXACT_COLUMNS))
    b_parts, a_parts = torch.split(stack.b, width, dim=1), torch.split(stack.a, width, dim=0)
    parts = [_svd(Factors(b, a), keep)[0] for b, a in zip(b_parts, a_parts, strict=True)]
    return Factors(torch.cat([part.b for part in parts], dim=1), torch.cat([part.a for part in parts], dim=0))


def _svd(stack: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Truncated SVD by QR of both factors and an SVD of what is between them; and the singular values beyond."""
    left, left_tau, left_r = _qr(stack.b)
    right, right_tau, right_r = _qr(stack.a.T)
    u, s, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    root = s[:rank].sqrt()
    b = torch.ormqr(left, left_tau, _below(u[:, :rank] * root, left.shape[0]))
    a = torch.ormqr(right, right_tau, _below(vh[:rank].T * root, right.shape[0])).T
    sign = _signs(b)
    return Factors(b * sign, a * sign[:, None]), s[rank:]


def _qr(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Householder vectors, their factors, and R (least of both sizes, columns): making Q itself costs as much again."""
    vectors, tau = torch.geqrf(tall)
    return vectors, tau, vectors[: min(tall.shape)].triu()


def _below(top: Tensor, rows: int) -> Tensor:
    return torch.cat([top, top.new_zeros(rows - top.shape[0], top.shape[1])], dim=0)


def _signs(b: Tensor) -> Tensor:
    """+-1 for each column, so that its largest entry is positive: an SVD leaves the sign open."""
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(b.dtype)
