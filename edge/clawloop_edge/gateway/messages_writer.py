"""Anthropic's Messages API on the wire: the whole message, and the events of a stream. Pure.

A stream's blocks come in the order in which they were sampled, each closed before the next one begins.
Reference: https://docs.anthropic.com/en/docs/build-with-claude/streaming and the `anthropic` package's types.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from clawloop_edge.engine.tool_calls import Piece, ToolCall
from clawloop_edge.gateway.call import Call, Delta, Head, Usage
from clawloop_edge.gateway.errors import Failure, Shape
from clawloop_edge.gateway.messages_request import SampledInputs, read_count, read_messages
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.settings import GatewaySettings

Json = dict[str, Any]
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
SIGNATURE = "Y2xhd2xvb3A="
"""of every thought: clients send back only thoughts that have one, and nobody reads it"""
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {"text": b'{"type":"text_delta","text":', "thinking": b'{"type":"thinking_delta","thinking":'}
_encode = msgspec.json.encode


class MessagesApi:
    """Anthropic's messages, and the count of their tokens."""

    prefix = "msg"
    shape = Shape.ANTHROPIC

    def __init__(self) -> None:
        self._inputs = SampledInputs()

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, "MakeMessagesWriter"]:
        """The call in a body, and what answers it. Raises RequestError."""
        call, body = read_messages(data, settings, inputs=self._inputs)
        return call, MakeMessagesWriter(self._inputs, thoughts_shown=body.thoughts_shown)

    def read_count(self, data: bytes, settings: GatewaySettings) -> Call:
        """The call whose tokens are to be counted. Raises RequestError."""
        return read_count(data, settings, inputs=self._inputs)


class MakeMessagesWriter:
    """Makes the writer for one body."""

    def __init__(self, inputs: SampledInputs, *, thoughts_shown: bool) -> None:
        self._inputs, self._thoughts_shown = inputs, thoughts_shown

    def __call__(self, head: Head) -> "MessagesWriter":
        return MessagesWriter(head, inputs=self._inputs, thoughts_shown=self._thoughts_shown)


class MessagesWriter:
    """One answer, as events or whole."""

    keep_alive = PING

    def __init__(self, head: Head, *, inputs: SampledInputs, thoughts_shown: bool = True) -> None:
        self._head, self._inputs, self._thoughts_shown = head, inputs, thoughts_shown
        self._index = -1
        self._open = ""  # the type of the block that is not closed yet

    def begin(self) -> bytes:
        """The message without content. What of its prompt was cached is said at the end, when it is known."""
        usage = Usage(prompt=len(self._head.prompt_ids), completion=0)
        message = {**self._message([], usage), "stop_reason": None, "stop_sequence": None}
        return _event("message_start", {"message": message})

    def delta(self, delta: Delta) -> bytes:
        """What became sure with one token."""
        return b"".join(map(self._piece, delta.pieces))

    def end(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The last block's end, why the message ended, and its usage."""
        body = {"delta": _stop(choices[0]), "usage": usage_json(usage)}
        return self._close() + _event("message_delta", body) + _event("message_stop", {})

    def error(self, failure: Failure) -> bytes:
        """An error in the middle of a stream; Anthropic's clients raise it."""
        return b"event: error\ndata: " + failure.body(Shape.ANTHROPIC) + b"\n\n"

    def whole(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The body of a call that does not stream: thoughts, text, calls."""
        reply, content = choices[0], []
        if reply.reasoning:
            thoughts = reply.reasoning if self._thoughts_shown else ""
            content.append({"type": "thinking", "thinking": thoughts, "signature": SIGNATURE})
        if reply.content:
            content.append({"type": "text", "text": reply.content})
        for call in reply.calls:
            self._inputs.note(call)
            content.append(_tool_use(call, msgspec.Raw(call.arguments.encode())))
        return _encode({**self._message(content, usage), **_stop(reply)})

    def _message(self, content: list[Json], usage: Usage) -> Json:
        return {
            "id": self._head.step_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "usage": usage_json(usage),
        }

    def _piece(self, piece: Piece) -> bytes:
        if isinstance(piece, ToolCall):
            return self._call(piece)
        if isinstance(piece, str):
            return self._into({"type": "text", "text": ""}) + self._add(piece)
        opened = self._into({"type": "thinking", "thinking": "", "signature": ""})
        return opened + (self._add(piece.text) if self._thoughts_shown else b"")

    def _call(self, call: ToolCall) -> bytes:
        self._inputs.note(call)
        opened = self._close() + self._into(_tool_use(call, {}))
        return opened + self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self._close()

    def _into(self, block: Json) -> bytes:
        """Begin a block, unless one of its type is open."""
        if self._open == block["type"]:
            return b""
        closed = self._close()
        self._open, self._index = block["type"], self._index + 1
        return closed + _event("content_block_start", {"index": self._index, "content_block": block})

    def _close(self) -> bytes:
        if not self._open:
            return b""
        is_thought, self._open = self._open == "thinking", ""
        signed = self._delta({"type": "signature_delta", "signature": SIGNATURE}) if is_thought else b""
        return signed + _event("content_block_stop", {"index": self._index})

    def _add(self, text: str) -> bytes:
        """The event of nearly every token."""
        return b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b%b}}\n\n' % (
            self._index,
            _DELTAS[self._open],
            _encode(text),
        )

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", {"index": self._index, "delta": delta})


def usage_json(usage: Usage) -> Json:
    """Anthropic's `usage`: the prompt is what was read from the cache and what was not."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _stop(reply: Reply) -> Json:
    if reply.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": reply.stopped_by}
    return {"stop_reason": _REASONS.get(reply.finish_reason, "end_turn"), "stop_sequence": None}


def _tool_use(call: ToolCall, value: Json | msgspec.Raw) -> Json:
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": value}


def _event(name: str, body: Json) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode({"type": name, **body}) + b"\n\n"
