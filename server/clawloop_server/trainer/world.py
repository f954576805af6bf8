"""The processes that train one adapter together, as the engine sees them.

Each holds the same samples and packs them the same way; each works on its share of the rows, and what they found is
added up. `Alone` is the world of one process; several, with their sharded base, are in distributed.py.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from clawloop_server.trainer.losses import Sums
from clawloop_server.trainer.packing import PackedRow


class World(Protocol):
    """This process among those that train together."""

    rank: int
    size: int

    def share(self, rows: Sequence[PackedRow]) -> list[PackedRow | None]:
        """The rows of this process; as many in each, None where it has none and must still take part."""
        ...

    def total(self, sums: Sums) -> Sums:
        """The sums of all processes together."""
        ...

    def union(self, numbers: Sequence[int]) -> list[int]:
        """What any process has found, sorted, each once."""
        ...

    def together(self, found: dict[int, list[float]]) -> dict[int, list[float]]:
        """What all processes have found, by its number."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part; every process must ask."""
        ...

    def put(self, target: Tensor, value: Tensor) -> None:
        """Make `target`, of which this process may hold a part, the whole `value`."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def share(self, rows: Sequence[PackedRow]) -> list[PackedRow | None]:
        """All of them."""
        return list(rows)

    def total(self, sums: Sums) -> Sums:
        """Its own."""
        return sums

    def union(self, numbers: Sequence[int]) -> list[int]:
        """Its own, sorted, each once."""
        return sorted(set(numbers))

    def together(self, found: dict[int, list[float]]) -> dict[int, list[float]]:
        """Its own."""
        return found

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def put(self, target: Tensor, value: Tensor) -> None:
        """Copy it."""
        target.copy_(value)
