"""Connections: what cannot be read as HTTP gets its 400 in the shape of other errors, and a client that does not come
to the end of its headers or body is let go. Bodies are not unpacked, so that a small one cannot become a large one.

What was sent is not logged: aiohttp's own words for a request that it cannot read have it in them.
"""

import asyncio
import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.errors import Failure

_LOG = logging.getLogger(__name__)
_SHUTDOWN_S = 1.0
"""how long the runner waits for what still runs after the drain; aiohttp's own minute would come on top of it"""
_LINGERING_S = 2.0
"""how long the rest of a body that was refused is read and dropped, so that its client comes to read why"""
TIMEOUT_S: web.AppKey[float] = web.AppKey("timeout_s", float)
"""how long a client may take for a request's line and headers, and then for its body"""


async def body_of(request: web.Request) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is packed (415), did not come in time (408), or is no HTTP (400).
    """
    timeout_s = request.app[TIMEOUT_S]
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RequestError("the body is packed; send it without Content-Encoding", status=415, code="packed_body")
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError as error:
        message = f"the body did not arrive within {timeout_s:g} s; send it faster, or raise [gateway] body_timeout_s"
        raise RequestError(message, status=408, code="request_timeout") from error
    except web.RequestPayloadError as error:
        raise RequestError("the body is no HTTP that can be read", code="invalid_http") from error


class Connection(web.RequestHandler):
    """One connection."""

    __slots__ = ("_head_timeout_s", "_head_timer")

    def __init__(self, manager: web.Server, *, head_timeout_s: float, **options: object) -> None:
        super().__init__(manager, **options)  # type: ignore[arg-type]
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; what is not the rest of a request begins the next one."""
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._stop_waiting()
        elif self._waiter is not None and self._head_timer is None:
            self._await_head()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Say that a request cannot be read, and end the connection."""
        if not isinstance(exc, HttpProcessingError):
            _LOG.error("a request ended with %s", type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        response = _refusal(exc, status).response()
        response.force_close()
        return response

    def _await_head(self) -> None:
        self._head_timer = self._loop.call_later(self._head_timeout_s, self.force_close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _refusal(error: BaseException | None, status: int) -> Failure:
    if status >= 500:
        return Failure(status=status, message="internal error; see the edge's log", code="internal_error")
    if isinstance(error, LineTooLong):
        return Failure(status=status, message="the request line or a header is too long", code="invalid_http")
    return Failure(status=status, message="the request is no HTTP that can be read", code="invalid_http")


class _Server(web.Server):
    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class GatewayRunner(web.AppRunner):
    """Runs the gateway: a client that goes away cancels its call; calls are not logged."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_SHUTDOWN_S,
            auto_decompress=False,
            lingering_time=_LINGERING_S,
            head_timeout_s=app[TIMEOUT_S],
        )

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )
