"""One call in flight at an upstream server: opened in a task, so that its first byte can be waited for with a limit,
then read where it is iterated, without a task or a thread between the socket and the client.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import aiohttp

from clawloop_edge.engine.upstream_http import EventReader, Upstream
from clawloop_shared.records import Policy

T = TypeVar("T")
Post = Callable[[], Awaitable[aiohttp.ClientResponse]]


class UpstreamCall(ABC, Generic[T]):
    """What a server says, read into items of type T."""

    def __init__(self, policy: Policy, upstream: Upstream, *, post: Post) -> None:
        """`post` sends the request, now."""
        self.policy = policy
        self._upstream, self._post = upstream, post
        self._response: aiohttp.ClientResponse | None = None
        self._events: EventReader | None = None
        self._over = self._stopped = False
        upstream.in_flight += 1
        self._first = asyncio.get_running_loop().create_task(self._open())

    @abstractmethod
    def _read(self, events: list[bytes]) -> list[T]:
        """The items of some events. Raises EngineError."""

    @abstractmethod
    def _read_whole(self, data: bytes) -> list[T]:
        """The items of a reply that is no stream. Raises EngineError."""

    @abstractmethod
    def _finish(self) -> list[T]:
        """The last items, when the stream is over. Raises EngineError: it ended too early."""

    def _release(self) -> None:
        """Give back what the call held; called once, when it is over."""

    @property
    def said_done(self) -> bool:
        """Whether the server said that its stream is complete."""
        return self._events is not None and self._events.done

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first item, or for the error that ended the call, at most `timeout_s`; takes nothing."""
        if not self._first.done():
            await asyncio.wait((self._first,), timeout=timeout_s)
        return self._first.done()

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            items = await self._first
            while items:
                for item in items:
                    yield item
                items = await self._more()
        finally:
            self._stop()

    async def aclose(self) -> None:
        """Cancel the call at the server, by closing the connection; nothing happens if it is over."""
        self._stop()

    async def _open(self) -> list[T]:
        response = self._response = await self._post()
        if response.headers.get("Content-Type", "").startswith("application/json"):
            self._over = True
            return self._read_whole(await self._upstream.whole(response))
        self._events = EventReader(self._upstream, response)
        return await self._more()

    async def _more(self) -> list[T]:
        while not self._over and self._events is not None:
            events = await self._events.next()
            self._over = not events
            items = self._read(events) if events else self._finish()
            if items:
                return items
        return []

    def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        if not self._first.done():
            self._first.cancel()
        elif not self._first.cancelled():
            self._first.exception()  # seen, also where nobody waited for it
        if self._response is not None:
            self._response.close()
        self._upstream.in_flight -= 1
        self._release()
