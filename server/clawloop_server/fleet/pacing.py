"""Whose turn it is, at a cost that grows with what happens and not with how many there are. The clock is given."""

import heapq
from collections.abc import Callable

_NEVER = float("inf")


class Due:
    """Nodes by when each is to be looked at next, the earliest first."""

    def __init__(self) -> None:
        self._at_s: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def put(self, node_id: int, at_s: float) -> None:
        """Look at it then, and not when it was to be looked at before; inf: never."""
        if at_s == _NEVER:
            self._at_s.pop(node_id, None)
        elif self._at_s.get(node_id) != at_s:
            self._at_s[node_id] = at_s
            heapq.heappush(self._heap, (at_s, node_id))

    def remove(self, node_id: int) -> None:
        """Forget it."""
        self._at_s.pop(node_id, None)

    def next_s(self) -> float:
        """When the first is due; inf if there is none."""
        heap = self._heap
        while heap and self._at_s.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else _NEVER

    def pop(self, now_s: float) -> int | None:
        """The first that is due, removed; None if none is."""
        if self.next_s() > now_s:
            return None
        _, node_id = heapq.heappop(self._heap)
        del self._at_s[node_id]
        return node_id


class Budget:
    """So many a second; what was not used is saved up, to `burst` at most."""

    def __init__(self, per_s: float, *, burst: float, clock: Callable[[], float]) -> None:
        self._per_s, self._burst, self._clock = per_s, max(burst, 1.0), clock
        self._left, self._at_s = self._burst, clock()

    def take(self) -> bool:
        """Use one, if there is one."""
        if self.ready_s() > self._clock():
            return False
        self._left -= 1.0
        return True

    def ready_s(self) -> float:
        """When one can be used."""
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return now_s if self._left >= 1.0 - 1e-9 else now_s + (1.0 - self._left) / self._per_s
