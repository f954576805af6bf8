"""Defences against updates that lie, as functions of the Gram matrix of all updates: nothing of the layers is needed.

A rule on the coordinates of factors would mean nothing: two devices may write the same update with other factors.
What is tolerated, and what is not: docs/federation.md. Pure functions of float64 tensors, deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

import torch
from torch import Tensor

_WEISZFELD_STEPS, _WEISZFELD_CLOSE = 200, 1e-9


def norms_of(gram: Tensor) -> list[float]:
    """The Frobenius norm of each update."""
    return [math.sqrt(max(0.0, square)) for square in gram.diagonal().tolist()]


def cosines_of(gram: Tensor) -> Tensor:
    """(N, N): the cosine of each pair; 0 with an update that is zero."""
    norms_N = torch.tensor(norms_of(gram), dtype=torch.float64)
    scale = norms_N[:, None] * norms_N[None, :]
    return torch.where(scale > 0, gram / scale.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0)


def copies(cosines: Tensor, devices: Sequence[str], threshold: float) -> list[list[int]]:
    """Groups of updates of different devices that are alike: each linked to another by a cosine above `threshold`.

    Each group in rising order, the groups by their first; updates that are like no other are in none.
    """
    group = list(range(len(devices)))
    for i in range(len(devices)):
        for j in range(i):
            if devices[i] != devices[j] and float(cosines[i, j]) > threshold:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if name == old else name for name in group]
    members = [[n for n, name in enumerate(group) if name == first] for first in sorted(set(group))]
    return [found for found in members if len(found) > 1]


def usual(values: Sequence[float]) -> float:
    """The median; of an even number the lower one of the middle, so that of two the larger cannot choose it."""
    return median_low(values)


def clip_scale(norm: float, most: float) -> float:
    """What an update is multiplied with so that its norm is at most `most`."""
    return min(1.0, most / norm) if norm > 0 else 1.0


def centre_cosines(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """The cosine of each update with `sum(weights * update)`; 0 where either is zero."""
    weights_N = torch.tensor(list(weights), dtype=torch.float64)
    along = gram @ weights_N
    centre = math.sqrt(max(0.0, float(weights_N @ along)))
    return [
        value / (norm * centre) if norm * centre > 0 else 0.0
        for value, norm in zip(along.tolist(), norms_of(gram), strict=True)
    ]


def multi_krum(gram: Tensor, attackers: int) -> list[int]:
    """The `N - attackers` updates that are nearest to their `N - attackers - 2` nearest others, in rising order.

    Multi-Krum (Blanchard et al., NeurIPS 2017). It needs `N >= 2 * attackers + 3`; for fewer see `most_attackers`.
    """
    size = gram.shape[0]
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0.0)
    distances.fill_diagonal_(math.inf)
    nearest = distances.sort(dim=1).values[:, : max(1, size - attackers - 2)]
    scores = nearest.sum(dim=1).tolist()
    ranked = sorted(range(size), key=lambda n: (scores[n], n))
    return sorted(ranked[: size - attackers])


def most_attackers(size: int, part: float) -> int:
    """How many of `size` updates Multi-Krum takes to lie: `part` of them, as far as it can tell so many; 0 below 5."""
    return max(0, min(math.ceil(part * size), (size - 3) // 2))


def geometric_median(gram: Tensor, weights: Sequence[float]) -> list[float]:
    """Weights, summing to 1, whose mean of the updates has the least weighted sum of distances to them all (Weiszfeld).

    Half of the weight must lie before it is moved without bound. `weights` are positive.
    """
    given = torch.tensor(list(weights), dtype=torch.float64)
    given = given / given.sum()
    squares, chosen = gram.diagonal(), given
    floor = 1e-9 * math.sqrt(max(1e-300, float(squares.max())))
    for _ in range(_WEISZFELD_STEPS):
        along = gram @ chosen
        distances = (squares - 2 * along + chosen @ along).clamp_min(0.0).sqrt().clamp_min(floor)
        new = given / distances
        new = new / new.sum()
        if float((new - chosen).abs().max()) < _WEISZFELD_CLOSE:
            return [float(weight) for weight in new]
        chosen = new
    return [float(weight) for weight in chosen]
