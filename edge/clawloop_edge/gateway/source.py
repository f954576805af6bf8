"""Where answers come from. `TokenSource` samples them, token-exact, from an `Engine`; `TextSource` has them from a
server that says only text, so that they are served and kept, and never learned from.
"""

import asyncio
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec

from clawloop_edge.engine.protocol import (
    Engine,
    GenerateRequest,
    Generation,
    TextEngine,
    TextGeneration,
    TextRequest,
)
from clawloop_edge.errors import EngineError, RequestError
from clawloop_edge.gateway.call import Call, Choosing, Delta, Usage
from clawloop_edge.gateway.prompt import Preparer, Prompt, room_for
from clawloop_edge.gateway.reply import ENGINE_GONE, NOT_SAMPLED, Reply, TokenReply, logprob_entry
from clawloop_edge.sessions.splice import How
from clawloop_edge.sessions.tracker import Placement
from clawloop_shared.records import Policy

INEXACT = "inexact: the upstream server gives no token ids"
_SEEDS = 1 << 64
"""how many there are: the integers of 64 bits with a sign"""
_TOKEN_CHARS, _SLACK_CHARS = 64, 1 << 16
"""an upstream server that says more characters than so many a token, and some, would say them without end"""
_NO_PROMPT = Prompt("", [], How.FRESH)


class Sink(Protocol):
    """Takes what is delivered, in order."""

    async def __call__(self, delta: Delta) -> None: ...


class Answer(Protocol):
    """One answer in the making."""

    @property
    def policy(self) -> Policy: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def reply(self) -> Reply: ...
    @property
    def reason(self) -> str:
        """Why nothing that this source gives may be learned from; empty if it may."""
        ...

    @property
    def usage(self) -> Usage: ...
    async def ready(self, timeout_s: float) -> bool: ...
    async def run(self, sink: Sink) -> None: ...
    async def aclose(self) -> None: ...


class Source(Protocol):
    """Starts answers."""

    async def start(self, call: Call, *, placed: Placement, size_bytes: int) -> list[Answer]:
        """One answer for each choice asked for. Raises RequestError or EngineError."""
        ...

    async def count(self, call: Call, *, placed: Placement, size_bytes: int) -> int:
        """Tokens of a call's prompt. Raises RequestError."""
        ...


class TokenSource:
    """Answers sampled by an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.preparer = Preparer(engine.tokenizer)

    async def start(self, call: Call, *, placed: Placement, size_bytes: int) -> list[Answer]:
        """Start all choices of a call; if one cannot start, none does."""
        tokenizer = self._engine.tokenizer
        prompt = await self.preparer.prepare(call, placed=placed, size_bytes=size_bytes)
        grammar = await asyncio.to_thread(self._grammar, call) if call.constrained else ""
        request = GenerateRequest(
            prompt_ids=prompt.ids,
            max_tokens=room_for(prompt, call.max_tokens, context_length=tokenizer.context_length),
            sampling=call.sampling,
            version=call.version,
            top_logprobs=call.top_logprobs,
            grammar=grammar,
        )
        answers: list[Answer] = []
        async with AsyncExitStack() as started:
            for index in range(call.n):
                answer = TokenAnswer(self._engine, call, index=index, prompt=prompt)
                sampling = choice_of(call, index).sampling
                answer.generation = await self._engine.generate(msgspec.structs.replace(request, sampling=sampling))
                started.push_async_callback(answer.aclose)
                answers.append(answer)
            started.pop_all()
        return answers

    async def count(self, call: Call, *, placed: Placement, size_bytes: int) -> int:
        """Tokens of a call's prompt."""
        return len((await self.preparer.prepare(call, placed=placed, size_bytes=size_bytes)).ids)

    def _grammar(self, call: Call) -> str:
        """What a call's answer must match. Takes milliseconds for a large schema, so it runs in a thread."""
        from clawloop_edge.engine import grammar

        if call.tool_choice.choosing is Choosing.REQUIRED:
            form = self._engine.tokenizer.tool_format
            if form is None:
                raise RequestError("this model calls no tools; leave tool_choice out", param="tool_choice")
            only = call.tool_choice.name or None
            return grammar.tool_call_grammar(form, call.tools, only=only, several=call.parallel_tools)
        schema = call.format.schema
        return grammar.json_schema_grammar(schema) if schema else grammar.json_object_grammar()


