"""The asyncio end of a call: tokens that the engine's thread hands over, waiting to be iterated.

The thread wakes a loop once a step for all its calls, not once a token. Knows no MLX.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from clawloop_edge.engine.protocol import Token
from clawloop_shared.records import Policy

Item = Token | BaseException


class TokenStream:
    """A buffer that belongs to one event loop. `push` runs in that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.cached_tokens = 0
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def push(self, item: Item) -> None:
        """Add a token, or the error that ends the call."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def ready(self, timeout_s: float) -> bool:
        """Wait until something can be taken, at most `timeout_s`; False if nothing came."""
        if self._items:
            return True
        waiter = self._waiter = self.loop.create_future()
        timer = self.loop.call_later(timeout_s, _give_up, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        return bool(self._items)

    async def next(self) -> Token:
        """The next token; raises the error that ended the call."""
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


def _give_up(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def deliver(items: Sequence[tuple[TokenStream, Item]]) -> None:
    """Push all of them; called in the loop that they belong to."""
    for stream, item in items:
        stream.push(item)


class StreamGeneration:
    """A `Generation` over a stream. Dropping it, leaving the iteration or `aclose` calls `cancel`, at most once."""

    reason = ""

    def __init__(self, policy: Policy, stream: TokenStream, *, cancel: Callable[[], None]) -> None:
        self.policy = policy
        self._stream, self._cancel = stream, cancel
        self._over = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed again; known from the first token on."""
        return self._stream.cached_tokens

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first token or error, at most `timeout_s`; takes nothing."""
        return await self._stream.ready(timeout_s)

    async def __aiter__(self) -> AsyncIterator[Token]:
        try:
            while not self._over:
                token = await self._stream.next()
                self._over = token.finish_reason is not None
                yield token
        finally:
            self._stop()

    async def aclose(self) -> None:
        """Cancel the call in the engine; nothing happens if it is over."""
        self._stop()

    def __del__(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if not self._over:
            self._over = True
            self._cancel()
