"""OpenAI's legacy completions: a prompt of text or token ids, continued word for word.

Knows no chat: nothing is rendered, thoughts and tool calls are text like any other. Pure.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import (
    CallBody,
    Json,
    One,
    Refused,
    Stop,
    Stops,
    Zero,
    pinned_version,
    read_body,
    stop_strings,
    unsupported,
)
from clawloop_edge.gateway.call import Call, Delta, Head, Usage
from clawloop_edge.gateway.chat_request import (
    Choices,
    Count,
    MinP,
    Seed,
    StreamOptions,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
    sampling_of,
)
from clawloop_edge.gateway.chat_writer import COMMENT, DONE, usage_json
from clawloop_edge.gateway.errors import Failure, Shape
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.settings import GatewaySettings

_DEFAULT_MAX_TOKENS = 16
_UNSUPPORTED = ("suffix", "logit_bias", "echo", "presence_penalty", "frequency_penalty")
_TEXT: Json = {"type": "string", "minLength": 1}
_IDS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS: list[Json] = [
    _TEXT,
    _IDS,
    *({"type": "array", "items": one, "minItems": 1, "maxItems": 1} for one in (_TEXT, _IDS)),
]
"""one prompt, or a list of one"""
_encode = msgspec.json.encode


class CompletionBody(CallBody):
    """What a completions call may say; further fields are ignored."""

    prompt: Annotated[str | list[Any], Meta(extra_json_schema={"oneOf": _PROMPTS})]
    model: str = "clawloop"
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: TopLogprobs | None = None
    return_token_ids: bool | None = None
    echo: Refused = None
    suffix: Refused = None
    logit_bias: Refused = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    repetition_penalty: One = None


class CompletionsApi:
    """OpenAI's legacy completions, with vLLM's `return_token_ids`."""

    prefix = "cmpl"
    shape = Shape.OPENAI

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, "MakeCompletionWriter"]:
        """The call in a body, and what answers it. Raises RequestError."""
        body = read_body(data, CompletionBody)
        return read_completion(body, settings), MakeCompletionWriter(body)


def read_completion(body: CompletionBody, settings: GatewaySettings) -> Call:
    """The call that a body asks for.

    Raises:
        RequestError: no prompt or several, or a field that would change the answer and is not supported.
    """
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise unsupported(name, f"{name} is not supported")
    if body.repetition_penalty not in (None, 1):
        raise unsupported("repetition_penalty", "repetition_penalty is not supported")
    return Call(
        messages=[],
        raw=_prompt(body.prompt),
        verbatim=True,
        sampling=sampling_of(
            settings,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
        ),
        max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
        stops=stop_strings(body.stop),
        stream=bool(body.stream),
        n=body.n or 1,
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        model=body.model,
        version=pinned_version(body.model),
    )


def _prompt(given: str | list[Any]) -> str | list[int]:
    """The one prompt of a body: text, ids, or a list with one of these."""
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise unsupported("prompt", f"prompt holds {len(given)} prompts; send one a call, they run side by side")
        given = given[0]
    if isinstance(given, str):
        return given
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in given):
        raise RequestError("prompt must be text or a list of token ids", param="prompt", code="invalid_type")
    return given


class MakeCompletionWriter:
    """Makes the writer for one body."""

    def __init__(self, body: CompletionBody) -> None:
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._ids, self._logprobs = bool(body.return_token_ids), body.logprobs

    def __call__(self, head: Head) -> "CompletionWriter":
        return CompletionWriter(head, include_usage=self._usage, token_ids=self._ids, logprobs=self._logprobs)


class CompletionWriter:
    """One answer, as chunks or whole. `logprobs`: how many of the likeliest tokens are shown; None shows none."""

    keep_alive = COMMENT

    def __init__(
        self, head: Head, *, include_usage: bool = False, token_ids: bool = False, logprobs: int | None = None
    ) -> None:
        self._about, self._include_usage = head, include_usage
        self._token_ids, self._logprobs = token_ids, logprobs
        self._offsets: dict[int, Offsets] = {}

    def begin(self) -> bytes:
        """Nothing: the first chunk is that of the first token."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """The chunk of one token; none if it adds nothing that can be shown yet."""
        text = "".join(_shown(piece) for piece in delta.pieces)
        first = delta.index not in self._offsets
        offsets = self._offsets.setdefault(delta.index, Offsets())
        logprobs = self._legacy(delta.entries, offsets=offsets, text=text) if delta.entries else None
        more: Json = {}
        if self._token_ids:
            more = {"prompt_token_ids": self._about.prompt_ids if first else None, "token_ids": delta.ids}
        if not (text or logprobs or (self._token_ids and delta.ids)):
            return b""
        return self._chunk([{**_choice(delta.index, text, None, logprobs), **more}])

    def end(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The chunks that say why it ended, the usage if it was asked for, and the end mark."""
        ends = (_choice(index, "", reply.finish_reason, None) for index, reply in enumerate(choices))
        out = b"".join(self._chunk([end]) for end in ends)
        if self._include_usage:
            out += self._chunk([], usage=usage)
        return out + DONE

    def error(self, failure: Failure) -> bytes:
        """An error in the middle of a stream; OpenAI's clients raise it."""
        return b"data: " + failure.body() + b"\n\n"

    def whole(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        shown = [self._whole_choice(index, reply) for index, reply in enumerate(choices)]
        return _encode({**self._common(), "choices": shown, "usage": usage_json(usage)})

    def _whole_choice(self, index: int, reply: Reply) -> Json:
        wanted = self._logprobs is not None
        logprobs = self._legacy(reply.entries, offsets=Offsets(), text=reply.content) if wanted else None
        choice = _choice(index, reply.content, reply.finish_reason, logprobs)
        if self._token_ids:
            choice |= {"prompt_token_ids": self._about.prompt_ids, "token_ids": reply.ids}
        return choice

    def _legacy(self, entries: Sequence[Json], *, offsets: "Offsets", text: str) -> Json:
        offsets.text += text
        top = [_likeliest(entry) for entry in entries] if self._logprobs else None
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": top,
            "text_offset": [offsets.place(entry["token"]) for entry in entries],
        }

    def _common(self) -> Json:
        head = self._about
        return {
            "id": head.step_id,
            "object": "text_completion",
            "created": head.created_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    def _chunk(self, choices: list[Json], *, usage: Usage | None = None) -> bytes:
        chunk = {**self._common(), "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage_json(usage) if usage else None
        return b"data: " + _encode(chunk) + b"\n\n"


class Offsets:
    """Where each token begins in the text that was delivered. Half a character, and a token that is not in the text
    (the end token, what a stop string cut off), begin where the text before them ends."""

    def __init__(self) -> None:
        self.text = ""
        self._at = 0

    def place(self, token: str) -> int:
        """The character at which the next token begins."""
        found = self.text.find(token, self._at) if token and "\ufffd" not in token else -1
        if found < 0:
            return self._at
        self._at = found + len(token)
        return found


def _choice(index: int, text: str, reason: str | None, logprobs: Json | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _shown(piece: object) -> str:
    return piece.text if isinstance(piece, Reasoning) else piece if isinstance(piece, str) else ""


def _likeliest(entry: Json) -> dict[str, float]:
    """The likeliest tokens at one place, and the sampled one if it is not among them."""
    return {top["token"]: top["logprob"] for top in [*entry["top_logprobs"], entry]}
