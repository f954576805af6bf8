"""Chat completions as OpenAI puts them on the wire: the whole object, and the chunks of a stream. Pure.

What does not change within a stream is encoded once, so that a token costs a few microseconds.
"""

from typing import Any

import msgspec

from clawloop_edge.engine.tool_calls import Piece, ToolCall

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every object of one completion carries."""

    step_id: str
    created_s: int
    model: str
    fingerprint: str


def completion(head: Head, message: Json, *, finish_reason: str, usage: Json, logprobs: list[Json] | None) -> bytes:
    """The body of a call that does not stream."""
    choice = {
        "index": 0,
        "message": {**message, "refusal": None},
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
        "finish_reason": finish_reason,
    }
    return _encode(
        {
            "id": head.step_id,
            "object": "chat.completion",
            "created": head.created_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "choices": [choice],
            "usage": usage,
        }
    )


def usage_of(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int) -> Json:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Chunks:
    """Server-sent events of one stream."""

    def __init__(self, head: Head, *, include_usage: bool) -> None:
        common = {
            "id": head.step_id,
            "object": "chat.completion.chunk",
            "created": head.created_s,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._head = b"data: " + _encode(common)[:-1]
        self._open = self._head + b',"choices":[{"index":0,"delta":'
        self._close = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._calls = 0

    def role(self) -> bytes:
        """The first chunk."""
        return self._chunk(b'{"role":"assistant","content":"","refusal":null}')

    def pieces(self, pieces: list[Piece], logprobs: list[Json] | None) -> bytes:
        """What became sure with one token, and the tokens' logprobs if they were asked for."""
        deltas = [self._delta(piece) for piece in pieces]
        if logprobs and not deltas:
            deltas = [b"{}"]
        first = [self._chunk(delta, logprobs=logprobs) for delta in deltas[:1]]
        return b"".join(first + [self._chunk(delta) for delta in deltas[1:]])

    def finish(self, reason: str) -> bytes:
        """The chunk that says why it ended."""
        return self._chunk(b"{}", reason=reason)

    def usage(self, usage: Json) -> bytes:
        """The chunk after the last, with `usage` alone."""
        return self._head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"

    def _delta(self, piece: Piece) -> bytes:
        if not isinstance(piece, ToolCall):
            return b'{"content":' + _encode(piece) + b"}"
        index, self._calls = self._calls, self._calls + 1
        return _encode({"tool_calls": [{"index": index, **piece.as_openai()}]})

    def _chunk(self, delta: bytes, *, logprobs: list[Json] | None = None, reason: str | None = None) -> bytes:
        shown = b"null" if not logprobs else _encode({"content": logprobs, "refusal": None})
        end = b',"finish_reason":' + _encode(reason) + b"}]" + self._close
        return self._open + delta + b',"logprobs":' + shown + end


def error_event(body: bytes) -> bytes:
    """An error in the middle of a stream; OpenAI's clients raise it."""
    return b"data: " + body + b"\n\n"
