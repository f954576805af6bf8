"""Updates of a model's linear layers as pairs of factors, and who they come from. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix `b @ a`: b (outputs, r), a (r, inputs), whatever scale there was already in b. Float32."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Columns of b; the matrix has at most this rank."""
        return int(self.b.shape[1])


Update = Mapping[str, Factors]
"""by the full path of a linear layer, such as `model.layers.0.self_attn.q_proj`; a layer that is not there: zero"""


@dataclass(frozen=True)
class Contribution:
    """One member of a round. `source` names it (the id of a delta, or `OWN`), `device_id` its device (empty: the
    server's own update, whose data are of `devices` devices); `weight` is how much it was learned from (trajectories),
    `staleness` how many versions its base is behind."""

    source: str
    device_id: str
    update: Update
    weight: float
    staleness: int = 0
    devices: frozenset[str] = frozenset()


OWN = "own"
"""`Contribution.source` of what the server learned itself, from trajectories"""
