"""Chat completions as OpenAI puts them on the wire: the whole object, and the chunks of a stream. Pure.

What does not change within a stream is encoded once, so that a token costs a few microseconds.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.engine.tool_calls import Piece, ToolCall
from clawloop_edge.gateway.call import Call, Delta, Head, Usage
from clawloop_edge.gateway.chat_request import ChatBody, read_chat
from clawloop_edge.gateway.errors import Failure, Shape
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.settings import GatewaySettings

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
"""what clients of server-sent events pass over"""
_encode = msgspec.json.encode


class ChatApi:
    """OpenAI's chat completions, with vLLM's `return_token_ids`."""

    prefix = "chatcmpl"
    shape = Shape.OPENAI

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, "MakeChatWriter"]:
        """The call in a body, and what answers it. Raises RequestError."""
        call, body = read_chat(data, settings)
        return call, MakeChatWriter(body)


class MakeChatWriter:
    """Makes the writer for one body."""

    def __init__(self, body: ChatBody) -> None:
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._ids, self._logprobs = bool(body.return_token_ids), bool(body.logprobs)

    def __call__(self, head: Head) -> "ChatWriter":
        return ChatWriter(head, include_usage=self._usage, token_ids=self._ids, logprobs=self._logprobs)


class ChatWriter:
    """One answer, as chunks or whole."""

    keep_alive = COMMENT

    def __init__(
        self, head: Head, *, include_usage: bool = False, token_ids: bool = False, logprobs: bool = False
    ) -> None:
        self._about, self._include_usage = head, include_usage
        self._token_ids, self._logprobs = token_ids, logprobs
        self._head = b"data: " + _encode(self._common("chat.completion.chunk"))[:-1]
        self._open = self._head + b',"choices":[{"index":'
        self._close = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._calls: dict[int, int] = {}
        self._begun: set[int] = set()

    def begin(self) -> bytes:
        """What comes first. The role is said once, since clients join what they see, and a first delta may have it."""
        prompt = self._head + b',"choices":[],"prompt_token_ids":' + _encode(self._about.prompt_ids) + b"}\n\n"
        return (prompt if self._token_ids else b"") + (b"" if 0 in self._begun else self._role(0))

    def delta(self, delta: Delta) -> bytes:
        """What became sure with one token, and its logprob if it was asked for."""
        deltas = [self._piece(delta.index, piece) for piece in delta.pieces]
        extra = b',"token_ids":' + _encode(delta.ids) if self._token_ids else b""
        if (delta.entries or extra) and not deltas:
            deltas = [b"{}"]
        out = b"" if delta.index in self._begun else self._role(delta.index)
        for number, body in enumerate(deltas):
            out += self._chunk(
                delta.index, body, entries=[] if number else delta.entries, extra=b"" if number else extra
            )
        return out

    def end(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The chunks that say why it ended, the usage if it was asked for, and the end mark."""
        out = b"".join(self._chunk(index, b"{}", reason=reply.finish_reason) for index, reply in enumerate(choices))
        if self._include_usage:
            out += self._head + b',"choices":[],"usage":' + _encode(usage_json(usage)) + b"}\n\n"
        return out + DONE

    def error(self, failure: Failure) -> bytes:
        """An error in the middle of a stream; OpenAI's clients raise it."""
        return b"data: " + failure.body() + b"\n\n"

    def whole(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        shown = [self._choice(index, reply) for index, reply in enumerate(choices)]
        body = {**self._common("chat.completion"), "choices": shown, "usage": usage_json(usage)}
        if self._token_ids:
            body["prompt_token_ids"] = self._about.prompt_ids
        return _encode(body)

    def _common(self, kind: str) -> Json:
        head = self._about
        return {
            "id": head.step_id,
            "object": kind,
            "created": head.created_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    def _choice(self, index: int, reply: Reply) -> Json:
        choice: Json = {
            "index": index,
            "message": {**reply.message(), "refusal": None},
            "logprobs": {"content": reply.entries, "refusal": None} if self._logprobs else None,
            "finish_reason": reply.finish_reason,
        }
        if self._token_ids:
            choice["token_ids"] = reply.ids
        return choice

    def _role(self, index: int) -> bytes:
        self._begun.add(index)
        return self._chunk(index, b'{"role":"assistant","content":"","refusal":null}')

    def _piece(self, index: int, piece: Piece) -> bytes:
        if isinstance(piece, ToolCall):
            number = self._calls.get(index, 0)
            self._calls[index] = number + 1
            return _encode({"tool_calls": [{"index": number, **piece.as_openai()}]})
        if isinstance(piece, Reasoning):
            return b'{"reasoning_content":' + _encode(piece.text) + b"}"
        return b'{"content":' + _encode(piece) + b"}"

    def _chunk(
        self,
        index: int,
        delta: bytes,
        *,
        entries: list[Json] | None = None,
        reason: str | None = None,
        extra: bytes = b"",
    ) -> bytes:
        shown = b"null" if not entries else _encode({"content": entries, "refusal": None})
        end = b',"finish_reason":' + _encode(reason) + extra + b"}]" + self._close
        return b'%b%d,"delta":%b,"logprobs":%b%b' % (self._open, index, delta, shown, end)


def usage_json(usage: Usage) -> Json:
    """OpenAI's `usage` of chat and legacy completions."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
