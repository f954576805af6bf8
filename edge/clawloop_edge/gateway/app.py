"""The gateway: routes, and what every request passes on its way in.

Host and Origin -> token -> (no new calls while draining) -> handler; errors in the called API's shape
"""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.gateway.auth import Guard
from clawloop_edge.gateway.call import Api
from clawloop_edge.gateway.chat_writer import ChatApi
from clawloop_edge.gateway.claw_r1 import ClawR1Pool, claw_r1_routes, guards_itself
from clawloop_edge.gateway.completions import CompletionsApi
from clawloop_edge.gateway.connections import TIMEOUT_S, GatewayRunner
from clawloop_edge.gateway.curation import CurationHandler, StepsPool
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.gateway.dropping import Dropper, ForgettingPool
from clawloop_edge.gateway.errors import Shape, failure_of
from clawloop_edge.gateway.feedback import FeedbackHandler
from clawloop_edge.gateway.health import HealthHandler
from clawloop_edge.gateway.idempotency import Retries
from clawloop_edge.gateway.messages_writer import MessagesApi
from clawloop_edge.gateway.metrics import Metrics, StateCollector
from clawloop_edge.gateway.openapi import add_document
from clawloop_edge.gateway.openapi_docs import DOCS
from clawloop_edge.gateway.recorder import Recorder
from clawloop_edge.gateway.responses_writer import ResponsesApi
from clawloop_edge.gateway.serving import Service, now_ms
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.source import Source, TextSource, TokenSource
from clawloop_edge.gateway.trajectory_store import TrajectoryStore
from clawloop_edge.sessions.kept import KeptSteps, StepSource
from clawloop_edge.sessions.memory import StepMemory
from clawloop_edge.sessions.names import SessionNames
from clawloop_edge.sessions.tracker import Decode, Tracker
from clawloop_edge.signals.protocol import Scorer
from clawloop_shared.signals import DEFAULT_RULES, RewardRules

_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health", "/ready"})
_MESSAGES = MessagesApi()
APIS: dict[str, Api] = {
    "/v1/chat/completions": ChatApi(),
    "/v1/completions": CompletionsApi(),
    "/v1/messages": _MESSAGES,
    "/v1/responses": ResponsesApi(),
}
"""the APIs that answer calls, by path"""


class PoolSide(ClawR1Pool, StepSource, ForgettingPool, StepsPool, Protocol):
    """The part of the pool that the gateway needs; `clawloop_edge.pool.store.Pool` is the real one."""

    def find_steps_by(
        self, name: str, value: bytes, *, session_id: str | None = None, limit: int = 16
    ) -> list[str]: ...


class GatewayStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start. `spliced` counts prompts by how their ids came about."""

    kept: int
    keep_failures: int
    kept_late: int
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
            kept_late=self._recorder.late,
            in_flight=self._drain.in_flight,
            remembered_steps=len(self._memory),
            spliced={how.value: count for how, count in self._counts.items()},
        )


DRAIN: web.AppKey[Drain] = web.AppKey("drain", Drain)
"""`await app[DRAIN]()` before the runner is cleaned up"""
STATS: web.AppKey[StatsReader] = web.AppKey("stats", StatsReader)
"""`app[STATS]()` counts since the start"""
METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
"""what `/metrics` tells; `watch` adds to it"""
DROPPER: web.AppKey[Dropper] = web.AppKey("dropper", Dropper)
"""`await app[DROPPER]()` after something was forgotten"""


def make_app(
    engine: Engine | TextEngine,
    pool: PoolSide,
    *,
    settings: GatewaySettings,
    token: str,
    scorer: Scorer | None = None,
    rules: RewardRules = DEFAULT_RULES,
) -> web.Application:
    """The gateway before `engine`, keeping what passes in `pool`; `scorer` answers `/compute_reward`, `rules` make the
    rewards that are shown. Must be called on a running event loop.

    Run it with `make_runner`, so that a client that goes away frees the engine at once.
    """
    memory = StepMemory(max_entries=settings.memory_entries, max_bytes=settings.memory_bytes)
    source, decode = _source_of(engine)
    tracker = _tracker(memory, KeptSteps(pool), decode=decode)
    recorder, drain = Recorder(pool, tracker), Drain(settings.drain_s)
    metrics, store, names = Metrics(), TrajectoryStore(pool), SessionNames(pool.tag)
    retries = Retries(pool, clock_ms=now_ms, tokenizer=None if isinstance(engine, TextEngine) else engine.tokenizer)
    service = Service(
        source, tracker, recorder=recorder, settings=settings, metrics=metrics, retries=retries, names=names
    )
    feedback, health = FeedbackHandler(pool, names), HealthHandler(engine, drain)
    curating = CurationHandler(pool, names, rules=rules)

    async def close(app: web.Application) -> None:
        if isinstance(source, TokenSource):
            source.preparer.close()

    guard = Guard(token, hosts=[settings.host, *settings.allowed_hosts])
    app = web.Application(client_max_size=settings.max_body_bytes, middlewares=[_border(guard, settings, metrics)])

    def post(path: str, handler: Handler) -> None:
        app.router.add_post(path, _counted(handler, drain))

    for path, api in APIS.items():
        post(path, _answering(service, api))
    routes = claw_r1_routes(
        service, pool, store=store, engine=engine, guard=guard, settings=settings, apis=APIS, names=names, scorer=scorer
    )
    post("/v1/messages/count_tokens", _counting_tokens(service))
    post("/v1/feedback", feedback.handle)
    post("/v1/curate", curating.curate)
    for path, handler in _reads(curating, health, metrics=metrics).items():
        app.router.add_get(path, handler)
    for path, handler in routes.items():
        post(path, handler)
    add_document(app, DOCS)
    app[TIMEOUT_S] = settings.body_timeout_s
    app[DRAIN], app[STATS] = drain, StatsReader(recorder, source, drain=drain, memory=memory)
    app[DROPPER] = Dropper(pool, memory=memory, trajectories=store, retries=retries, engine=engine)
    metrics.watch(StateCollector(engine, app[STATS]))
    app[METRICS] = metrics
    app.on_cleanup.append(close)
    return app


def _source_of(engine: Engine | TextEngine) -> tuple[TokenSource | TextSource, Decode]:
    """Where answers come from, and how sampled ids are read."""
    if isinstance(engine, TextEngine):
        return TextSource(engine), _no_text
    return TokenSource(engine), engine.tokenizer.decode


def _reads(curating: CurationHandler, health: HealthHandler, *, metrics: Metrics) -> dict[str, Handler]:
    """What GET asks for, by path."""
    return {
        "/v1/steps": curating.steps,
        "/v1/review": curating.review,
        "/v1/models": health.models,
        "/v1/models/{name}": health.model,
        "/healthz": health.healthz,
        "/readyz": health.readyz,
        "/health": health.healthz,
        "/ready": health.readyz,
        "/metrics": metrics.handle,
    }


def make_runner(app: web.Application) -> web.AppRunner:
    """The runner to serve the gateway with."""
    return GatewayRunner(app)


def _tracker(memory: StepMemory, kept: KeptSteps, *, decode: Decode) -> Tracker:
    return Tracker(
        memory,
        find_kept=kept.by_reply,
        find_last=kept.last_main,
        find_run=kept.of_run,
        forgot=kept.forgot,
        decode=decode,
    )


def _no_text(ids: Sequence[int]) -> str:
    return ""


def _answering(service: Service, api: Api) -> Handler:
    async def answering(request: web.Request) -> web.StreamResponse:
        return await service.answer(request, api)

    return answering


def _counting_tokens(service: Service) -> Handler:
    async def counting(request: web.Request) -> web.StreamResponse:
        return web.json_response({"input_tokens": await service.count(request, _MESSAGES.read_count)})

    return counting


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
            guard.check_names(request.headers, target=_target(request))
            if request.path not in _OPEN_PATHS and not guards_itself(request):
                guard.check_token(request.headers)
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the border: a client always gets an answer in its API's shape
            return failure_of(error, retry_after_s=settings.retry_after_s).response(_shape(request))

    return border


def _target(request: web.Request) -> str | None:
    """The name in a request line that has one, as proxies are asked."""
    return None if request.raw_path.startswith("/") else request.url.host


def _route(request: web.Request) -> str:
    """The route's own path, never what the client sent."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _shape(request: web.Request) -> Shape:
    """In which shape an error is said to whoever calls this path."""
    on_trajectory = guards_itself(request)
    if request.path.startswith("/v1/messages") or (on_trajectory and request.path.endswith("/messages")):
        return Shape.ANTHROPIC
    return Shape.CLAW_R1 if on_trajectory else Shape.OPENAI
