"""One call from its body to its last byte, streaming or not, whatever API it came through.

The order is fixed: read, place, start (errors until the first token have a status), deliver, keep, end. The
wire format is the API's.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec
from aiohttp import web

from clawloop_edge.gateway.call import Api, Call, Delta, Head, MakeWriter, Usage, Writer
from clawloop_edge.gateway.connections import body_of
from clawloop_edge.gateway.errors import failure_of
from clawloop_edge.gateway.idempotency import FINISHED, REPLAYED, Answered, Attempt, Retries, reply_headers, retry_key
from clawloop_edge.gateway.metrics import Metrics
from clawloop_edge.gateway.recorder import LiveCall, Recorder, reason_after, reason_before
from clawloop_edge.gateway.reply import CANCELLED
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.source import Sink, Source, choice_of
from clawloop_edge.gateway.streaming import EventStream, watched
from clawloop_edge.sessions.classify import Kind, classify
from clawloop_edge.sessions.identity import SESSION_HEADER, Identity, identify
from clawloop_edge.sessions.names import SessionNames
from clawloop_edge.sessions.tracker import Placement, Tracker
from clawloop_shared.ids import new_step_id

Renamed = Callable[[Identity, Call], Identity]
"""what a path says of a call's place, over what its headers and body say"""


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request, read."""

    prefix: str
    call: Call
    make_writer: MakeWriter
    renamed: Renamed | None
    size_bytes: int
    started_ms: int


class Service:
    """Answers calls."""

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        *,
        recorder: Recorder,
        settings: GatewaySettings,
        metrics: Metrics,
        retries: Retries,
        names: SessionNames,
    ) -> None:
        self._source, self._tracker, self._metrics = source, tracker, metrics
        self._names = names
        self._recorder, self._settings, self._retries = recorder, settings, retries

    async def answer(self, request: web.Request, api: Api, *, renamed: Renamed | None = None) -> web.StreamResponse:
        """Serve one call; one that was answered before under its `Idempotency-Key` is answered alike."""
        started_ms = now_ms()
        data = await body_of(request)
        call, make_writer = api.read(data, self._settings)
        asked = _Asked(
            prefix=api.prefix,
            call=call,
            make_writer=make_writer,
            renamed=renamed,
            size_bytes=len(data),
            started_ms=started_ms,
        )
        scope = f"{request.path}\0{request.headers.get(SESSION_HEADER, '')}"
        key = retry_key(request.headers, data, scope=scope, implied=renamed is not None)
        if key is None:
            return await self._anew(request, asked, None)
        identify(request.headers)  # what is wrong in a header is refused in a retry too
        begun = await self._retries.begin(key, call)
        if isinstance(begun, Answered):
            return await self._again(request, begun, asked)
        try:
            return await self._anew(request, asked, begun)
        finally:
            begun.fail()

    async def _again(self, request: web.Request, answered: Answered, asked: _Asked) -> web.StreamResponse:
        """Write an answer that was given before."""
        writer, headers = asked.make_writer(answered.head), {**answered.headers, REPLAYED: "1"}
        if not asked.call.stream:
            body = writer.whole(answered.replies, answered.usage)
            return web.Response(body=body, content_type="application/json", headers=headers)
        stream = EventStream(request, writer, headers=headers)
        async with watched(stream, self._settings):
            for delta in answered.deltas():
                await stream.put(delta)
            await stream.finish(writer.end(answered.replies, answered.usage))
        return stream.response

    async def _anew(self, request: web.Request, asked: _Asked, attempt: Attempt | None) -> web.StreamResponse:
        call = asked.call
        placed, identity = await self._place(request, call, asked.renamed)
        answers = await self._source.start(call, placed=placed, size_bytes=asked.size_bytes)
        async with AsyncExitStack() as closing:
            for answer in answers:
                closing.push_async_callback(answer.aclose)
            first_id = new_step_id(asked.prefix)
            lives = [
                LiveCall(
                    step_id=f"{first_id}-{index}" if index else first_id,
                    call=choice_of(call, index),
                    identity=_choice(identity, index),
                    placed=placed,
                    answer=answer,
                    started_ms=asked.started_ms,
                    lookups=attempt.key.lookups if attempt else {},
                )
                for index, answer in enumerate(answers)
            ]
            if attempt is not None:
                closing.callback(_settle, attempt, lives)
            writer = asked.make_writer(_head(lives[0]))
            if call.stream:
                return await self._stream(request, lives, writer=writer)
            return await self._whole(request, lives, writer=writer)

    async def count(self, request: web.Request, make_call: Callable[[bytes, GatewaySettings], Call]) -> int:
        """Tokens of the prompt that a call with this body would have."""
        data = await body_of(request)
        call = make_call(data, self._settings)
        placed, _ = await self._place(request, call, None, peek=True)
        return await self._source.count(call, placed=placed, size_bytes=len(data))

    async def sample(self, request: web.Request, call: Call, *, size_bytes: int) -> LiveCall:
        """Answer a call that belongs to no session: nothing is written and nothing kept."""
        started_ms, nowhere = now_ms(), Placement(session_id="", run_id="", kind=Kind.MAIN, app="", chain=b"")
        (answer,) = await self._source.start(call, placed=nowhere, size_bytes=size_bytes)
        async with contextlib.aclosing(answer):
            live = LiveCall(
                step_id="", call=call, identity=Identity(), placed=nowhere, answer=answer, started_ms=started_ms
            )
            await self._run_one(live, _present(request))
        return live

    async def _place(
        self, request: web.Request, call: Call, renamed: Renamed | None, *, peek: bool = False
    ) -> tuple[Placement, Identity]:
        agent = request.headers.get("User-Agent", "")
        traffic = classify(call.messages, tools=bool(call.tools), user_agent=agent)
        identity = identify(request.headers, prompt_cache_key=call.prompt_cache_key, runtime=traffic.runtime)
        identity = msgspec.structs.replace(identity, session_id=self._names.id_of(identity.session_id))
        if renamed is not None:
            identity, traffic = renamed(identity, call), msgspec.structs.replace(traffic, kind=Kind.MAIN)
        placed = await self._tracker.place(call.messages, identity=identity, traffic=traffic, peek=peek)
        return placed, identity

    async def _whole(self, request: web.Request, lives: list[LiveCall], *, writer: Writer) -> web.Response:
        await self._run(lives, _present(request))
        await self._recorder.on_disk(lives)
        body = writer.whole([live.reply for live in lives], _usage(lives))
        return web.Response(body=body, content_type="application/json", headers=_headers(lives, reason_after))

    async def _stream(self, request: web.Request, lives: list[LiveCall], *, writer: Writer) -> web.StreamResponse:
        stream = EventStream(request, writer, headers=_headers(lives, reason_before))
        async with watched(stream, self._settings):
            try:
                if not await lives[0].answer.ready(self._settings.headers_after_s):
                    await stream.begin()
                await self._run(lives, stream.put)
                await self._recorder.on_disk(lives)
                await stream.finish(writer.end([live.reply for live in lives], _usage(lives)))
            except ConnectionError:
                raise
            except Exception as error:
                if not stream.begun:
                    raise
                failure = failure_of(_cause(error), retry_after_s=self._settings.retry_after_s)
                await stream.finish(writer.error(failure))
        return stream.response

    async def _run(self, lives: list[LiveCall], sink: Sink) -> None:
        if len(lives) == 1:
            return await self._deliver(lives[0], sink)
        try:
            async with asyncio.TaskGroup() as group:
                for live in lives:
                    group.create_task(self._deliver(live, sink))
        except ExceptionGroup as errors:
            raise _cause(errors) from errors
        return None

    async def _deliver(self, live: LiveCall, sink: Sink) -> None:
        """Deliver one answer as it comes. However it ends, what was sampled is kept."""
        try:
            await self._run_one(live, sink)
        finally:
            live.kept = self._recorder.keep(live)

    async def _run_one(self, live: LiveCall, sink: Sink) -> None:
        """Run one answer to its end, and count it."""

        async def first(delta: Delta) -> None:
            live.first_token_ms = live.first_token_ms or now_ms()
            await sink(delta)

        try:
            await live.answer.run(first)
        except (asyncio.CancelledError, ConnectionError):
            live.reply.ended = CANCELLED
            raise
        finally:
            live.finished_ms = now_ms()
            self._metrics.answer(
                live.answer.usage,
                started_ms=live.started_ms,
                first_token_ms=live.first_token_ms,
                finished_ms=live.finished_ms,
            )


def _cause(error: Exception) -> Exception:
    """The first error of a group; other errors are themselves."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _present(request: web.Request) -> Sink:
    """Takes what a client gets later, as long as it is there."""

    async def sink(delta: Delta) -> None:
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the client went away")

    return sink


