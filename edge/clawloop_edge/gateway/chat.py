"""`POST /v1/chat/completions`: one call from its body to its last byte, streaming or not.

The order is fixed: read, place, prepare, start the engine (errors until here have a status), deliver, keep.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from aiohttp import web

from clawloop_edge.engine.protocol import Engine, GenerateRequest, Generation
from clawloop_edge.engine.tool_calls import Piece
from clawloop_edge.errors import EngineError
from clawloop_edge.gateway import sse
from clawloop_edge.gateway.chat_request import parse_chat
from clawloop_edge.gateway.errors import failure_of
from clawloop_edge.gateway.prompt import Preparer, room_for
from clawloop_edge.gateway.recorder import LiveCall, Recorder, reason_after, reason_before
from clawloop_edge.gateway.reply import CANCELLED, ENGINE_GONE, NOT_SAMPLED, Reply, logprob_entry
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.sessions.classify import classify
from clawloop_edge.sessions.identity import identify
from clawloop_edge.sessions.tracker import Tracker
from clawloop_shared.ids import new_step_id

Json = dict[str, Any]
Sink = Callable[[list[Piece], list[Json]], Awaitable[None]]


class ChatHandler:
    """Answers chat completions calls."""

    def __init__(
        self, engine: Engine, tracker: Tracker, *, preparer: Preparer, recorder: Recorder, settings: GatewaySettings
    ) -> None:
        self._engine, self._tracker, self._preparer = engine, tracker, preparer
        self._recorder, self._settings = recorder, settings

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one call."""
        live, generation = await self._start(request)
        async with aclosing(generation):
            if live.call.stream:
                return await self._stream(request, live, generation=generation)
            return await self._whole(request, live, generation=generation)

    async def _start(self, request: web.Request) -> tuple[LiveCall, Generation]:
        started_ms = _now_ms()
        data = await request.read()
        call = parse_chat(data, self._settings)
        agent = request.headers.get("User-Agent", "")
        traffic = classify(call.messages, tools=bool(call.tools), user_agent=agent)
        identity = identify(request.headers, prompt_cache_key=call.prompt_cache_key, runtime=traffic.runtime)
        placed = await self._tracker.place(call.messages, identity=identity, traffic=traffic)
        tokenizer = self._engine.tokenizer
        prompt = await self._preparer.prepare(call.messages, tools=call.offered, placed=placed, size_bytes=len(data))
        generation = await self._engine.generate(
            GenerateRequest(
                prompt_ids=prompt.ids,
                max_tokens=room_for(prompt, call.max_tokens, context_length=tokenizer.context_length),
                sampling=call.sampling,
                version=call.version,
            )
        )
        live = LiveCall(
            step_id=new_step_id("chatcmpl"),
            call=call,
            identity=identity,
            placed=placed,
            prompt=prompt,
            policy=generation.policy,
            reply=Reply(tokenizer, call),
            engine_reason="" if generation.policy.line == self._engine.line.line_id else NOT_SAMPLED,
            started_ms=started_ms,
        )
        return live, generation

    async def _whole(self, request: web.Request, live: LiveCall, *, generation: Generation) -> web.Response:
        entries: list[Json] = []

        async def sink(pieces: list[Piece], logprobs: list[Json]) -> None:
            if _is_gone(request):
                raise ConnectionResetError("the client went away")
            entries.extend(logprobs)

        await self._run(live, generation, sink=sink)
        body = sse.completion(
            _head(live),
            live.reply.message(),
            finish_reason=live.reply.finish_reason,
            usage=_usage(live, generation),
            logprobs=entries if live.call.logprobs else None,
        )
        return web.Response(body=body, content_type="application/json", headers=_headers(live, reason_after(live)))

    async def _stream(self, request: web.Request, live: LiveCall, *, generation: Generation) -> web.StreamResponse:
        chunks = sse.Chunks(_head(live), include_usage=live.call.include_usage)
        response = web.StreamResponse(headers={**_headers(live, reason_before(live)), **_STREAM_HEADERS})

        async def sink(pieces: list[Piece], logprobs: list[Json]) -> None:
            if pieces or logprobs:
                await response.write(chunks.pieces(pieces, logprobs))

        try:
            await response.prepare(request)
            await response.write(chunks.role())
            await self._run(live, generation, sink=sink)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - the stream has begun: its end must say what happened
            failure = failure_of(error, retry_after_s=self._settings.retry_after_s)
            await response.write(sse.error_event(failure.body()))
            return response
        last = chunks.finish(live.reply.finish_reason)
        if live.call.include_usage:
            last += chunks.usage(_usage(live, generation))
        await response.write(last + sse.DONE)
        await response.write_eof()
        return response

    async def _run(self, live: LiveCall, generation: Generation, *, sink: Sink) -> None:
        """Deliver tokens as they come. However it ends, what was sampled is kept."""
        reply, tokenizer = live.reply, self._engine.tokenizer
        try:
            async for token in generation:
                live.first_token_ms = live.first_token_ms or _now_ms()
                pieces = reply.add(token)
                shown = [logprob_entry(tokenizer, token.token_id, token.logprob)] if live.call.logprobs else []
                await sink(pieces, shown)
                if reply.stopped:
                    break
            await sink(reply.finish(), [])
        except EngineError:
            reply.ended = ENGINE_GONE
            raise
        except (asyncio.CancelledError, ConnectionError):
            reply.ended = CANCELLED
            raise
        finally:
            live.finished_ms = _now_ms()
            self._recorder.keep(live)


_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


def _headers(live: LiveCall, reason: str) -> dict[str, str]:
    policy = live.policy
    return {
        "x-clawloop-step": live.step_id,
        "x-clawloop-policy": f"{policy.line}@{policy.version}",
        "x-clawloop-trainable": f"no ({reason})" if reason else "yes",
    }


def _head(live: LiveCall) -> sse.Head:
    return sse.Head(
        step_id=live.step_id,
        created_s=live.started_ms // 1000,
        model=f"clawloop@{live.policy.version}",
        fingerprint=live.policy.line,
    )


def _usage(live: LiveCall, generation: Generation) -> Json:
    return sse.usage_of(len(live.prompt.ids), len(live.reply.ids), cached_tokens=generation.cached_tokens)


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
