"""Updates for the tests of joining, and what dense float64 matrices say of them."""

from __future__ import annotations

import torch
from torch import Tensor

from clawloop_server.aggregate.updates import Contribution, Factors, Update


def factors(seed: int, outputs: int, inputs: int, rank: int, *, scale: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    b = scale * torch.randn(outputs, rank, generator=generator)
    return Factors(b, torch.randn(rank, inputs, generator=generator))


def dense(pair: Factors) -> Tensor:
    return pair.b.double() @ pair.a.double()


def vector(update: Update, paths: list[str]) -> Tensor:
    return torch.cat([dense(update[path]).flatten() for path in paths])


def sent(device: str, update: Update, *, weight: float = 10.0, staleness: int = 0) -> Contribution:
    return Contribution(f"delta-{device}", device, update, weight=weight, staleness=staleness)


def near(direction: Update, seed: int, *, noise: float, scale: float = 1.0) -> Update:
    """`direction` and noise beside it that is `noise` times as long, all of it `scale` times as large."""
    found = {}
    for number, (path, pair) in enumerate(sorted(direction.items())):
        other = factors(1000 * seed + number, pair.b.shape[0], pair.a.shape[1], pair.rank)
        by = noise * float(dense(pair).norm() / dense(other).norm())
        found[path] = Factors(scale * torch.cat([pair.b, by * other.b], dim=1), torch.cat([pair.a, other.a]))
    return found