class TokenAnswer:
    """One answer, token by token."""

    generation: Generation

    def __init__(self, engine: Engine, call: Call, *, index: int, prompt: Prompt) -> None:
        tokenizer, self._line = engine.tokenizer, engine.line.line_id
        marks = tokenizer.think_marks
        self.prompt, self._index = prompt, index
        self.reply = TokenReply(
            tokenizer,
            stops=call.stops,
            tools=call.offered,
            one_call=not call.parallel_tools,
            thinking=marks is not None and prompt.text.rstrip().endswith(marks.start),
            verbatim=call.verbatim,
        )
        self._tokenizer, self._logprobs = tokenizer, call.logprobs

    @property
    def policy(self) -> Policy:
        """What samples it."""
        return self.generation.policy

    @property
    def reason(self) -> str:
        """Why nothing of it may be learned from, as far as the engine knows."""
        return self.generation.reason if self.policy.line == self._line else NOT_SAMPLED

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        cached = self.generation.cached_tokens
        return Usage(prompt=len(self.prompt.ids), completion=len(self.reply.ids), cached=cached)

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first token, or for the error that ended the call."""
        return await self.generation.ready(timeout_s)

    async def run(self, sink: Sink) -> None:
        """Deliver all of it."""
        reply, index = self.reply, self._index
        try:
            async for token in self.generation:
                pieces = reply.add(token)
                entries = [logprob_entry(self._tokenizer, token)] if self._logprobs else []
                reply.entries += entries
                await sink(Delta(index, pieces, entries, [token.token_id]))
                if reply.stopped:
                    break
        except EngineError:
            reply.ended = ENGINE_GONE
            raise
        await sink(Delta(index, reply.finish(), [], []))

    async def aclose(self) -> None:
        """Cancel the call in the engine; nothing happens if it is over."""
        await self.generation.aclose()


class TextSource:
    """Answers of a server that says only text."""

    def __init__(self, engine: TextEngine) -> None:
        self._engine = engine

    async def start(self, call: Call, *, placed: Placement, size_bytes: int) -> list[Answer]:
        """Start all choices of a call."""
        answers: list[Answer] = []
        async with AsyncExitStack() as started:
            for index in range(call.n):
                generation = await self._engine.generate_text(_text_request(choice_of(call, index)))
                answer = TextAnswer(generation, index=index, max_tokens=call.max_tokens)
                started.push_async_callback(answer.aclose)
                answers.append(answer)
            started.pop_all()
        return answers

    async def count(self, call: Call, *, placed: Placement, size_bytes: int) -> int:
        """Tokens of a call's prompt."""
        return await self._engine.count(_text_request(call))


class TextAnswer:
    """One answer, as the upstream server says it."""

    reason = INEXACT
    prompt = _NO_PROMPT

    def __init__(self, generation: TextGeneration, *, index: int, max_tokens: int) -> None:
        self._generation, self._index = generation, index
        self._room = max_tokens * _TOKEN_CHARS + _SLACK_CHARS
        self.reply = Reply()
        self.usage = Usage(prompt=0, completion=0)

    @property
    def policy(self) -> Policy:
        """What the upstream server calls its model."""
        return self._generation.policy

    async def ready(self, timeout_s: float) -> bool:
        """Wait for the first text, or for the error that ended the call."""
        return await self._generation.ready(timeout_s)

    async def run(self, sink: Sink) -> None:
        """Deliver all of it."""
        reply = self.reply
        try:
            async for part in self._generation:
                reply.entries += part.entries
                self._room -= sum(len(piece) for piece in part.pieces if isinstance(piece, str))
                if self._room < 0:
                    raise EngineError("the upstream server says more than it was asked for; its answer was ended")
                await sink(Delta(self._index, reply.take(part.pieces), part.entries, []))
                if part.finish_reason:
                    reply.ended = part.finish_reason
        except EngineError:
            reply.ended = ENGINE_GONE
            raise
        finally:
            prompt, completion, cached = self._generation.usage
            self.usage = Usage(prompt=prompt, completion=completion, cached=cached)

    async def aclose(self) -> None:
        """Close the connection to the upstream server."""
        await self._generation.aclose()


def choice_of(call: Call, index: int) -> Call:
    """One choice of a call. Choices differ, also where the call has a seed."""
    seed = call.sampling.seed
    if seed is None or not index:
        return call
    own = (seed + index + _SEEDS // 2) % _SEEDS - _SEEDS // 2
    return msgspec.structs.replace(call, sampling=msgspec.structs.replace(call.sampling, seed=own))


def _text_request(call: Call) -> TextRequest:
    return TextRequest(
        messages=call.messages,
        raw=call.raw,
        tools=call.offered,
        tool_choice=call.tool_choice.name or call.tool_choice.choosing.value,
        tool_named=bool(call.tool_choice.name),
        parallel_tools=call.parallel_tools,
        schema=call.format.schema,
        schema_name=call.format.name,
        schema_strict=call.format.strict,
        sampling=call.sampling,
        max_tokens=call.max_tokens,
        stops=call.stops,
        logprobs=call.logprobs,
        top_logprobs=call.top_logprobs,
        thinking=call.thinking,
        stream=call.stream,
        model=call.model,
    )
