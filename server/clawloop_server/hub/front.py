"""The public port: TLS, and behind it only what devices need. Everything else is 404.

    POST /v1/join          a device asks to be let in
    POST /v1/forget        a device asks to have deleted what it sent
    POST /v1/standing      a device asks how it stands; /v1/rotate: wants other keys; /v1/leave: says goodbye
    PUT /v1/blobs/SHA256   a part of an item that is too large for a message; GET: a file of an adapter that is
    POST /v1/fleet/NAME    Flower's Fleet API, passed on to the SuperLink on loopback, in both directions as a stream

Of the Fleet API only the calls of a node that is already known are passed: not registering (that is ours), and not
fetching code. A poll for which there is nothing is answered here (`polls`). The rest of Flower's port (runs, node
keys) has no authentication and must never be reachable here.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp import web

from clawloop_server.fleet import polls, pushes
from clawloop_server.hub.desk import DeskAnswer
from clawloop_shared.blobs import BLOB_PATH, MAX_PART_REQUEST_BYTES
from clawloop_shared.membership import LEAVE_PATH, MAX_MEMBER_BYTES, ROTATE_PATH, STANDING_PATH
from clawloop_shared.messages import FORGET_PATH, JOIN_PATH, MAX_FORGET_BYTES, MAX_JOIN_BYTES

_log = logging.getLogger(__name__)

FLEET_CALLS = frozenset(
    {
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    }
)
CODE_CALL = "get-fab"
"""what a stock SuperNode will have before it passes a message on; our own devices run no code of a server's"""
MAX_FLEET_BODY_BYTES = 16 << 20
"""Flower cuts payloads into objects of 5 MB"""
_WHOLE_BYTES = 1 << 20
_LIMITS = {pushes.CALL: pushes.MAX_BODY_BYTES, "push-object": pushes.MAX_OBJECT_BYTES}
_UPSTREAM_S = 60.0
_IDLE_S = 75.0
"""for a connection without a whole request head; aiohttp's own is an hour"""
_REQUEST_S = 300.0
"""for one request and its answer, so that a caller who stalls holds nothing for ever"""
_KEPT = frozenset({"content-type", "accept", "content-length"})
_KEPT_PREFIX = "flwr-"
_DROPPED = frozenset({"connection", "keep-alive", "transfer-encoding", "content-encoding", "server", "date"})


class Desk(Protocol):
    """What answers one kind of call."""

    async def answer(self, body: bytes) -> DeskAnswer:
        """The answer to one request."""
        ...


class Door(Protocol):
    """What answers strangers: it is told who asks."""

    async def answer(self, body: bytes, *, peer: str) -> DeskAnswer:
        """The answer to one request from an address."""
        ...


class Members(Protocol):
    """What answers members, each about itself."""

    async def standing(self, body: bytes) -> DeskAnswer:
        """How it stands."""
        ...

    async def rotate(self, body: bytes) -> DeskAnswer:
        """Other keys."""
        ...

    async def leave(self, body: bytes) -> DeskAnswer:
        """Goodbye."""
        ...


class Blobs(Protocol):
    """What is too large for a message."""

    async def answer(self, name: str, body: bytes) -> DeskAnswer:
        """Take a part."""
        ...

    async def find(self, name: str, query: str) -> Path | None:
        """The file of that hash, for whoever has a good address."""
        ...


