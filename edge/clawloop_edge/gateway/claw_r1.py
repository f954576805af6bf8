"""The paths of Claw-R1's endpoints, and those that its documents and older clients call instead. docs/claw-r1.md."""

from collections.abc import Mapping
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from clawloop_edge.engine.protocol import ChatTokenizer, Engine, TextEngine
from clawloop_edge.gateway.auth import Guard
from clawloop_edge.gateway.call import Api
from clawloop_edge.gateway.draws import Draws
from clawloop_edge.gateway.reward import RewardHandler
from clawloop_edge.gateway.serving import Service
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.trajectories import PREFIX, TrajectoryAccess, TrajectoryHandler
from clawloop_edge.gateway.trajectory_chat import TrajectoryChatApi
from clawloop_edge.gateway.trajectory_store import RoomPool, TrajectoryStore
from clawloop_edge.gateway.whitebox import StepPool, WhiteboxHandler
from clawloop_edge.sessions.names import SessionNames
from clawloop_edge.signals.protocol import Scorer

_CHAT = "/v1/chat/completions"
_TRAJECTORY = "trajectory"
_NAMED = "/register_trajectory"


class ClawR1Pool(StepPool, RoomPool, Protocol):
    """The part of the pool that these endpoints need."""


def guards_itself(request: web.Request) -> bool:
    """Whether a trajectory's id lets a request in that has no token; its handler looks."""
    return _TRAJECTORY in request.match_info or request.path == _NAMED


def claw_r1_routes(
    service: Service,
    pool: ClawR1Pool,
    *,
    store: TrajectoryStore,
    engine: Engine | TextEngine,
    guard: Guard,
    settings: GatewaySettings,
    apis: Mapping[str, Api],
    names: SessionNames,
    scorer: Scorer | None,
) -> dict[str, Handler]:
    """Handlers of POST requests by path; first come those that win. `apis` are served on trajectory URLs too."""
    access = TrajectoryAccess(store, guard, names)
    black = TrajectoryHandler(service, pool, store=store, access=access)
    tokenizer = None if isinstance(engine, TextEngine) else engine.tokenizer
    white = WhiteboxHandler(
        service,
        pool,
        settings=settings,
        store=store,
        access=access,
        draws=Draws(pool),
        tokenizer=tokenizer,
        names=names,
    )
    served = {**apis, _CHAT: TrajectoryChatApi(_call_mark(tokenizer))}
    below = {
        **{path.removeprefix("/v1/"): black.answering(api) for path, api in served.items()},
        "register_trajectory": black.register,
        "complete_trajectory": black.complete,
    }
    return {
        "/init_trajectory": black.init,
        _NAMED: black.register_named,
        "/complete_trajectory/{trajectory}": black.complete,
        "/generate": white.generate,
        "/submit_steps": white.submit,
        "/compute_reward": RewardHandler(scorer, tokenizer).handle,
        **{f"{PREFIX}/v1/{name}": handler for name, handler in below.items()},
        f"{PREFIX}/{{alias:.+}}": _aliases({**below, "trajectory/complete": black.complete}),
    }


def _call_mark(tokenizer: ChatTokenizer | None) -> str | None:
    if tokenizer is None:
        return None
    return tokenizer.tool_format.start if tokenizer.tool_format else ""


def _aliases(handlers: Mapping[str, Handler]) -> Handler:
    """The same without `/v1`, or with one too many, as agents build it that add it themselves."""

    async def alias(request: web.Request) -> web.StreamResponse:
        name = request.match_info["alias"]
        while name.startswith("v1/"):
            name = name.removeprefix("v1/")
        if name not in handlers:
            raise web.HTTPNotFound
        return await handlers[name](request)

    return alias
