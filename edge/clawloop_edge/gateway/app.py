"""The gateway: routes, and what every request passes on its way in.

Host and Origin -> token -> (no new calls while draining) -> handler; errors in the called API's shape
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.gateway.auth import Guard
from clawloop_edge.gateway.call import Api
from clawloop_edge.gateway.chat_writer import ChatApi
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.gateway.errors import Shape, failure_of
from clawloop_edge.gateway.feedback import FeedbackHandler
from clawloop_edge.gateway.health import HealthHandler
from clawloop_edge.gateway.metrics import Metrics, StateCollector
from clawloop_edge.gateway.recorder import Recorder
from clawloop_edge.gateway.serving import Service
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.source import Source, TextSource, TokenSource
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions.memory import StepMemory
from clawloop_edge.sessions.tracker import REPLY_INDEX, FindKept, Tracker
from clawloop_shared.records import Signal

_SHUTDOWN_S = 1.0
"""how long the runner waits for what still runs after the drain; aiohttp's own minute would come on top of it"""
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
APIS: dict[str, Api] = {
    "/v1/chat/completions": ChatApi(),
}
"""the APIs that answer calls, by path"""


class PoolSide(Protocol):
    """The part of the pool that the gateway needs; `clawloop_edge.pool.store.Pool` is the real one."""

    def keep_step(self, kept: KeptStep, *, index: dict[str, bytes]) -> "Future[None]": ...
    def keep_signal(self, signal: Signal) -> "Future[None]": ...
    def find_step_by(self, name: str, value: bytes, *, session_id: str | None = None) -> str | None: ...
    def get_step(self, step_id: str) -> KeptStep | None: ...


class GatewayStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start. `spliced` counts prompts by how their ids came about."""

    kept: int
    keep_failures: int
    in_flight: int
    remembered_steps: int
    spliced: dict[str, int]


class StatsReader:
    """Reads the counts where they are kept."""

    def __init__(self, recorder: Recorder, source: Source, *, drain: Drain, memory: StepMemory) -> None:
        self._recorder, self._drain, self._memory = recorder, drain, memory
        self._counts = source.preparer.counts if isinstance(source, TokenSource) else {}

    def __call__(self) -> GatewayStats:
        """The counts now."""
        return GatewayStats(
            kept=self._recorder.kept,
            keep_failures=self._recorder.failed,
            in_flight=self._drain.in_flight,
            remembered_steps=len(self._memory),
            spliced={how.value: count for how, count in self._counts.items()},
        )


DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)
"""`await app[DRAIN]()` before the runner is cleaned up"""
STATS: web.AppKey[StatsReader] = web.AppKey("stats", StatsReader)
"""`app[STATS]()` counts since the start"""


def make_app(engine: Engine | TextEngine, pool: PoolSide, *, settings: GatewaySettings, token: str) -> web.Application:
    """The gateway before `engine`, keeping what passes in `pool`. Must be called on a running event loop.

    Run it with `make_runner`, so that a client that goes away frees the engine at once.
    """
    memory = StepMemory(max_entries=settings.memory_entries, max_bytes=settings.memory_bytes)
    source: TokenSource | TextSource
    if isinstance(engine, TextEngine):
        source, decode = TextSource(engine), _no_text
    else:
        source, decode = TokenSource(engine), engine.tokenizer.decode
    tracker = Tracker(memory, find_kept=_finder(pool), decode=decode)
    recorder, drain = Recorder(pool, tracker), Drain(settings.drain_s)
    metrics = Metrics()
    service = Service(source, tracker, recorder=recorder, settings=settings, metrics=metrics)
    feedback, health = FeedbackHandler(pool), HealthHandler(engine, drain)

    async def close(app: web.Application) -> None:
        if isinstance(source, TokenSource):
            source.preparer.close()

    guard = Guard(token, hosts=[settings.host, *settings.allowed_hosts])
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[_border(guard, settings, metrics)])
    for path, api in APIS.items():
        app.router.add_post(path, _counted(_answering(service, api), drain))
    app.router.add_post("/v1/feedback", _counted(feedback.handle, drain))
    app.router.add_get("/v1/models", health.models)
    app.router.add_get("/v1/models/{name}", health.model)
    app.router.add_get("/healthz", health.healthz)
    app.router.add_get("/readyz", health.readyz)
    app.router.add_get("/metrics", metrics.handle)
    app[DRAIN], app[STATS] = drain, StatsReader(recorder, source, drain=drain, memory=memory)
    metrics.watch(StateCollector(engine, app[STATS]))
    app.on_cleanup.append(close)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """The runner to serve the gateway with: a client that goes away cancels its call; calls are not logged."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)


def _no_text(ids: Sequence[int]) -> str:
    return ""


def _finder(pool: PoolSide) -> FindKept:
    def find(chain: bytes, session_id: str | None) -> KeptStep | None:
        step_id = pool.find_step_by(REPLY_INDEX, chain, session_id=session_id)
        return pool.get_step(step_id) if step_id else None

    return find


def _answering(service: Service, api: Api) -> Handler:
    async def answering(request: web.Request) -> web.StreamResponse:
        return await service.answer(request, api)

    return answering


def _counted(handler: Handler, drain: Drain) -> Handler:
    async def counted(request: web.Request) -> web.StreamResponse:
        with drain:
            return await handler(request)

    return counted


def _border(guard: Guard, settings: GatewaySettings, metrics: Metrics) -> Middleware:
    @web.middleware
    async def border(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, status = time.perf_counter(), 499  # nginx's word for a client that went away
        try:
            response = await _checked(request, handler)
            status = response.status
            return response
        finally:
            metrics.request(_route(request), status=status, seconds=time.perf_counter() - began)

    async def _checked(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            guard.check_names(request.headers)
            if request.path not in _OPEN_PATHS:
                guard.check_token(request.headers)
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the border: a client always gets an answer in its API's shape
            return failure_of(error, retry_after_s=settings.retry_after_s).response(_shape(request.path))

    return border


def _route(request: web.Request) -> str:
    """The route's own path, never what the client sent."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _shape(path: str) -> Shape:
    """In which shape an error is said to whoever calls this path."""
    return Shape.ANTHROPIC if path.startswith("/v1/messages") else Shape.OPENAI
