"""Any OpenAI-compatible server as a `TextEngine`: served and kept, never trainable, since it gives no token ids.

It renders prompts and reads tool calls itself. Its words are brought to our pieces: tool calls are joined from their
deltas and get ids of ours, which all clients accept; one whose arguments are no JSON object is delivered as text.
"""

from typing import Any

import msgspec

from clawloop_edge.engine.protocol import EngineHealth, TextGeneration, TextPart, TextRequest
from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.engine.tool_calls import Piece, ToolCall, new_call_id
from clawloop_edge.engine.upstream_call import Post, UpstreamCall
from clawloop_edge.engine.upstream_http import Upstream, decode, token_count
from clawloop_edge.errors import EngineError, RequestError
from clawloop_shared.files import sha256
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy

Json = dict[str, Any]
_CUT_SHORT = {"length", "max_tokens"}
_ARGUMENTS = msgspec.json.Decoder(dict[str, Any])


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | Json | None = None


class _CallDelta(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _Choice(msgspec.Struct, gc=False):
    """One of a stream (`delta`), of a whole reply (`message`), or of a completion of a raw prompt (`text`)."""

    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw()
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Reply(msgspec.Struct, gc=False):
    """A chunk of a stream, or a whole reply."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _ChatLogprobs(msgspec.Struct):
    content: list[Json] | None = None


class _RawLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Count(msgspec.Struct):
    count: int


_REPLY = msgspec.json.Decoder(_Reply)
_CHAT_LOGPROBS = msgspec.json.Decoder(_ChatLogprobs | None)
_RAW_LOGPROBS = msgspec.json.Decoder(_RawLogprobs | None)


class UpstreamTextEngine:
    """A `TextEngine` on one server. Make one with `engine.upstream.open_upstream`."""

    line: ModelLine

    def __init__(self, upstream: Upstream, model: str, *, context_length: int = 0, note: str = "") -> None:
        """`note` is said in `health`, such as why a server is not taken as exact."""
        self._upstream, self._model, self._note = upstream, model, note
        self._policy = Policy(f"upstream:{model}")
        self._context_length = context_length
        self.line = ModelLine(base_sha256=sha256(self._policy.line.encode()), tokenizer_sha256="", template_sha256="")

    @property
    def policy(self) -> Policy:
        """What all calls get; its line is none that is trained."""
        return self._policy

    @property
    def context_length(self) -> int:
        """What the server said of its context when this began; 0 if nothing."""
        return self._context_length

    async def generate_text(self, request: TextRequest) -> TextGeneration:
        """Start a call; what the server or the way to it has against it is raised where the answer is awaited."""
        path = "chat/completions" if request.raw is None else "completions"
        body = msgspec.json.encode(_body(request, self._model, openai=self._upstream.is_openai))
        return _TextCall(self._policy, self._upstream, post=lambda: self._upstream.post(path, body), request=request)

    async def count(self, request: TextRequest) -> int:
        """Tokens of a prompt, as vLLM's `/tokenize` counts them. Raises RequestError: this server cannot."""
        if isinstance(request.raw, list):
            return len(request.raw)
        prompt: Json = {"prompt": request.raw} if request.raw is not None else {"messages": request.messages}
        if request.tools and request.raw is None:
            prompt["tools"] = request.tools
        try:
            return (await self._upstream.ask("/tokenize", {"model": self._model, **prompt}, _Count)).count
        except RequestError as error:
            if error.status not in (404, 405):
                raise
            raise RequestError("the upstream server cannot count tokens (it has no /tokenize)", status=404) from error

    def health(self) -> EngineHealth:
        """Whether the server can be reached, as far as calls have shown."""
        detail = self._upstream.trouble or self._note
        return EngineHealth(self._upstream.alive, self._upstream.in_flight, [0], detail)

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        await self._upstream.close()


class _TextCall(UpstreamCall[TextPart]):
    """A `TextGeneration`."""

    def __init__(self, policy: Policy, upstream: Upstream, *, post: Post, request: TextRequest) -> None:
        super().__init__(policy, upstream, post=post)
        self.usage = (0, 0, 0)
        self._logprobs, self._raw = request.logprobs, request.raw is not None
        self._calls = _CallJoiner()
        self._reason: str | None = None

    def _read(self, events: list[bytes]) -> list[TextPart]:
        parts = [part for event in events if (part := self._part(decode(event, _REPLY))) is not None]
        if len(parts) < 2 or self._logprobs:  # each text stays beside its own logprobs
            return parts
        return [TextPart([piece for part in parts for piece in part.pieces])]

    def _read_whole(self, data: bytes) -> list[TextPart]:
        part = self._part(decode(data, _REPLY)) or TextPart([])
        if self._reason is None:
            raise EngineError("the upstream server's reply holds no answer that has ended")
        return [TextPart(part.pieces + self._calls.finish(), part.entries, self._reason)]

    def _finish(self) -> list[TextPart]:
        if self._reason is None and not self.said_done:
            raise EngineError("the upstream server's answer was cut off before its end")
        return [TextPart(self._calls.finish(), finish_reason=self._reason or "stop")]

    def _part(self, reply: _Reply) -> TextPart | None:
        if reply.error:
            raise self._upstream.failure(reply.error)
        if reply.usage is not None:
            self.usage = _usage(reply.usage)
        if not reply.choices:
            return None
        choice = reply.choices[0]
        if choice.finish_reason:
            self._reason = "length" if choice.finish_reason in _CUT_SHORT else "stop"
        message = choice.delta or choice.message
        pieces: list[Piece] = [choice.text] if choice.text else []
        if message is not None:
            pieces = _pieces(message)
            if message.tool_calls:
                self._calls.add(message.tool_calls)
        entries = self._entries(bytes(choice.logprobs) or b"null") if self._logprobs else []
        return TextPart(pieces, entries) if pieces or entries else None

    def _entries(self, data: bytes) -> list[Json]:
        if self._raw:
            return _raw_entries(decode(data, _RAW_LOGPROBS) or _RawLogprobs())
        found = decode(data, _CHAT_LOGPROBS)
        return (found and found.content) or []


class _CallJoiner:
    """Joins the deltas of tool calls. A call is given out when all is said: a client cannot use a part of one, and
    deltas of several may alternate."""

    def __init__(self) -> None:
        self._calls: list[_Joined] = []

    def add(self, deltas: list[_CallDelta]) -> None:
        """Take some deltas."""
        for delta in deltas:
            call = self._of(delta)
            function = delta.function
            if function is None:
                continue
            call.name = call.name or function.name or ""
            arguments = function.arguments
            if arguments is not None:
                call.parts.append(arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode())

    def finish(self) -> list[Piece]:
        """The whole calls, in order; what is no call that can be made is text."""
        return [call.piece() for call in self._calls]

    def _of(self, delta: _CallDelta) -> "_Joined":
        same = [call for call in self._calls if delta.index is None or call.index == delta.index]
        found = same[-1] if same else None
        if found is None or (delta.id and found.call_id and delta.id != found.call_id):  # some say index 0 for all
            found = _Joined(delta.index, delta.id)
            self._calls.append(found)
        found.call_id = found.call_id or delta.id
        return found


class _Joined:
    def __init__(self, index: int | None, call_id: str | None) -> None:
        self.index, self.call_id = index, call_id
        self.name = ""
        self.parts: list[str] = []

    def piece(self) -> Piece:
        said = "".join(self.parts)
        arguments = said if said.strip() else "{}"
        try:
            _ARGUMENTS.decode(arguments)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            return msgspec.json.encode({"name": self.name, "arguments": arguments}).decode()
        if not self.name:
            return arguments
        return ToolCall(new_call_id(), self.name, arguments)


def _pieces(message: _Message) -> list[Piece]:
    found: list[Piece] = []
    thought = message.reasoning_content or message.reasoning
    if thought:
        found.append(Reasoning(thought))
    text = message.content or message.refusal
    if text:
        found.append(text)
    return found


def _usage(usage: _Usage) -> tuple[int, int, int]:
    prompt, details = token_count(usage.prompt_tokens), usage.prompt_tokens_details
    cached = token_count(details.cached_tokens) if details else 0
    return prompt, token_count(usage.completion_tokens), min(cached, prompt)


def _raw_entries(logprobs: _RawLogprobs) -> list[Json]:
    """The logprobs of a completion in the shape that a chat has."""
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    rows = zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
    return [
        {**_entry(token, logprob), "top_logprobs": [_entry(*pair) for pair in (top or {}).items()]}
        for token, logprob, top in rows
    ]


def _entry(token: str, logprob: float | None) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _body(request: TextRequest, model: str, *, openai: bool) -> Json:
    """The request as the server's API has it; what nobody asked for is left out, so that the server's own holds."""
    sampling = request.sampling
    body: Json = {"model": model, "temperature": sampling.temperature}
    body["max_completion_tokens" if openai and request.raw is None else "max_tokens"] = request.max_tokens
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    optional = {
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "seed": sampling.seed,
        "stop": list(request.stops) or None,
        "response_format": _response_format(request),
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    return body | (_raw_part(request) if request.raw is not None else _chat_part(request))


def _raw_part(request: TextRequest) -> Json:
    part: Json = {"prompt": request.raw}
    return part | {"logprobs": request.top_logprobs} if request.logprobs else part


def _chat_part(request: TextRequest) -> Json:
    part: Json = {"messages": request.messages}
    if request.tools:
        named = {"type": "function", "function": {"name": request.tool_choice}}
        part |= {"tools": request.tools, "tool_choice": named if request.tool_named else request.tool_choice}
        if not request.parallel_tools:
            part["parallel_tool_calls"] = False
    if request.logprobs:
        part |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.thinking is not None:
        part["chat_template_kwargs"] = {"enable_thinking": request.thinking}
    return part


def _response_format(request: TextRequest) -> Json | None:
    if request.schema is None:
        return None
    if not request.schema:
        return {"type": "json_object"}
    named = {"name": request.schema_name or "answer", "schema": request.schema, "strict": request.schema_strict}
    return {"type": "json_schema", "json_schema": named}
