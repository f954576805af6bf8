"""Claw-R1's endpoints for agents that know nothing of training: begin a trajectory, name its group and channel, call
the model in its name, complete it with a reward.

The id that `/init_trajectory` makes is the credential of that trajectory's URLs, and of nothing else. Ids that a client
made up itself need the token at every call. docs/claw-r1.md.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from hashlib import sha256
from typing import Annotated, Any, Protocol

import msgspec
from aiohttp import web
from msgspec import Meta

from clawloop_edge.errors import RequestError, UnknownTarget
from clawloop_edge.gateway.auth import Guard
from clawloop_edge.gateway.body import Json, convert_body, decode_json
from clawloop_edge.gateway.call import Api, Call
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.gateway.serving import Service, now_ms
from clawloop_edge.gateway.trajectory_store import Entry, TrajectoryStore
from clawloop_edge.pool.codec import to_json
from clawloop_edge.sessions.identity import Identity
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.records import Channel, Signal, Target

SOURCE = "claw-r1"
"""the source of signals from these endpoints"""
NO_GROUP = "1"
"""what `/init_trajectory` puts where a group may stand"""
_ID_BYTES = 16
_MAX_NAME_CHARS = 200
_MAX_METADATA_BYTES = 64 << 10
_COMPLETE_WAIT_S = 60.0
PREFIX = "/{trajectory:(?!(?:v1|ui)/)[^/]+}/{group:[^/]+}"
"""how the paths of a trajectory begin; names of our own fixed paths are no trajectories"""


class KeepsSignals(Protocol):
    """The part of the pool that a reward needs."""

    def keep_signal(self, signal: Signal) -> "Future[None]": ...


Reward = Annotated[float, Meta(extra_json_schema={"minimum": -1, "maximum": 1})]
GroupSize = Annotated[int, Meta(ge=1, le=10_000)]


class RegisterBody(msgspec.Struct):
    """What may be said of a trajectory; further fields are ignored. `group_size`: how many its group will have."""

    channel: Channel | None = None
    metadata: Json | None = None
    group_size: GroupSize | None = None


class CompleteBody(msgspec.Struct):
    """How a trajectory ended; further fields are ignored."""

    reward: Reward | None = None
    channel: Channel | None = None


class _Named(msgspec.Struct):
    trajectory_uid: str


class TrajectoryAccess:
    """Lets a request to a trajectory, or not."""

    def __init__(self, store: TrajectoryStore, guard: Guard, names: SessionNames) -> None:
        self._store, self._guard, self._names = store, guard, names

    async def enter(self, headers: Mapping[str, str], name: str, *, make: bool = False) -> Entry:
        """The trajectory with this id or name; with `make`, a caller that has the token may make one.

        Raises:
            RequestError: there is none (404), or none that this caller may know of.
        """
        trajectory_id = self._names.id_of(name)
        entry = await self._store.find(trajectory_id)
        if entry is not None and entry.row.minted:
            return entry
        if self._guard.has_token(headers):
            if entry is None and make:
                check_name(name, "trajectory")
                entry = await self._store.create(trajectory_id, minted=False, now_ms=now_ms())
            if entry is not None:
                return entry
        raise RequestError(
            "no such trajectory; begin one by POST /init_trajectory, or send the token to name one yourself",
            status=404,
            code="unknown_trajectory",
        )


class TrajectoryHandler:
    """The endpoints of trajectories."""

    def __init__(
        self, service: Service, pool: KeepsSignals, *, store: TrajectoryStore, access: TrajectoryAccess
    ) -> None:
        self._service, self._pool, self._store, self._access = service, pool, store, access

    async def init(self, request: web.Request) -> web.Response:
        """POST /init_trajectory: a new trajectory, and the `base_url` for its agent."""
        trajectory_id = secrets.token_hex(_ID_BYTES)
        await self._store.create(trajectory_id, minted=True, now_ms=now_ms())
        base_url = f"{request.scheme}://{request.host}/{trajectory_id}/{NO_GROUP}/v1"
        return web.json_response({"trajectory_uid": trajectory_id, "base_url": base_url})

    def answering(self, api: Api) -> Callable[[web.Request], Any]:
        """The handler of an API's calls on trajectory URLs."""

        async def answer(request: web.Request) -> web.StreamResponse:
            entry = await self._access.enter(request.headers, request.match_info["trajectory"], make=True)
            group_id = group_of(request.match_info["group"])

            def renamed(identity: Identity, call: Call) -> Identity:
                return self._renamed(entry, identity, group_id=group_id, count=call.n)

            with self._store.using(entry), entry.calling():
                return await self._service.answer(request, api, renamed=renamed)

        return answer

    async def register(self, request: web.Request) -> web.Response:
        """POST .../register_trajectory: the channel, the group and the facts of a trajectory."""
        entry = await self._access.enter(request.headers, request.match_info["trajectory"], make=True)
        group_id = group_of(request.match_info["group"])
        with self._store.using(entry):
            return await self._register(entry, convert_body(await _object(request), RegisterBody), group_id=group_id)

    async def register_named(self, request: web.Request) -> web.Response:
        """POST /register_trajectory: the same, as early clients call it."""
        value = await _object(request)
        name = convert_body(value, _Named).trajectory_uid
        entry = await self._access.enter(request.headers, name, make=True)
        return await self._register(entry, convert_body(value, RegisterBody), group_id="")

    async def complete(self, request: web.Request) -> web.Response:
        """POST .../complete_trajectory: the end of a trajectory, and its reward if it has one."""
        entry = await self._access.enter(request.headers, request.match_info["trajectory"])
        with self._store.using(entry):
            body = convert_body(await _object(request), CompleteBody)
            reward = check_reward(body.reward, "reward")
            closed = self._store.update(entry, completed=True)
            await asyncio.wrap_future(closed)
            await entry.idle(_COMPLETE_WAIT_S)  # a call that began before belongs to what is judged
            async with entry.lock:
                steps = await self._store.count_steps(entry.row.trajectory_id)
                if steps and reward is not None:
                    await self._reward(entry, reward)
        channel = entry.row.facts.channel or body.channel or Channel.TRAIN
        return web.json_response({"status": "ok", "steps": steps, "reward": reward, "channel": channel.value})

    def _renamed(self, entry: Entry, identity: Identity, *, group_id: str, count: int) -> Identity:
        trajectory_id = entry.row.trajectory_id
        identity = msgspec.structs.replace(identity, session_id=trajectory_id, trace_id=trajectory_id)
        if identity.incognito:
            return identity
        seat = self._store.seat(entry, group_id=group_id, channel=identity.channel, count=count, now_ms=now_ms())
        channel = entry.row.facts.channel or identity.channel
        return msgspec.structs.replace(identity, channel=channel, seat=seat)

    async def _register(self, entry: Entry, body: RegisterBody, *, group_id: str) -> web.Response:
        check_metadata(body.metadata, "metadata")
        with self._store.using(entry):
            facts, begun = entry.row.facts, entry.row.next_index > 0
            if begun and body.channel not in (None, facts.channel):
                raise RequestError(
                    f"channel is {facts.channel} since step 0 and cannot become {body.channel}",
                    status=409,
                    param="channel",
                )
            if (begun or facts.group_id) and group_id not in ("", facts.group_id):
                where = "in another group already" if facts.group_id else "in no group since step 0"
                raise RequestError(f"this trajectory is {where}", status=409, param="group")
            if facts.group_size and body.group_size not in (None, facts.group_size):
                raise RequestError(
                    f"group_size is {facts.group_size} already and cannot become {body.group_size}",
                    status=409,
                    param="group_size",
                )
            facts = msgspec.structs.replace(
                facts,
                channel=body.channel or facts.channel,
                group_id=facts.group_id or group_id,
                group_size=facts.group_size or body.group_size or 0,
            )
            await asyncio.wrap_future(self._store.update(entry, metadata=body.metadata, facts=facts))
        return web.json_response({"status": "ok"})

    async def _reward(self, entry: Entry, reward: float) -> None:
        """Keep a reward. The same one again is one signal; another one is a later word of the same source."""
        facts, trajectory_id = entry.row.facts, entry.row.trajectory_id
        number = facts.rewards if facts.reward == reward else facts.rewards + 1
        signal = Signal(
            signal_id=signal_id(trajectory_id, number),
            target=Target.TRAJECTORY,
            target_id=trajectory_id,
            source=SOURCE,
            value=reward,
            created_ms=now_ms(),
        )
        try:
            await asyncio.shield(asyncio.wrap_future(self._pool.keep_signal(signal)))
        except UnknownTarget as error:
            raise RequestError("the steps of this trajectory were deleted", status=404) from error
        facts = msgspec.structs.replace(entry.row.facts, rewards=number, reward=reward)
        await asyncio.wrap_future(self._store.update(entry, facts=facts))


