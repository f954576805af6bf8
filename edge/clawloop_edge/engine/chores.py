"""Long work on the engine's thread, cut into pieces that take turns with the batch: scoring, loading an adapter.

A chore is a generator that yields after each piece. Between two steps of the batch the oldest chore gets one slice of
time, so that no stream waits longer for its next token than one piece.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SLICE_S = 0.02
"""no piece is begun that would end after this, but for the first of a slice"""


class Pace:
    """How many tokens a piece of work may have, found by trying: pieces grow until they take 30 ms or so.

    On a GPU a few tokens cost as much as one, so small pieces would waste it; on a CPU each one costs its share.
    """

    _SHORT_S, _LONG_S, _LEAST = 0.03, 0.04, 8

    def __init__(self, most: int) -> None:
        self._most, self.tokens = most, min(self._LEAST, most)

    def took(self, seconds: float) -> None:
        """Learn from a piece of `tokens` tokens."""
        if seconds < self._SHORT_S:
            self.tokens = min(self.tokens * 3 // 2, self._most)
        elif seconds > self._LONG_S:
            self.tokens = max(self.tokens // 2, min(self._LEAST, self._most))


@dataclass(eq=False)
class _Chore(Generic[T]):
    start: Callable[[], Generator[None, None, T]]
    answer: "Future[T]"
    kv_bytes: int
    steps: Generator[None, None, T] | None = None


class Chores:
    """What waits and what is being done, oldest first. Lives in the engine's thread."""

    def __init__(self) -> None:
        self._chores: deque[_Chore[Any]] = deque()

    def __bool__(self) -> bool:
        return bool(self._chores)

    @property
    def kv_bytes(self) -> int:
        """Memory of attention caches that the chore being done holds."""
        return sum(chore.kv_bytes for chore in self._chores if chore.steps is not None)

    def add(self, start: Callable[[], Generator[None, None, T]], answer: "Future[T]", *, kv_bytes: int = 0) -> None:
        """Do what `start` makes; `answer` gets what it returns, or its error."""
        self._chores.append(_Chore(start, answer, kv_bytes))

    def turn(self, *, fits: Callable[[int], bool]) -> None:
        """One slice of the oldest chore; it is begun only once its memory `fits`."""
        if not self._chores:
            return
        chore = self._chores[0]
        if chore.steps is None:
            if not fits(chore.kv_bytes):
                return
            if not chore.answer.set_running_or_notify_cancel():
                self._chores.popleft()
                return
        try:
            self._slice(chore)
        except StopIteration as end:
            self._chores.popleft()
            chore.answer.set_result(end.value)
        except BaseException as error:  # noqa: BLE001 - the one who asked gets it
            self._chores.popleft()
            chore.answer.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """End all with `error`."""
        while self._chores:
            chore = self._chores.popleft()
            if chore.steps is not None:
                chore.steps.close()
            if chore.steps is not None or chore.answer.set_running_or_notify_cancel():
                chore.answer.set_exception(error)

    @staticmethod
    def _slice(chore: "_Chore[Any]") -> None:
        if chore.steps is None:
            chore.steps = chore.start()
        began = before = time.monotonic()
        while True:
            next(chore.steps)
            now = time.monotonic()
            if now + (now - before) > began + SLICE_S:
                return
            before = now
