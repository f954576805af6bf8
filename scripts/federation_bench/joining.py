"""How long the updates of many devices take to be joined in one layer, and how far from the best the result is.

The bound is computed anew, by other means than the code that is measured: the product itself is made, and its singular
values beyond the rank are what Eckart and Young say that every matrix of that rank must lose. What is timed is what a
round does for one layer: the updates' inner products, the stack of them and of the served adapter, its cut, the account
of what that lost, and factors in float32. Who counts, and how much, is weighed once for all layers, so it is not here.
"""

from __future__ import annotations

import statistics
import time

import msgspec
import torch

from clawloop_server.aggregate.gram import layer_inner_products
from clawloop_server.aggregate.layer import JoinedLayer, joined_layer
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import Factors

CLOSE = 1e-6
"""as near to the bound as an error must be, both in parts of the sum's norm: the factors are rounded to float32"""

PRIVATE_SHARE = 0.3
"""of a device's update that no other has"""


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """One layer: `devices` updates of `rank` and an adapter of that rank before them, joined and cut to `keep`. Errors
    are relative to the norm of the sum; `told` is what the round's own account says of `error`."""

    devices: int
    rank: int
    outputs: int
    inputs: int
    keep: int
    threads: int
    wall_s: list[float]
    error: float
    bound: float
    told: float

    @property
    def best_s(self) -> float:
        """Of all rounds."""
        return min(self.wall_s)

    @property
    def median_s(self) -> float:
        """Of all rounds."""
        return statistics.median(self.wall_s)

    @property
    def sound(self) -> bool:
        """Whether it is as good as it can be, and not better: that would be an error of the measurement. And whether
        the account tells what was lost."""
        return self.off_bound <= CLOSE and abs(self.error - self.told) <= CLOSE

    @property
    def off_bound(self) -> float:
        """How far the error is from what had to be lost, on either side."""
        return abs(self.error - self.bound)


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


def _joined(terms: list[tuple[float, Factors]], before: Factors, *, keep: int) -> JoinedLayer:
    gram = layer_inner_products([factors for _, factors in terms]).cpu()
    wanted = FederateSettings().aggregation
    return joined_layer(terms, gram, before, aggregation=wanted, server_lr=1.0, rank=keep, seed=0)


def measure(*, devices: int, rank: int, outputs: int, inputs: int, keep: int, rounds: int, seed: int = 0) -> Joining:
    """Join them `rounds` times, and compare with the bound."""
    terms = updates(devices, rank=rank, outputs=outputs, inputs=inputs, seed=seed)
    ((_, before),) = updates(1, rank=rank, outputs=outputs, inputs=inputs, seed=seed + 1)
    wall_s = []
    for _ in range(rounds):
        began = time.perf_counter()
        joined = _joined(terms, before, keep=keep)
        wall_s.append(time.perf_counter() - began)
    exact = before.b.double() @ before.a.double()
    for weight, factors in terms:
        exact += weight * (factors.b.double() @ factors.a.double())
    norm = exact.norm()
    error = (exact - joined.factors.b.double() @ joined.factors.a.double()).norm() / norm
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
        told=joined.lost / float(norm),
    )
