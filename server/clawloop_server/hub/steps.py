"""What a hub does again and again, each by itself: one step that fails holds up no other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from clawloop_shared.errors import ClawloopError

_log = logging.getLogger(__name__)


class Step:
    """Something to do every so often (inf: once). While it fails it is tried again, more and more seldom."""

    def __init__(
        self,
        name: str,
        work: Callable[[], Awaitable[None]],
        *,
        every_s: float,
        first_wait_s: float = 1.0,
        longest_wait_s: float = 60.0,
    ) -> None:
        self.name, self._work, self._every_s = name, work, every_s
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self.due_s, self._wait_s = float("-inf"), first_wait_s

    async def take(self, clock: Callable[[], float]) -> None:
        """Do it; whatever goes wrong is said and is its own affair."""
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001 whatever it is, the others go on
            known = isinstance(error, ClawloopError)
            _log.error("%s failed and is tried again in %.0f s: %s", self.name, self._wait_s, error, exc_info=not known)
            self.due_s = clock() + self._wait_s
            self._wait_s = min(2 * self._wait_s, self._longest_wait_s)
        else:
            self.due_s, self._wait_s = clock() + self._every_s, self._first_wait_s


async def go_on(steps: list[Step], *, look_s: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Take each step that is due, in their order, for ever."""
    while True:
        for step in steps:
            if step.due_s <= clock():
                await step.take(clock)
        await asyncio.sleep(look_s)
