"""How far two adapters are apart, layer by layer and over all: from their factors alone, the matrices never made.

Pure functions. Knows no registry and no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from clawloop_server.aggregate.gram import inner, norm_of
from clawloop_server.aggregate.stack import stacked
from clawloop_server.aggregate.updates import Factors, Update


@dataclass(frozen=True)
class Difference:
    """Two updates of a layer (or of all, where `layer` is empty), by Frobenius norms.

    `change` is the norm of the second less the first; `cosine` of the angle between them, NaN where one of them is
    zero.
    """

    layer: str
    norm_a: float
    norm_b: float
    change: float
    cosine: float

    @property
    def relative(self) -> float:
        """`change` in parts of the first update's norm; infinite where only the second is not zero."""
        if self.norm_a:
            return self.change / self.norm_a
        return math.inf if self.change else 0.0


def differences(a: Update, b: Update) -> tuple[Difference, list[Difference]]:
    """Over all layers together, and for each layer that one of both changes, by its path.

    Inner products are traces of products of Gram matrices of the factors (see `gram`), in float64: a change below 1e-8
    of the updates may be rounding. Factors that both have in common are taken out first, so that equal adapters are 0
    apart.
    """
    layers, total = [], torch.zeros(4, dtype=torch.float64)
    for path in sorted(a.keys() | b.keys()):
        squares = _squares(a.get(path), b.get(path))
        layers.append(_difference(path, squares))
        total += torch.tensor(squares, dtype=torch.float64)
    return _difference("", tuple(total.tolist())), layers


_Squares = tuple[float, ...]
"""<a, a>, <b, b>, <b - a, b - a> and <a, b>"""


def _squares(a: Factors | None, b: Factors | None) -> _Squares:
    if a and b:
        change = norm_of(stacked([(1.0, b), (-1.0, a)]))
        return norm_of(a) ** 2, norm_of(b) ** 2, change**2, inner(a, b)
    of_a, of_b = (norm_of(factors) ** 2 if factors else 0.0 for factors in (a, b))
    return of_a, of_b, of_a + of_b, 0.0


def _difference(layer: str, squares: _Squares) -> Difference:
    norm_a, norm_b, change = (math.sqrt(square) for square in squares[:3])
    if not norm_a or not norm_b:
        return Difference(layer, norm_a, norm_b, change, math.nan)
    return Difference(layer, norm_a, norm_b, change, max(-1.0, min(1.0, squares[3] / (norm_a * norm_b))))