class Front:
    """The public server."""

    def __init__(
        self,
        superlink: str,
        *,
        stock_nodes: bool = False,
        joining: Door,
        forgetting: Desk,
        upstream_tls: ssl.SSLContext,
        is_open: Callable[[], bool] = lambda: True,
        nothing_for: Callable[[int], bool] = lambda _: False,
        members: Members | None = None,
        trusted_proxies: Collection[str] = (),
        blobs: Blobs | None = None,
    ) -> None:
        # a stock SuperNode insists on the bridge's app
        self._calls = FLEET_CALLS | {CODE_CALL} if stock_nodes else FLEET_CALLS
        self._superlink, self._upstream_tls = f"https://{superlink}", upstream_tls
        self._joining, self._forgetting, self._members = joining, forgetting, members
        self._blobs = blobs
        self._trusted = frozenset(trusted_proxies)
        self._is_open, self._nothing_for = is_open, nothing_for
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext) -> int:
        """Listen; the port (a free one, if 0 was asked for)."""
        connector = aiohttp.TCPConnector(ssl=self._upstream_tls, limit=0, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_UPSTREAM_S)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout)
        app = web.Application(client_max_size=MAX_FLEET_BODY_BYTES, middlewares=[_errors])
        app.router.add_post(JOIN_PATH, self._join)
        app.router.add_post(FORGET_PATH, self._forget)
        if self._members is not None:
            desk = self._members
            for path, work in ((STANDING_PATH, desk.standing), (ROTATE_PATH, desk.rotate), (LEAVE_PATH, desk.leave)):
                app.router.add_post(path, _member_call(work))
        if self._blobs is not None:
            app.router.add_put(BLOB_PATH + "/{name}", self._put_blob)
            app.router.add_get(BLOB_PATH + "/{name}", self._get_blob, allow_head=False)
        app.router.add_post("/v1/fleet/{call}", self._fleet)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=1.0, keepalive_timeout=_IDLE_S
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        await site.start()
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _join(self, request: web.Request) -> web.Response:
        peer = self._peer(request)
        return await _asked(request, lambda body: self._joining.answer(body, peer=peer), limit=MAX_JOIN_BYTES)

    async def _forget(self, request: web.Request) -> web.Response:
        return await _asked(request, self._forgetting.answer, limit=MAX_FORGET_BYTES)

    async def _put_blob(self, request: web.Request) -> web.Response:
        assert self._blobs is not None
        desk, name = self._blobs, request.match_info["name"]
        return await _asked(request, lambda body: desk.answer(name, body), limit=MAX_PART_REQUEST_BYTES)

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        assert self._blobs is not None
        path = await self._blobs.find(request.match_info["name"], request.query_string)
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})

    def _peer(self, request: web.Request) -> str:
        """The address of the caller: of the connection, or what a proxy that the operator named says it is. Of a
        header with several only the last word is that proxy's own; those before it anybody can write."""
        address = request.remote or ""
        if address not in self._trusted:
            return address
        told = request.headers.getall("X-Forwarded-For", [])
        return told[-1].rpartition(",")[2].strip() if told else address

    async def _fleet(self, request: web.Request) -> web.StreamResponse:
        call = request.match_info["call"]
        if call not in self._calls or request.query_string:
            raise web.HTTPNotFound
        if request.headers.get("Content-Encoding"):
            return _error(415, "Content-Encoding is not accepted here")
        limit = _LIMITS.get(call, MAX_FLEET_BODY_BYTES)
        if (request.content_length or 0) > limit:
            return _error(413, f"a request of {call} may have {limit} bytes")
        if self._session is None or not self._is_open():
            return _error(503, "the server is not ready; try again", retry_after_s=1)
        headers = {k: v for k, v in request.headers.items() if k.lower() in _KEPT or k.lower().startswith(_KEPT_PREFIX)}
        whole = request.content_length is not None and request.content_length <= _WHOLE_BYTES
        body = await request.read() if whole or call == pushes.CALL else _limited(request, limit)
        if call == pushes.CALL and isinstance(body, bytes) and (reason := pushes.why_not(body)):
            return _error(413, reason)
        if call == polls.CALL and isinstance(body, bytes) and polls.finds_nothing(body, self._nothing_for):
            return web.Response(body=polls.ANSWER, content_type=polls.MEDIA_TYPE)
        url = f"{self._superlink}/v1/fleet/{call}"
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as upstream:
                return await _passed_on(request, upstream)
        except aiohttp.ClientError as error:
            _log.info("the SuperLink did not answer %s: %s", call, type(error).__name__)
            return _error(503, "the server is not ready; try again", retry_after_s=1)


def _member_call(work: Callable[[bytes], Awaitable[DeskAnswer]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def call(request: web.Request) -> web.Response:
        return await _asked(request, work, limit=MAX_MEMBER_BYTES)

    return call


async def _asked(request: web.Request, work: Callable[[bytes], Awaitable[DeskAnswer]], *, limit: int) -> web.Response:
    body = await _whole(request, limit)
    if body is None:
        return _error(413, f"a {request.path.rsplit('/', 1)[-1]} request may have {limit} bytes")
    answer = await work(body)
    if answer.status == 200:
        return web.Response(body=answer.body, content_type="application/octet-stream")
    return _error(answer.status, answer.message, retry_after_s=answer.retry_after_s)


async def _whole(request: web.Request, limit: int) -> bytes | None:
    """The body, however many pieces it comes in; None if it is larger than `limit`."""
    if (request.content_length or 0) > limit:
        return None
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > limit:
            return None
    return bytes(body)


async def _limited(request: web.Request, limit: int) -> AsyncIterator[bytes]:
    left = limit
    async for chunk in request.content.iter_any():
        left -= len(chunk)
        if left < 0:
            raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=limit - left)
        yield chunk


async def _passed_on(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = {k: v for k, v in upstream.headers.items() if k.lower() not in _DROPPED}
    if upstream.content_length is not None and upstream.content_length <= _WHOLE_BYTES:
        headers.pop("Content-Length", None)
        return web.Response(status=upstream.status, headers=headers, body=await upstream.read())
    response = web.StreamResponse(status=upstream.status, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    except aiohttp.ClientError:  # the head is out, so only a broken connection can tell the caller
        _hang_up(request)
    return response


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        async with asyncio.timeout(_REQUEST_S):
            return await handler(request)
    except TimeoutError:
        _hang_up(request)
        return _error(408, f"the request took longer than {_REQUEST_S:.0f} s")
    except web.HTTPException as error:
        known = {404: "there is nothing here", 405: "there is nothing here", 413: "the request is too large"}
        status = 404 if error.status == 405 else error.status
        return _error(status, known.get(error.status, error.reason))


def _error(status: int, message: str, *, retry_after_s: int = 0) -> web.Response:
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s else None
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response({"error": {"type": kind, "message": message}}, status=status, headers=headers)
