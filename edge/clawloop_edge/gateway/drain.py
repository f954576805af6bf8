"""Ending well: take no new call, and let those in flight finish."""

import asyncio
import time

from clawloop_edge.errors import EngineBusy


class Drain:
    """Counts the calls in flight. `await drain()` ends the service."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.draining = False
        self.in_flight = 0
        self._last_s = float("-inf")
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def idle_s(self) -> float:
        """How long ago the last call ended; 0 while one is in flight, inf if there was none. From any thread."""
        return 0.0 if self.in_flight else time.monotonic() - self._last_s

    def __enter__(self) -> "Drain":
        if self.draining:
            raise EngineBusy("the edge is shutting down; try again in a moment")
        self.in_flight += 1
        self._idle.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._last_s = time.monotonic()
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def __call__(self) -> bool:
        """Refuse new calls from now on and wait for the others; False if some still ran when the time was up."""
        self.draining = True
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