def group_of(name: str) -> str:
    """The group that a path or a step names; empty if none.

    Raises:
        RequestError: it is too long, or not printable.
    """
    return "" if name in (NO_GROUP, "") else check_name(name, "group")


def check_name(name: str, what: str) -> str:
    """Return a name that is printable and of a length that the records bear.

    Raises:
        RequestError: it is not.
    """
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise RequestError(f"the {what} must be 1 to {_MAX_NAME_CHARS} printable characters", param=what)
    return name


def check_reward(reward: float | None, param: str) -> float | None:
    """Return a reward as it was given: it is never clipped and never scaled.

    Raises:
        RequestError: it is outside [-1, 1].
    """
    if reward is not None and not -1.0 <= reward <= 1.0:
        raise RequestError(f"{param} is {reward:g}; it must be within [-1, 1]", param=param)
    return reward


def check_metadata(metadata: Json | None, param: str) -> None:
    """Return if this is not too much to keep.

    Raises:
        RequestError: it is.
    """
    if metadata is not None and len(to_json(metadata)) > _MAX_METADATA_BYTES:
        raise RequestError(f"{param} is larger than {_MAX_METADATA_BYTES} bytes; send less", param=param)


def signal_id(name: str, number: int | str) -> str:
    """The id of a signal that is told again and again."""
    return f"{SOURCE}-{sha256(msgspec.json.encode((name, number))).hexdigest()[:32]}"


async def _object(request: web.Request) -> Any:
    """The JSON body; an empty one is an empty object."""
    data = await body_of(request)
    return decode_json(data) if data.strip() else {}
