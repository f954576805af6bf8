"""How long the updates of many devices take to be joined in one layer, and how far from the best the result is.

The bound is computed anew, by other means than the code that is measured: the product itself is made, and its singular
values beyond the rank are what Eckart and Young say that every matrix of that rank must lose.
"""

from __future__ import annotations

import time

import msgspec
import torch

from clawloop_server.aggregate.stack import stacked, truncated
from clawloop_server.aggregate.updates import Factors

PRIVATE_SHARE = 0.3
"""of a device's update that no other has"""


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: `devices` updates of `rank`, joined and cut to `keep`. Errors are relative to the norm of the sum."""

    devices: int
    rank: int
    outputs: int
    inputs: int
    keep: int
    threads: int
    wall_s: list[float]
    error: float
    bound: float

    @property
    def over_bound(self) -> float:
        """How much more was lost than had to be, in parts of what had to be."""
        return self.error / self.bound - 1.0 if self.bound else 0.0


def updates(devices: int, *, rank: int, outputs: int, inputs: int, seed: int) -> list[tuple[float, Factors]]:
    """Updates that agree in the most part, each with its weight."""
    made = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=made).mul_(columns**-0.5)

    b, a = draw(outputs, rank), draw(rank, inputs)
    mine = [(draw(outputs, rank), draw(rank, inputs)) for _ in range(devices)]
    return [
        (1 / devices, Factors(b + PRIVATE_SHARE * own_b, a + PRIVATE_SHARE * own_a)) for own_b, own_a in mine
    ]  # fmt: skip


def measure(*, devices: int, rank: int, outputs: int, inputs: int, keep: int, rounds: int, seed: int = 0) -> Joining:
    """Join them `rounds` times, and compare with the bound."""
    terms = updates(devices, rank=rank, outputs=outputs, inputs=inputs, seed=seed)
    wall_s = []
    for _ in range(rounds):
        began = time.perf_counter()
        cut = truncated(stacked(terms), keep)
        wall_s.append(time.perf_counter() - began)
    exact = torch.zeros(outputs, inputs, dtype=torch.float64)
    for weight, factors in terms:
        exact += weight * (factors.b.double() @ factors.a.double())
    norm = exact.norm()
    error = (exact - cut.factors.b.double() @ cut.factors.a.double()).norm() / norm
    values = torch.linalg.eigvalsh(exact @ exact.T if outputs <= inputs else exact.T @ exact).clamp_min(0)
    bound = values[:-keep].sum().sqrt() / norm
    return Joining(
        devices=devices,
        rank=rank,
        outputs=outputs,
        inputs=inputs,
        keep=keep,
        threads=torch.get_num_threads(),
        wall_s=wall_s,
        error=float(error),
        bound=float(bound),
    )
