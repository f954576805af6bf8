"""One joined update of what several devices, and the server, learned: who counts, how much, and what came of it.

Pure: no file, no clock, no vault. Says of every contribution what became of it, in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.stack import stacked, truncated
from clawloop_server.aggregate.updates import Contribution, Factors, Update
from clawloop_server.errors import TrainerError


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a contribution. `left_out` says why it does not count (empty: it does).

    `weight` is what its update was multiplied with in the mean, `norm` its Frobenius norm over all layers, `cut_to` what
    that was cut to, `cosine_own` its cosine with the server's own update (none: there is none), `alike` the sources that
    were taken for copies of it.
    """

    source: str
    device_id: str
    weight: float = 0.0
    staleness: int = 0
    norm: float = 0.0
    cut_to: float = 0.0
    cosine_own: float | None = None
    left_out: str = ""
    alike: tuple[str, ...] = ()


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a joined round is made of.

    `rho`: the error that the mean of the factors would have made, relative to the joined update; `tail`: what the cut to
    the rank lost, relative to the update that was made; each over all layers, and of the worst layer. `norm`: of the
    joined update. `conflict[x][y]`: cosine of the updates of devices x < y. `devices`: whose data count.
    """

    method: str
    robust: str
    shares: tuple[Share, ...]
    norm: float = 0.0
    rho: float = 0.0
    rho_worst: float = 0.0
    rho_worst_layer: str = ""
    tail: float = 0.0
    tail_worst: float = 0.0
    tail_worst_layer: str = ""
    conflict: dict[str, dict[str, float]] = {}
    devices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """what an operator should know, in words"""


@dataclass(frozen=True)
class Joined:
    """The next adapter, and how it came about. Every layer has exactly the rank that was asked for."""

    factors: Mapping[str, Factors]
    account: Account


def join(
    base: Update | None,
    contributions: Sequence[Contribution],
    *,
    settings: FederateSettings,
    rank: int,
    seed: int = 0,
) -> Joined:
    """`base` + `server_lr` * the mean of what the contributions learned, cut to `rank`.

    Raises:
        TrainerError: nothing is left to join, or of too few devices.
    """
    if not contributions:
        raise TrainerError("a joined round has no contribution")
    total = sum(c.weight for c in contributions)
    paths = sorted({path for c in contributions for path in c.update} | set(base or {}))
    factors = {}
    for path in paths:
        terms = [(c.weight / total * settings.server_lr, c.update[path]) for c in contributions if path in c.update]
        if base and path in base:
            terms.append((1.0, base[path]))
        cut = truncated(stacked(terms), rank).factors
        factors[path] = Factors(cut.b.to(torch.float32), cut.a.to(torch.float32))
    shares = tuple(
        Share(source=c.source, device_id=c.device_id, weight=c.weight / total, staleness=c.staleness)
        for c in contributions
    )
    devices = tuple(sorted({d for c in contributions for d in (c.devices | {c.device_id})} - {""}))
    return Joined(
        factors,
        Account(method=settings.aggregation, robust=settings.robust, shares=shares, devices=devices),
    )
