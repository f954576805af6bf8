"""Which of the nodes that are there are devices that may sync, without asking the database for all of them each time.

A node that is a device is asked about again after a while: who may sync no more is put out of Flower by the hub within
a second, and what they send is refused by the vault at once, so this only ends the asking.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from clawloop_server.fleet.channel import NodeInfo
from clawloop_server.fleet.pacing import Due

_AGAIN_S = 10.0
_STRANGER_S = 0.5
"""one that joins is known to Flower a moment before it is known to us"""


class Members(Protocol):
    """Which nodes are devices that may sync."""

    def device_of(self, node_id: int) -> str | None:
        """The device id of a node, or None if it may not sync (unknown, revoked, deleted)."""
        ...


class Roster:
    """The nodes that are there. `known`: the devices among them, by node."""

    def __init__(self, members: Members, *, clock: Callable[[], float]) -> None:
        self._members, self._clock = members, clock
        self._there: set[int] = set()
        self._due = Due()
        self.known: dict[int, str] = {}

    def set(self, online: Iterable[NodeInfo]) -> list[int]:
        """These are there now and no others; which of the known ones are gone."""
        there = {node.node_id for node in online}
        gone, came = self._there - there, there - self._there
        self._there = there
        for node_id in gone:
            self._due.remove(node_id)
        for node_id in came:
            self._due.put(node_id, self._clock())
        return [node_id for node_id in gone if self.known.pop(node_id, None) is not None]

    def is_due(self) -> bool:
        """Whether `look` would ask anything."""
        return self._due.next_s() <= self._clock()

    def look(self) -> tuple[list[int], list[int]]:
        """Ask about the nodes that are due: which turned out to be devices, and which no longer are. Blocks."""
        came, gone = list[int](), list[int]()
        while (node_id := self._due.pop(self._clock())) is not None:
            device_id = self._members.device_of(node_id)
            if device_id is None:
                self._due.put(node_id, self._clock() + _STRANGER_S)
                if self.known.pop(node_id, None) is not None:
                    gone.append(node_id)
                continue
            self._due.put(node_id, self._clock() + _AGAIN_S)
            if self.known.get(node_id) != device_id:
                self.known[node_id] = device_id
                came.append(node_id)
        return came, gone
