"""What devices that lie send: a table from name to what it makes of the deltas that they would have sent.

Knows no model: an attack is a function of updates, as a server receives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from clawloop_server.aggregate.gram import inner
from clawloop_server.aggregate.updates import Contribution, Factors, Update

LIE = 1e6
"""trajectories that a liar says it learned from"""


@dataclass(frozen=True)
class Known:
    """What attackers have: `harm`, what they learned where another tool is right, one each, and `old`, what one of them
    learned beside an earlier adapter."""

    harm: Sequence[Update]
    old: Update


Attack = Callable[[Sequence[Contribution], Known], list[Contribution]]


def scaled(update: Update, by: float) -> Update:
    """The update, so many times as large."""
    return {path: Factors(by * factors.b, factors.a) for path, factors in update.items()}


def norm_of(update: Update) -> float:
    """The Frobenius norm over all layers."""
    return math.sqrt(sum(inner(factors, factors) for factors in update.values()))


def _nan(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
    return [replace(c, update=scaled(c.update, math.nan)) for c in honest]


def _huge(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
    """Random, a hundred times as long as an honest one."""
    found = []
    for number, c in enumerate(honest):
        generator = torch.Generator().manual_seed(number)
        drawn = {
            path: Factors(torch.randn(f.b.shape, generator=generator), torch.randn(f.a.shape, generator=generator))
            for path, f in c.update.items()
        }
        found.append(replace(c, update=scaled(drawn, 100 * norm_of(c.update) / norm_of(drawn))))
    return found


def _flip(by: float) -> Attack:
    return lambda honest, known: [replace(c, update=scaled(c.update, -by)) for c in honest]


def _replay(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
    """All send again what one of them learned beside an earlier adapter, as if it were new."""
    return [replace(c, update=known.old) for c in honest]


def _harm(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
    """Each what it learned in another world, and a lie on how much of it there was."""
    return [replace(c, update=harm, weight=LIE) for c, harm in zip(honest, known.harm, strict=True)]


def _sybils(count: int) -> Attack:
    """So many devices that are one, with what it learned in another world."""

    def attack(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
        return [Contribution(f"sybil-{n}", f"sybil-{n}", known.harm[0], weight=honest[0].weight) for n in range(count)]

    return attack


def _misfit(honest: Sequence[Contribution], known: Known) -> list[Contribution]:
    """Layers of another model."""
    return [replace(c, update={path: Factors(f.b[:-1], f.a) for path, f in c.update.items()}) for c in honest]


ATTACKS: dict[str, Attack] = {
    "nan": _nan,
    "huge": _huge,
    "flip-10": _flip(10.0),
    "flip": _flip(1.0),
    "replay": _replay,
    "harm": _harm,
    "sybils-4": _sybils(4),
    "sybils-100": _sybils(100),
    "misfit": _misfit,
}
