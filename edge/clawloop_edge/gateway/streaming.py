"""The response of a stream: when its headers go out, and what keeps it alive or ends it when one side is silent."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from clawloop_edge.gateway.call import Delta, Writer
from clawloop_edge.gateway.settings import GatewaySettings

_LOG = logging.getLogger(__name__)
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class EventStream:
    """Server-sent events. The headers go out with the first token, so that an error before it has a status."""

    def __init__(self, request: web.Request, writer: Writer, *, headers: dict[str, str]) -> None:
        self.response = web.StreamResponse(headers={**headers, **_HEADERS})
        self.begun = False
        self.writing = False
        """whether bytes wait for the client to read"""
        self.written_at = time.monotonic()
        self._ended = False
        self._request, self._writer = request, writer

    async def begin(self, more: bytes = b"") -> None:
        """Send the headers, and the events that open the stream."""
        self.begun = True
        await self.response.prepare(self._request)
        await self._write(self._writer.begin() + more)

    async def put(self, delta: Delta) -> None:
        """Send what a token adds."""
        data = self._writer.delta(delta)
        if not self.begun:
            await self.begin(data)
        elif data:
            await self._write(data)

    async def ping(self) -> None:
        """Send an event that means nothing."""
        if self.begun and not self._ended:
            await self._write(self._writer.keep_alive)

    async def finish(self, data: bytes) -> None:
        """Send the last events."""
        if not self.begun:
            await self.begin()
        self.written_at, self.writing, self._ended = time.monotonic(), True, True
        await self.response.write_eof(data)

    def abort(self) -> None:
        """Let go of a client that does not read."""
        if self._request.transport is not None:
            self._request.transport.abort()

    async def _write(self, data: bytes) -> None:
        self.written_at, self.writing = time.monotonic(), True
        await self.response.write(data)
        self.writing = self._ended


@asynccontextmanager
async def watched(stream: EventStream, settings: GatewaySettings) -> AsyncIterator[None]:
    """Ping a client to which nothing was said for a while, and let go of one that does not read.

    Costs nothing to a stream that is shorter than `keep_alive_s`.
    """
    loop = asyncio.get_running_loop()
    task: asyncio.Task[None] | None = None

    def start() -> None:
        nonlocal task
        task = loop.create_task(_watch(stream, settings))

    timer = loop.call_later(settings.keep_alive_s, start)
    try:
        yield
    finally:
        timer.cancel()
        if task is not None:
            task.cancel()


async def _watch(stream: EventStream, settings: GatewaySettings) -> None:
    with contextlib.suppress(ConnectionError):  # the one who writes the tokens is told
        while True:
            idle_s = time.monotonic() - stream.written_at
            if stream.writing and idle_s >= settings.stalled_client_s:
                _LOG.warning("a client did not read for %.0f s; its stream is ended", idle_s)
                return stream.abort()
            if not stream.writing and idle_s >= settings.keep_alive_s:
                await stream.ping()
                idle_s = 0.0
            left_s = (settings.stalled_client_s if stream.writing else settings.keep_alive_s) - idle_s
            await asyncio.sleep(min(max(left_s, 0.01), settings.keep_alive_s))
