"""The processes that train one adapter together, as the engine sees them.

Each holds the same samples and packs them the same way; each works on its share of the rows, and what they found is
added up. `Alone` is the world of one process; several, with their sharded base, are in distributed.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clawloop_server.trainer.packing import PackedRow
from clawloop_shared.whole_step import Sums


class Root(torch.nn.Module):
    """Calls functions of a model as its own forward: where it is sharded, only there are the weights whole that belong
    to no layer: embedding, last norm, head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`function(model, ...)`; what of its result has a gradient must be a tensor, or in a tuple, list or dict."""
        return function(self.model, *arguments, **options)


class World(Protocol):
    """This process among those that train together."""

    rank: int
    size: int

    def place(self, root: Root, device: torch.device) -> None:
        """Put the model on the device: all of it, or this process's part of each layer."""
        ...

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

    def part(self, like: Tensor, value: Tensor) -> Tensor:
        """Of a whole `value` what this process holds of `like`, in the same way and on the same device."""
        ...

    def agree(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, which all have in this shape."""
        ...

    def least(self, number: int) -> int:
        """The smallest number that any process has."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def place(self, root: Root, device: torch.device) -> None:
        """All of it."""
        root.to(device)

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

    def part(self, like: Tensor, value: Tensor) -> Tensor:
        """All of it."""
        return value.to(like.device)

    def agree(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def least(self, number: int) -> int:
        """Its own."""
        return number
