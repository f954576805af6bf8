"""`POST /v1/feedback`: one judgement of a step, run, session or trajectory, answered once it is on disk.

A judgement of a step is stored with the step; the reward of the whole trajectory comes from it later.
"""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Annotated, Protocol

import msgspec
from aiohttp import web
from msgspec import Meta

from clawloop_edge.errors import RequestError, UnknownTarget
from clawloop_edge.gateway.body import convert_body, decode_json
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.gateway.idempotency import retry_key
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.records import Signal, Target, check_signal

_TARGETS = {
    "step_id": Target.STEP,
    "trace_id": Target.RUN,
    "session_id": Target.SESSION,
    "trajectory_id": Target.TRAJECTORY,
}
_Target = Annotated[str, Meta(min_length=1, max_length=200)]


class KeepsSignals(Protocol):
    """The part of the pool that feedback needs."""

    def keep_signal(self, signal: Signal) -> "Future[None]": ...


class FeedbackBody(msgspec.Struct):
    """One judgement, of exactly one target; further fields are ignored."""

    value: Annotated[float, Meta(ge=-1, le=1)]
    step_id: _Target | None = None
    trace_id: _Target | None = None
    session_id: _Target | None = None
    trajectory_id: _Target | None = None
    comment: Annotated[str, Meta(max_length=4096)] | None = None
    source: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] | None = None
    weight: Annotated[float, Meta(gt=0, le=1)] | None = None


class FeedbackHandler:
    """Takes judgements."""

    def __init__(self, pool: KeepsSignals, names: SessionNames) -> None:
        self._pool, self._names = pool, names

    async def handle(self, request: web.Request) -> web.Response:
        """Keep one judgement; 200 means that it, and the step it judges, are on disk."""
        data = await body_of(request)
        said = parse_feedback(data, now_ms=time.time_ns() // 1_000_000, signal_id=_signal_id(request.headers, data))
        named = said.target in (Target.SESSION, Target.TRAJECTORY)
        signal = msgspec.structs.replace(said, target_id=self._names.id_of(said.target_id)) if named else said
        try:
            await asyncio.shield(asyncio.wrap_future(self._pool.keep_signal(signal)))
        except UnknownTarget as error:
            raise RequestError(str(error), status=404, param=_param(signal), code="unknown_target") from error
        body = {"signal_id": signal.signal_id, "target": said.target, "target_id": said.target_id}
        return web.json_response({**body, "value": signal.value, "stored": True})


def parse_feedback(data: bytes, *, now_ms: int, signal_id: str) -> Signal:
    """Read a body.

    Raises:
        RequestError: no target or more than one, or a value outside [-1, 1].
    """
    body = convert_body(decode_json(data), FeedbackBody)
    named = [name for name in _TARGETS if getattr(body, name) is not None]
    if len(named) != 1:
        raise RequestError(
            f"name one of {', '.join(_TARGETS)}; {len(named)} are named", param=named[0] if named else None
        )
    signal = Signal(
        signal_id=signal_id,
        target=_TARGETS[named[0]],
        target_id=getattr(body, named[0]),
        source=body.source or "user",
        value=body.value,
        weight=1.0 if body.weight is None else body.weight,
        comment=body.comment or "",
        created_ms=now_ms,
    )
    return check_signal(signal)


def _signal_id(headers: Mapping[str, str], data: bytes) -> str:
    """A new id; for what is sent again with the same `Idempotency-Key` the one of before, so that it counts once."""
    key = retry_key(headers, data, scope="/v1/feedback")
    return new_id() if key is None else sha256(key.name + key.body)


def _param(signal: Signal) -> str:
    return next(name for name, target in _TARGETS.items() if target is signal.target)
