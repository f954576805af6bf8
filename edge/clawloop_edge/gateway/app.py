"""The gateway: routes, and what every request passes on its way in.

Host and Origin -> token -> (no new calls while draining) -> handler; every error in OpenAI's shape
"""

from concurrent.futures import Future
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from clawloop_edge.engine.protocol import Engine
from clawloop_edge.gateway.auth import Guard
from clawloop_edge.gateway.chat import ChatHandler
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.gateway.errors import failure_of
from clawloop_edge.gateway.feedback import FeedbackHandler
from clawloop_edge.gateway.health import HealthHandler
from clawloop_edge.gateway.prompt import Preparer
from clawloop_edge.gateway.recorder import Recorder
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.sessions.memory import StepMemory
from clawloop_edge.sessions.tracker import REPLY_INDEX, FindKept, Tracker
from clawloop_shared.records import Signal

_SHUTDOWN_S = 1.0
"""how long the runner waits for what still runs after the drain; aiohttp's own minute would come on top of it"""
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})


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

    def __init__(self, recorder: Recorder, preparer: Preparer, *, drain: Drain, memory: StepMemory) -> None:
        self._recorder, self._preparer, self._drain, self._memory = recorder, preparer, drain, memory

    def __call__(self) -> GatewayStats:
        """The counts now."""
        return GatewayStats(
            kept=self._recorder.kept,
            keep_failures=self._recorder.failed,
            in_flight=self._drain.in_flight,
            remembered_steps=len(self._memory),
            spliced={how.value: count for how, count in self._preparer.counts.items()},
        )


DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)
"""`await app[DRAIN]()` before the runner is cleaned up"""
STATS: web.AppKey[StatsReader] = web.AppKey("stats", StatsReader)
"""`app[STATS]()` counts since the start"""


def make_app(engine: Engine, pool: PoolSide, *, settings: GatewaySettings, token: str) -> web.Application:
    """The gateway before `engine`, keeping what passes in `pool`. Must be called on a running event loop.

    Run it with `make_runner`, so that a client that goes away frees the engine at once.
    """
    memory = StepMemory(max_entries=settings.memory_entries, max_bytes=settings.memory_bytes)
    tracker = Tracker(memory, find_kept=_finder(pool), decode=engine.tokenizer.decode)
    preparer, recorder, drain = Preparer(engine.tokenizer), Recorder(pool, tracker), Drain(settings.drain_s)
    chat = ChatHandler(engine, tracker, preparer=preparer, recorder=recorder, settings=settings)
    feedback, health = FeedbackHandler(pool), HealthHandler(engine, drain)

    async def close(app: web.Application) -> None:
        preparer.close()

    guard = Guard(token, hosts=[settings.host, *settings.allowed_hosts])
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[_border(guard, settings)])
    app.router.add_post("/v1/chat/completions", _counted(chat.handle, drain))
    app.router.add_post("/v1/feedback", _counted(feedback.handle, drain))
    app.router.add_get("/v1/models", health.models)
    app.router.add_get("/v1/models/{name}", health.model)
    app.router.add_get("/healthz", health.healthz)
    app.router.add_get("/readyz", health.readyz)
    app[DRAIN], app[STATS] = drain, StatsReader(recorder, preparer, drain=drain, memory=memory)
    app.on_cleanup.append(close)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """The runner to serve the gateway with: a client that goes away cancels its call; calls are not logged."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)


def _finder(pool: PoolSide) -> FindKept:
    def find(chain: bytes, session_id: str | None) -> KeptStep | None:
        step_id = pool.find_step_by(REPLY_INDEX, chain, session_id=session_id)
        return pool.get_step(step_id) if step_id else None

    return find


def _counted(handler: Handler, drain: Drain) -> Handler:
    async def counted(request: web.Request) -> web.StreamResponse:
        with drain:
            return await handler(request)

    return counted


def _border(guard: Guard, settings: GatewaySettings) -> Middleware:
    @web.middleware
    async def border(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            guard.check_names(request.headers)
            if request.path not in _OPEN_PATHS:
                guard.check_token(request.headers)
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the border: a client always gets an answer in its API's shape
            return failure_of(error, retry_after_s=settings.retry_after_s).response()

    return border
