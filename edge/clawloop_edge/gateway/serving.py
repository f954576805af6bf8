"""One call from its body to its last byte, streaming or not, whatever API it came through.

The order is fixed: read, place, start (errors until the first token have a status), deliver, keep. The wire
format is the API's.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from aiohttp import web

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.call import Api, Call, Delta, Head, Usage, Writer
from clawloop_edge.gateway.errors import failure_of
from clawloop_edge.gateway.metrics import Metrics
from clawloop_edge.gateway.recorder import LiveCall, Recorder, reason_after, reason_before
from clawloop_edge.gateway.reply import CANCELLED
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.gateway.source import Sink, Source
from clawloop_edge.gateway.streaming import EventStream, watched
from clawloop_edge.sessions.classify import classify
from clawloop_edge.sessions.identity import Identity, identify
from clawloop_edge.sessions.tracker import Placement, Tracker
from clawloop_shared.ids import new_step_id

Renamed = Callable[[Identity], Identity]
"""what a path says of a call's place, over what its headers and body say"""


class Service:
    """Answers calls."""

    def __init__(
        self, source: Source, tracker: Tracker, *, recorder: Recorder, settings: GatewaySettings, metrics: Metrics
    ) -> None:
        self._source, self._tracker, self._metrics = source, tracker, metrics
        self._recorder, self._settings = recorder, settings

    async def answer(self, request: web.Request, api: Api, *, renamed: Renamed | None = None) -> web.StreamResponse:
        """Serve one call."""
        started_ms = now_ms()
        data = await self._body(request)
        call, make_writer = api.read(data, self._settings)
        placed, identity = await self._place(request, call, renamed)
        answers = await self._source.start(call, placed=placed, size_bytes=len(data))
        async with AsyncExitStack() as closing:
            for answer in answers:
                closing.push_async_callback(answer.aclose)
            first_id = new_step_id(api.prefix)
            lives = [
                LiveCall(
                    step_id=f"{first_id}-{index}" if index else first_id,
                    call=call,
                    identity=identity,
                    placed=placed,
                    answer=answer,
                    started_ms=started_ms,
                )
                for index, answer in enumerate(answers)
            ]
            writer = make_writer(_head(lives[0]))
            if call.stream:
                return await self._stream(request, lives, writer=writer)
            return await self._whole(request, lives, writer=writer)

    async def count(self, request: web.Request, make_call: Callable[[bytes, GatewaySettings], Call]) -> int:
        """Tokens of the prompt that a call with this body would have."""
        data = await self._body(request)
        call = make_call(data, self._settings)
        placed, _ = await self._place(request, call, None)
        return await self._source.count(call, placed=placed, size_bytes=len(data))

    async def _body(self, request: web.Request) -> bytes:
        """Raises RequestError: it did not come in time (408)."""
        limit_s = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await request.read()
        except TimeoutError as error:
            message = f"the body did not arrive within {limit_s:g} s; send it faster, or raise [gateway] body_timeout_s"
            raise RequestError(message, status=408, code="request_timeout") from error

    async def _place(self, request: web.Request, call: Call, renamed: Renamed | None) -> tuple[Placement, Identity]:
        agent = request.headers.get("User-Agent", "")
        traffic = classify(call.messages, tools=bool(call.tools), user_agent=agent)
        identity = identify(request.headers, prompt_cache_key=call.prompt_cache_key, runtime=traffic.runtime)
        identity = renamed(identity) if renamed else identity
        return await self._tracker.place(call.messages, identity=identity, traffic=traffic), identity

    async def _whole(self, request: web.Request, lives: list[LiveCall], *, writer: Writer) -> web.Response:
        async def sink(delta: Delta) -> None:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the client went away")

        await self._run(lives, sink)
        body = writer.whole([live.reply for live in lives], _usage(lives))
        return web.Response(body=body, content_type="application/json", headers=_headers(lives, reason_after))

    async def _stream(self, request: web.Request, lives: list[LiveCall], *, writer: Writer) -> web.StreamResponse:
        stream = EventStream(request, writer, headers=_headers(lives, reason_before))
        try:
            if not await lives[0].answer.ready(self._settings.headers_after_s):
                await stream.begin()
            async with watched(stream, self._settings):
                await self._run(lives, stream.put)
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
            self._recorder.keep(live)
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


def _headers(lives: list[LiveCall], reason_of: Callable[[LiveCall], str]) -> dict[str, str]:
    policy, reason = lives[0].answer.policy, reason_of(lives[0])
    return {
        "x-clawloop-step": ",".join(live.step_id for live in lives),
        "x-clawloop-policy": f"{policy.line}@{policy.version}",
        "x-clawloop-trainable": f"no ({reason})" if reason else "yes",
    }


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
