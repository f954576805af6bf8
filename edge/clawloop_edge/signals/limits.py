"""What bounds a scorer, whichever it is: how long one judgement may take, and how many it may make."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

_HOUR_S = 3_600.0


class ScorerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every scorer's settings begin with these; its own struct grows from this one, with defaults of its own.

    `timeout_s` is for one judgement. `per_hour` is how many cases may be judged within an hour, 0: as many as come;
    those beyond it wait. `at_once` is how many are judged at the same time.
    """

    timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    per_hour: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    at_once: Annotated[int, Meta(ge=1, le=64)] = 1


class Budget:
    """Lets so many through within an hour, and has the others wait."""

    def __init__(self, per_hour: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_hour, self._clock = per_hour, clock
        self._spent: deque[float] = deque(maxlen=per_hour or None)
        self._turn = asyncio.Lock()

    async def spend(self) -> None:
        """Wait until one more may go."""
        async with self._turn:
            await asyncio.sleep(max(0.0, self.wait_s()))
            if self._per_hour:
                self._spent.append(self._clock())

    def wait_s(self) -> float:
        """How long until one more may go."""
        if not self._per_hour or len(self._spent) < self._per_hour:
            return 0.0
        return self._spent[0] + _HOUR_S - self._clock()