def _choice(identity: Identity, index: int) -> Identity:
    """The identity of one choice of a call: in a trajectory, each has its own number."""
    if identity.seat is None or not index:
        return identity
    seat = msgspec.structs.replace(identity.seat, index=identity.seat.index + index)
    return msgspec.structs.replace(identity, seat=seat)


def _settle(attempt: Attempt, lives: list[LiveCall]) -> None:
    """Let those who sent the same have this answer, if it came to its end."""
    if all(live.reply.ended in FINISHED for live in lives):
        answered = Answered(
            head=_head(lives[0]),
            replies=[live.reply for live in lives],
            usage=_usage(lives),
            headers=_headers(lives, reason_after),
        )
        attempt.give(answered, [live.kept for live in lives if live.kept is not None])


def _headers(lives: list[LiveCall], reason_of: Callable[[LiveCall], str]) -> dict[str, str]:
    first = lives[0]
    return reply_headers(
        [live.step_id for live in lives],
        first.answer.policy,
        reason=reason_of(first),
        trajectory_step=first.identity.seat.index if first.identity.seat else None,
    )


def _head(live: LiveCall) -> Head:
    return Head(
        step_id=live.step_id,
        created_s=live.started_ms // 1000,
        model=f"clawloop@{live.answer.policy.version}",
        fingerprint=live.answer.policy.line,
        prompt_ids=live.answer.prompt.ids,
    )


def _usage(lives: list[LiveCall]) -> Usage:
    each = [live.answer.usage for live in lives]
    return Usage(prompt=each[0].prompt, completion=sum(usage.completion for usage in each), cached=each[0].cached)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
