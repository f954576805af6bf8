"""What a joined round is made of, so that it can be kept as JSON and explained. Values only."""

from __future__ import annotations

import msgspec


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a contribution. `left_out` says why it does not count (empty: it does).

    `weight` is its part of the mean, `norm` its update's Frobenius norm over all layers, `cut_to` what that was cut to;
    `cosine_own` is its cosine with the server's own update, or with what most agree on where there is none and that was
    asked (none: it was not); `alike` names the sources that were taken for copies of it. `by_others`: it was left out
    for what it is beside the others, or for want of them, so that another round may let it count.
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
    by_others: bool = False

    @property
    def multiplier(self) -> float:
        """What its update is multiplied with in the joined one."""
        return self.weight * self.cut_to / self.norm if self.norm > 0 else 0.0


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a joined round is made of.

    `method`: how the updates became one; `robust`: the defence. `norm`: of the joined update, as it was made.
    `rho`: what averaging the factors would have got wrong, `tail`: what the cut to the rank lost, each relative to
    `norm`, over all layers and of the worst layer. `conflict[x][y]`: the cosine of the updates of devices x < y,
    also of those that are left out for where they point. `devices`: whose data count. `notes`: what an operator should
    know, in words.
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
