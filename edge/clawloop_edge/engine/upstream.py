"""A server that returns token ids and logprobs (vLLM with `return_token_ids`) as an exact `Engine`.

The gateway renders and splices the prompt's ids itself, by the tokenizer and template of a local model folder; the
server only computes. What a reply lacks is never made up: a logprob that is missing is NaN, and its step is not trained
on. Adapters are loaded through vLLM's own endpoints, each under a name of its own.

Source of the requests and replies: vLLM's documentation, as docs/upstream.md says in detail.
"""

import asyncio
import logging
import math
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from clawloop_edge.engine.protocol import ChatTokenizer, EngineHealth, GenerateRequest, Generation, Token
from clawloop_edge.engine.upstream_adapters import AdapterLoader
from clawloop_edge.engine.upstream_call import UpstreamCall
from clawloop_edge.engine.upstream_http import Upstream, decode, token_count
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.engine.versions import Versions
from clawloop_edge.errors import EngineError, PromptTooLong, RequestError
from clawloop_shared.errors import AdapterInvalid, ClawloopError
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy, Sampling

_LOG = logging.getLogger(__name__)
Json = dict[str, Any]
_LOWEST = -9999.0
"""what vLLM writes for minus infinity"""
_TOKEN_ID = "token_id:"
"""how vLLM names a token that it is asked to name by id"""
RAW = "logprobs are not those of the sampled temperature"
NO_IDS = "the upstream server gave no token ids"
OTHER_PROMPT = "the upstream server did not take the prompt as it was sent"


class _Logprobs(msgspec.Struct, gc=False):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _PromptLogprob(msgspec.Struct, gc=False):
    logprob: float | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str = ""
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: list[dict[str, _PromptLogprob] | None] | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Cached | None = None


