"""The admin API, on loopback alone: `GET /healthz` for anyone on this machine, the rest with the token of the home.

    GET /v1/status                how the server is
    GET /v1/training?after=N      what the trainer said after its Nth event, and the round under way
    GET /metrics                  for Prometheus

Errors have OpenAI's shape, like everywhere else in clawloop. Knows the server only through a function that gives its
status, and what it hears of its trainer.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from clawloop_server.hub.metrics import CONTENT_TYPE, metrics_page
from clawloop_server.hub.status import ServerStatus
from clawloop_server.hub.training import TrainerEar
from clawloop_shared.errors import ClawloopError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AdminPort:
    """The listening admin API."""

    def __init__(self, *, token: str, status: Callable[[], Awaitable[ServerStatus]], trainer: TrainerEar) -> None:
        self._token, self._status, self._trainer = token, status, trainer
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> int:
        """Listen on 127.0.0.1; the port (a free one, if 0 was asked for)."""
        app = web.Application(middlewares=[_errors, self._guard], client_max_size=1 << 20)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/v1/status", self._show_status)
        app.router.add_get("/v1/training", self._show_training)
        app.router.add_get("/metrics", self._show_metrics)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _is_loopback(request.url.host or ""):  # a web page that made its name point here
            return _error(403, "call this API as 127.0.0.1 or localhost")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if request.path != "/healthz" and not hmac.compare_digest(
            given.encode("utf-8", "replace"), self._token.encode()
        ):
            return _error(401, "the admin API needs the token in admin.token as a bearer token")
        return await handler(request)

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _show_status(self, request: web.Request) -> web.Response:
        body = msgspec.json.encode(await self._status())
        return web.Response(body=body, content_type="application/json")

    async def _show_training(self, request: web.Request) -> web.Response:
        after = request.query.get("after", "0")
        if not (after.isascii() and after.isdigit()):
            return _error(400, f"after={after[:32]!r} is no number of an event")
        body = msgspec.json.encode(self._trainer.after(int(after)))
        return web.Response(body=body, content_type="application/json")

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body = metrics_page(await self._status(), self._trainer)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, "there is nothing here" if error.status == 404 else error.reason)
    except ClawloopError as error:
        return _error(503, str(error))


def _error(status: int, message: str) -> web.Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return web.json_response({"error": {"type": kind, "message": message}}, status=status)
