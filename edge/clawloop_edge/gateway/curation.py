"""`GET /v1/steps`, `GET /v1/review` and `POST /v1/curate`: what is kept, what needs a word, and the owner's word on it.

Lists are read in pages: `next` of one is `before` of the next. A word is answered once it is on disk.
"""

import asyncio
import time
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from clawloop_edge.errors import RequestError, UnknownTarget
from clawloop_edge.gateway.body import convert_body, decode_json
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.pool import curation
from clawloop_edge.pool.curation import MAX_NOTE_CHARS, MAX_QUALITY, MAX_TAGS, TAG_PATTERN, CuratedPool, Word
from clawloop_edge.pool.picking import Picked, PickedPool, page
from clawloop_edge.pool.review import queue
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.errors import RecordError
from clawloop_shared.records import Channel, Target
from clawloop_shared.signals import RewardRules

MAX_PAGE = 100
_TARGETS = {"step_id": Target.STEP, "trace_id": Target.RUN, "session_id": Target.SESSION}
_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Tag = Annotated[str, Meta(pattern=TAG_PATTERN)]
_Tags = Annotated[list[_Tag], Meta(max_length=MAX_TAGS // 2)]
_Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE)]
_Place = Annotated[int, Meta(ge=1, lt=1 << 62)]
_Time = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Reward = Annotated[float, Meta(ge=-1, le=1)]
_YesNo = Literal["yes", "no"]
T = TypeVar("T", bound=msgspec.Struct)
V = TypeVar("V")


class StepsPool(CuratedPool, PickedPool, Protocol):
    """The part of the pool that these routes need."""


class CurateBody(msgspec.Struct, forbid_unknown_fields=True):
    """A word on exactly one target."""

    step_id: _Name | None = None
    trace_id: _Name | None = None
    session_id: _Name | None = None
    trainable: bool | None = None
    quality: Annotated[int, Meta(ge=0, le=MAX_QUALITY)] | None = None
    tags: _Tags = []
    untags: _Tags = []
    note: Annotated[str, Meta(max_length=MAX_NOTE_CHARS)] | None = None


class ReviewQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A page of the review queue."""

    limit: _Limit = 20
    before: _Place | UnsetType = UNSET


class StepsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which steps, and which page of them. Times are ms since 1970."""

    session_id: _Name | UnsetType = UNSET
    app: Annotated[str, Meta(max_length=200)] = ""
    channel: Channel | UnsetType = UNSET
    since_ms: _Time = 0
    until_ms: _Time | UnsetType = UNSET
    tag: _Tag | UnsetType = UNSET
    quality_min: Annotated[int, Meta(ge=0, le=MAX_QUALITY)] | UnsetType = UNSET
    trainable: _YesNo | UnsetType = UNSET
    signal: _YesNo | UnsetType = UNSET
    source: Annotated[str, Meta(max_length=64)] = ""
    reward_min: _Reward | UnsetType = UNSET
    reward_max: _Reward | UnsetType = UNSET
    limit: _Limit = 50
    before: _Place | UnsetType = UNSET


class CurationHandler:
    """Shows steps, and takes words on them."""

    def __init__(self, pool: StepsPool, names: SessionNames, *, rules: RewardRules) -> None:
        self._pool, self._names, self._rules = pool, names, rules
        curation.prepare(pool)

    async def steps(self, request: web.Request) -> web.Response:
        """A page of steps, latest first."""
        asked = _query(request, StepsQuery)
        picked = Picked(
            sessions=[self._names.id_of(asked.session_id)] if asked.session_id else [],
            app=asked.app,
            channel=_given(asked.channel),
            since_ms=asked.since_ms,
            until_ms=_given(asked.until_ms),
            tags=[asked.tag] if asked.tag else [],
            quality_min=_given(asked.quality_min),
            trainable=_said(asked.trainable),
            judged=_said(asked.signal),
            source=asked.source,
            reward_min=_given(asked.reward_min),
            reward_max=_given(asked.reward_max),
        )
        found = await asyncio.to_thread(
            page, self._pool, picked, rules=self._rules, limit=asked.limit, before_seq=_given(asked.before)
        )
        return _reply({"steps": [seen.facts() for seen in found.steps], "next": found.next})

    async def review(self, request: web.Request) -> web.Response:
        """A page of what most needs a person's word, latest first."""
        asked = _query(request, ReviewQuery)
        found = await asyncio.to_thread(
            queue,
            self._pool,
            rules=self._rules,
            now_ms=time.time_ns() // 1_000_000,
            limit=asked.limit,
            before_seq=_given(asked.before),
        )
        return _reply({"steps": [needed.facts() for needed in found.steps], "next": found.next})

    async def curate(self, request: web.Request) -> web.Response:
        """Keep a word; 200 means that it is on disk, and that what leaves obeys it."""
        body = convert_body(decode_json(await body_of(request)), CurateBody)
        named = [name for name in _TARGETS if getattr(body, name) is not None]
        if len(named) != 1:
            raise RequestError(f"name one of {', '.join(_TARGETS)}; {len(named)} are named")
        param, target = named[0], _TARGETS[named[0]]
        name: str = getattr(body, param)
        target_id = self._names.id_of(name) if target is Target.SESSION else name
        word = Word(**{field: getattr(body, field) for field in Word.__struct_fields__})
        try:
            future = curation.curate(self._pool, target, target_id, word=word)
            kept = await asyncio.shield(asyncio.wrap_future(future))
        except UnknownTarget as error:
            raise RequestError(str(error), status=404, param=param, code="unknown_target") from error
        except RecordError as error:
            raise RequestError(str(error), code="invalid_word") from error
        ids = [each.curation_id for each in kept]
        return web.json_response({"curation_ids": ids, "target": target, "target_id": name, "stored": True})


def _query(request: web.Request, kind: type[T]) -> T:
    """The query of a request.

    Raises:
        RequestError: a parameter is not known, is given twice, or has a value that it cannot have.
    """
    twice = next((name for name in request.query if len(request.query.getall(name)) > 1), None)
    if twice is not None:
        raise RequestError(f"{twice[:80]} is given more than once", param=twice[:80], code="invalid_type")
    return convert_body(dict(request.query), kind, strict=False)


def _given(value: V | UnsetType) -> V | None:
    """A parameter; None if it is not given. (Not None from the start: a query's `null` would be read as that.)"""
    return None if isinstance(value, UnsetType) else value


def _said(word: _YesNo | UnsetType) -> bool | None:
    return None if isinstance(word, UnsetType) else word == "yes"


def _reply(value: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