class Completion(msgspec.Struct, gc=False):
    """A chunk of a stream, or a whole reply, as far as we read it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_COMPLETION = msgspec.json.Decoder(Completion)


class UpstreamEngine:
    """An `Engine` on one server. Make one with `open_upstream`."""

    line: ModelLine
    tokenizer: ChatTokenizer

    def __init__(
        self,
        upstream: Upstream,
        model: str,
        *,
        line: ModelLine,
        tokenizer: ChatTokenizer,
        settings: UpstreamSettings,
        keep_versions: int,
    ) -> None:
        """`model` is the base's name at the server; `keep_versions` adapters stay loaded there."""
        self.line, self.tokenizer = line, tokenizer
        self._upstream, self._model = upstream, model
        self._raw_logprobs = settings.logprobs == "raw"
        self._versions = Versions(Policy(line.line_id), model, keep=keep_versions)
        self._cleaning: set[asyncio.Task[None]] = set()
        self._adapters = AdapterLoader(upstream, Path(settings.adapter_folder)) if settings.adapters == "vllm" else None

    @property
    def policy(self) -> Policy:
        """What a call that asks for no version gets now."""
        return self._versions.current

    def policy_of(self, version: int) -> Policy:
        """The policy of a loaded version. Raises UnknownVersion."""
        return self._versions.policy(version)

    async def generate(self, request: GenerateRequest) -> Generation:
        """Start a call; what the server has against it is raised where the answer is awaited.

        Raises:
            PromptTooLong: there is no room for a token.
            UnknownVersion: no such version is loaded.
            RequestError: the answer is to be forced into a form.
        """
        if request.grammar:
            raise RequestError(
                "response_format and a required tool call are not supported before an exact upstream server; "
                'set [upstream] ids = "off" to have the server do it',
                code="unsupported",
            )
        if len(request.prompt_ids) >= self.tokenizer.context_length:
            held = self.tokenizer.context_length
            raise PromptTooLong(f"prompt of {len(request.prompt_ids)} tokens; the model's context holds {held}")
        policy = self._versions.pin(request.version)
        return _TokenCall(self, policy, request=request, reason=self._reason(request.sampling))

    async def load(self, policy: Policy, files: dict[str, bytes]) -> None:
        """Make a verified adapter ready at the server, beside the ones loaded.

        Raises:
            AdapterInvalid: it is for another line, or the server refuses it.
            EngineError: adapters are off, the server cannot load any, or the number is taken by other weights.
        """
        if self._adapters is None:
            raise EngineError(f"adapter {policy.version} is not loaded: [upstream] adapters is off")
        if policy.line != self.line.line_id:
            raise AdapterInvalid(f"adapter {policy.version} is for model line {policy.line}, not {self.line.line_id}")
        await self._adapters.load(policy, files)
        try:
            dropped = self._versions.add(policy, self._adapters.name_of(policy))
        except EngineError:
            await self._adapters.unload(policy)
            raise
        await self._forget(dropped)

    async def unload(self, version: int) -> None:
        """Forget a loaded version; its calls in flight finish first. Raises UnknownVersion or EngineError."""
        await self._forget(self._versions.unload(version))

    async def use(self, version: int) -> Policy:
        """Make a loaded version (0: the base) the current one. Raises UnknownVersion."""
        await self._forget(self._versions.use(version))
        return self._versions.policy(version)

    async def score(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        *,
        version: int,
        temperature: float = 1.0,
        exact: bool = False,
    ) -> list[float]:
        """Teacher-forced logprobs of the response, from vLLM's `prompt_logprobs`; NaN where it gives none.

        They are never `exact`: the server computes in its own precision.

        Raises:
            UnknownVersion: no such version is loaded.
            EngineError: another temperature than 1, which the server has no logprobs of.
        """
        if temperature != 1.0:
            raise EngineError(f"an upstream server scores at temperature 1, not at {temperature}; use the mlx engine")
        policy = self._versions.pin(version)
        ids = prompt_ids + response_ids
        body = {
            "model": self._name_of(policy),
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        try:
            response = await self._post(policy, msgspec.json.encode(body))
            async with response:
                reply = decode(await self._upstream.whole(response), _COMPLETION)
        finally:
            self._release(policy)
        found = (reply.choices[0].prompt_logprobs if reply.choices else None) or []
        if len(found) != len(ids):
            raise EngineError(f"the upstream server gave {len(found)} prompt logprobs for {len(ids)} tokens")
        entries = zip(found[len(prompt_ids) :], response_ids, strict=True)
        return [_logprob(entry[str(i)].logprob) if entry and str(i) in entry else math.nan for entry, i in entries]

    async def forget_prompts(self) -> None:
        """Does nothing: what is kept of prompts is in the server's memory, which is its own."""

    def health(self) -> EngineHealth:
        """Whether the server can be reached, as far as calls have shown."""
        upstream = self._upstream
        return EngineHealth(upstream.alive, upstream.in_flight, self._versions.numbers(), upstream.trouble)

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone. Adapters stay loaded at the server."""
        await self._upstream.close()
        for task in self._cleaning:
            task.cancel()
        await asyncio.gather(*self._cleaning, return_exceptions=True)

    def _reason(self, sampling: Sampling) -> str:
        return RAW if self._raw_logprobs and sampling.temperature != 1.0 else ""

    def _name_of(self, policy: Policy) -> str:
        return str(self._versions.model_of(policy.version))

    async def _post(self, policy: Policy, body: bytes) -> aiohttp.ClientResponse:
        """Send a request; a server that was started anew gets the adapter again."""
        try:
            return await self._upstream.post("completions", body)
        except RequestError as error:
            if error.status != 404 or not policy.version or self._adapters is None:
                raise
            await self._adapters.reload(policy)
            return await self._upstream.post("completions", body)

    def _release(self, policy: Policy) -> None:
        dropped = self._versions.unpin(policy)
        if dropped:
            task = asyncio.get_running_loop().create_task(self._forget(dropped))
            self._cleaning.add(task)
            task.add_done_callback(self._cleaning.discard)

    async def _forget(self, dropped: list[Policy]) -> None:
        for policy in dropped:
            try:
                if self._adapters is not None:
                    await self._adapters.unload(policy)
            except ClawloopError as error:  # it serves no call any more; what stays is some memory of the server's
                _LOG.warning("adapter %d stays loaded at the upstream server: %s", policy.version, error)


class _TokenCall(UpstreamCall[Token]):
    """A `Generation`."""

    def __init__(self, engine: UpstreamEngine, policy: Policy, *, request: GenerateRequest, reason: str) -> None:
        body = msgspec.json.encode(_body(request, engine._name_of(policy), stops=sorted(engine.tokenizer.eos_ids)))
        self.cached_tokens = 0
        self.reason = reason
        self._engine, self._request, self._room = engine, request, request.max_tokens
        self._begun = self._ended = False
        super().__init__(policy, engine._upstream, post=lambda: engine._post(policy, body))

    def _release(self) -> None:
        self._engine._release(self.policy)

    def _read(self, events: list[bytes]) -> list[Token]:
        return [token for event in events for token in self._tokens(decode(event, _COMPLETION))]

    def _read_whole(self, data: bytes) -> list[Token]:
        return self._read([data]) + self._finish()

    def _finish(self) -> list[Token]:
        if not self._ended:
            raise EngineError("the upstream server's answer was cut off before its end")
        return []

    def _tokens(self, chunk: Completion) -> list[Token]:
        if chunk.error:
            raise self._upstream.failure(chunk.error)
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = token_count(chunk.usage.prompt_tokens_details.cached_tokens)
            self.cached_tokens = min(cached, len(self._request.prompt_ids))
        if not chunk.choices or self._ended:
            return []
        choice = chunk.choices[0]
        if not self._begun:
            self._begun = True
            if choice.prompt_token_ids != self._request.prompt_ids:
                self.reason = self.reason or OTHER_PROMPT
        tokens = self._sampled(choice)
        self._room -= len(tokens)
        if self._room < 0:
            raise EngineError(f"the upstream server samples more than the {self._request.max_tokens} tokens asked for")
        if choice.finish_reason is None:
            return tokens
        if choice.finish_reason not in ("stop", "length"):
            raise EngineError(f"the upstream server ended the answer with {choice.finish_reason[:40]!r}")
        self._ended = True
        tokens = tokens or [Token(min(self._engine.tokenizer.eos_ids), math.nan)]  # shows nothing and teaches nothing
        return [*tokens[:-1], msgspec.structs.replace(tokens[-1], finish_reason=choice.finish_reason)]

    def _sampled(self, choice: _Choice) -> list[Token]:
        ids, logprobs = choice.token_ids, choice.logprobs
        if ids is None:
            if choice.text:
                self.reason = self.reason or NO_IDS
            return [Token(i, math.nan) for i in self._engine.tokenizer.encode(choice.text)]
        if ids and not 0 <= min(ids) <= max(ids) < self._engine.tokenizer.vocab_size:
            raise EngineError("the upstream server gave a token id that is outside the model's vocabulary")
        if logprobs is None or len(logprobs.token_logprobs) != len(ids):
            return [Token(i, math.nan) for i in ids]
        tops = logprobs.top_logprobs if self._request.top_logprobs else None
        if tops is None or len(tops) != len(ids):
            return [Token(i, _logprob(value)) for i, value in zip(ids, logprobs.token_logprobs, strict=True)]
        rows = zip(ids, logprobs.token_logprobs, tops, strict=True)
        return [Token(i, _logprob(value), None, _top(top, self._request.top_logprobs)) for i, value, top in rows]


def _logprob(value: float | None) -> float:
    """What the server says, or NaN where that is no logprob of something that was sampled."""
    return value if value is not None and math.isfinite(value) and value > _LOWEST else math.nan


def _top(found: dict[str, float | None] | None, count: int) -> tuple[tuple[int, float], ...]:
    """vLLM adds the sampled token to the likeliest, and says no order."""
    named = [
        (int(name.removeprefix(_TOKEN_ID)), value)
        for name, value in (found or {}).items()
        if value is not None and name.removeprefix(_TOKEN_ID).isdecimal()
    ]
    return tuple(sorted(named, key=lambda pair: -pair[1])[:count])


def sampling_fields(sampling: Sampling, *, stops: list[int]) -> Json:
    """Every field that bends the distribution is said: vLLM takes what is missing from the model's own
    `generation_config.json`, and the logprobs would be those of a sampler that nobody asked for."""
    fields = {
        "add_special_tokens": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": stops,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return fields if sampling.seed is None else {**fields, "seed": sampling.seed}


def _body(request: GenerateRequest, model: str, *, stops: list[int]) -> Json:
    return {
        **sampling_fields(request.sampling, stops=stops),
        "model": model,
        "prompt": request.prompt_ids,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": request.max_tokens,
        "logprobs": request.top_logprobs,
    }
