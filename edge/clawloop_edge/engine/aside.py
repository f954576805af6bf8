"""Asking the model that the edge serves something beside the calls of its agents: when it has nothing else to do.

Nothing of it is kept, and nothing is learned from it. Knows no question and no answer's meaning.
"""

import asyncio
import re
import time
from typing import Any

import msgspec

from clawloop_edge.engine.grammar import json_schema_grammar
from clawloop_edge.engine.protocol import Engine, GenerateRequest, TextEngine, TextRequest
from clawloop_edge.engine.thinking import ThinkSplitter
from clawloop_edge.errors import EngineBusy, RequestError
from clawloop_shared.records import Sampling

WITHIN_S = 60.0
QUIET_S = 10.0
_ROUND_S = 0.1
_TAG = re.compile(r"<(?=/?[A-Za-z_|｜])|(?<=[|｜])>|\[(?=/?[A-Z_]{2,32}\])")
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_PLAIN = {"<": "‹", ">": "›", "[": "［"}


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: messages, the JSON schema that the answer should have, and how it is sampled. `version` is the
    adapter that answers, where the edge serves the model; None: the current one, 0: none."""

    messages: list[dict[str, Any]]
    schema: dict[str, Any] | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    version: int | None = None


class LocalModel:
    """The model that this edge serves, asked on the event loop that it lives on."""

    def __init__(self, engine: Engine | TextEngine, *, within_s: float = WITHIN_S, quiet_s: float = QUIET_S) -> None:
        """`within_s` for an answer; before, up to `quiet_s` are waited for the model to have no call in flight."""
        self._engine, self._within_s, self._quiet_s = engine, within_s, quiet_s

    async def ask(self, question: Question) -> str:
        """The answer without thoughts.

        Raises:
            EngineBusy: calls are in flight.
            EngineError, RequestError: the model cannot answer this.
            TimeoutError: it took too long.
        """
        await self._quiet()
        try:
            return await self._within(question)
        except RequestError:  # an engine that cannot force a form
            if question.schema is None:
                raise
            free = msgspec.structs.replace(question, schema=None)
            return await self._within(free)

    async def _within(self, question: Question) -> str:
        async with asyncio.timeout(self._within_s):
            return await self._answer(question)

    async def _quiet(self) -> None:
        until = time.monotonic() + self._quiet_s
        while self._engine.health().in_flight:
            if time.monotonic() > until:
                raise EngineBusy("calls are in flight")
            await asyncio.sleep(_ROUND_S)

    async def _answer(self, question: Question) -> str:
        if isinstance(self._engine, TextEngine):
            return await _text_answer(self._engine, question)
        tokenizer = self._engine.tokenizer
        request = GenerateRequest(
            prompt_ids=tokenizer.encode(tokenizer.render(question.messages, None, thinking=False)),
            max_tokens=question.max_tokens,
            sampling=Sampling(temperature=question.temperature),
            version=question.version,
            grammar=await asyncio.to_thread(json_schema_grammar, question.schema) if question.schema else "",
        )
        generation = await self._engine.generate(request)
        try:
            ids = [token.token_id async for token in generation]
        finally:
            await generation.aclose()
        splitter = ThinkSplitter(tokenizer.think_marks)
        parts = [*splitter.feed(tokenizer.visible(ids)), *splitter.finish()]
        return "".join(part for part in parts if isinstance(part, str))


async def _text_answer(engine: TextEngine, question: Question) -> str:
    request = TextRequest(
        messages=question.messages,
        sampling=Sampling(temperature=question.temperature),
        max_tokens=question.max_tokens,
        schema=question.schema,
        schema_name="answer" if question.schema else "",
        thinking=False,
        stream=False,
    )
    generation = await engine.generate_text(request)
    try:
        parts = [piece async for part in generation for piece in part.pieces]
    finally:
        await generation.aclose()
    return "".join(part for part in parts if isinstance(part, str))


def unmarked(text: str) -> str:
    """A text in which nothing reads as a chat template's mark or as a tag, and nothing is invisible: as data in a
    prompt it stays data, whatever template the prompt goes through."""
    return _TAG.sub(lambda match: _PLAIN[match.group()], visible(text))


def visible(text: str) -> str:
    """A text without what nobody sees in it. To be done before a text is redacted: a secret with an invisible character
    in it is not known for one, and would be whole again afterwards."""
    return _UNSEEN.sub("", text)


def shortened(text: str, most_chars: int) -> str:
    """The head and the tail of a text that is too long, and how much is left out between them."""
    if len(text) <= most_chars:
        return text
    head = most_chars * 2 // 3
    tail = most_chars - head
    return f"{text[:head]}\n[... {len(text) - most_chars} characters left out ...]\n{text[-tail:]}"
