"""Responses as OpenAI puts them on the wire: the whole object, and the events of a stream. Pure.

What does not change within a stream is encoded once, so that a token costs a few microseconds.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from clawloop_edge.engine.thinking import Reasoning
from clawloop_edge.gateway.call import Call, Delta, Head, Usage
from clawloop_edge.gateway.chat_writer import COMMENT
from clawloop_edge.gateway.errors import Failure, Shape
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.responses_items import (
    LENGTH,
    SAID,
    THOUGHT,
    Event,
    Output,
    TextKind,
    text_entries,
    whole_output,
)
from clawloop_edge.gateway.responses_request import ResponsesBody, read_responses
from clawloop_edge.gateway.settings import GatewaySettings

Json = dict[str, Any]
_OPENING = ("response.created", "response.in_progress")
"""the first events of every stream"""
_encode = msgspec.json.encode


class ResponsesApi:
    """OpenAI's Responses, with function tools. Answers are not kept to be fetched."""

    prefix = "resp"
    shape = Shape.OPENAI

    def read(self, data: bytes, settings: GatewaySettings) -> tuple[Call, "MakeResponsesWriter"]:
        """The call in a body, and what answers it. Raises RequestError."""
        call, body = read_responses(data, settings)
        return call, MakeResponsesWriter(call, body)


class MakeResponsesWriter:
    """Makes the writer for one call."""

    def __init__(self, call: Call, body: ResponsesBody) -> None:
        self._asked, self._logprobs = _asked(call, body), call.logprobs

    def __call__(self, head: Head) -> "ResponsesWriter":
        return ResponsesWriter(head, asked=self._asked, logprobs=self._logprobs)


class ResponsesWriter:
    """One answer, as events or whole."""

    keep_alive = COMMENT

    def __init__(self, head: Head, *, asked: Json, logprobs: bool = False) -> None:
        """`asked`: what the response says of the call that it answers."""
        about = {"id": head.step_id, "object": "response", "created_at": head.created_s, "model": head.model}
        self._about = _encode({**about, **asked})[:-1]
        self._step_id, self._logprobs = head.step_id, logprobs
        self._output = Output(head.step_id)
        self._unsaid: list[Json] = []  # logprobs of tokens that are not seen yet
        self._delta_head = b""
        self._sequence = len(_OPENING)  # the first token's events are made before the stream is opened

    def begin(self) -> bytes:
        """The events that open a stream."""
        response = self._response("in_progress", [])
        return b"".join(_event(kind, {"response": response}, number) for number, kind in enumerate(_OPENING))

    def delta(self, delta: Delta) -> bytes:
        """The events of one token."""
        if self._logprobs:
            self._unsaid += _shown_logprobs(delta.entries)
        out = b""
        for piece in delta.pieces:
            if isinstance(piece, str):
                entries, self._unsaid = self._unsaid, []
                out += self._text(SAID, piece, logprobs=entries)
            elif isinstance(piece, Reasoning):
                out += self._text(THOUGHT, piece.text)
            else:
                self._unsaid.clear()
                out += self._events(self._output.call(piece))
        if self._output.open is not None and self._output.open.kind is THOUGHT:
            self._unsaid.clear()
        return out

    def end(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The events that close what is open, and the whole response."""
        reason = choices[0].finish_reason
        out = self._events(self._output.finish(reason))
        response = self._finished(choices[0], usage, self._output.items)
        kind = "response.incomplete" if reason == LENGTH else "response.completed"
        return out + self._events([(kind, {"response": response})])

    def error(self, failure: Failure) -> bytes:
        """The response as far as it came, and the error, which OpenAI's clients raise."""
        self._output.close("incomplete")
        error = {"code": "server_error", "message": failure.message}
        response = self._response("failed", self._output.items, error=error)
        said = {"code": failure.code, "message": failure.message, "param": failure.param}
        raised = msgspec.json.decode(failure.body())
        return self._events([("response.failed", {"response": response}), ("error", {**said, **raised})])

    def whole(self, choices: Sequence[Reply], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        reply = choices[0]
        entries = _shown_logprobs(text_entries(reply.entries, reply.content)) if self._logprobs else []
        output = whole_output(self._step_id, reply, logprobs=entries)
        return bytes(self._finished(reply, usage, output))

    def _text(self, kind: TextKind, text: str, *, logprobs: Sequence[Json] = ()) -> bytes:
        opened, events = self._output.text(kind)
        out = self._events(events)
        if events:
            name = f"{kind.events}.delta"
            self._delta_head = b"event: %b\ndata: %b" % (name.encode(), _encode({"type": name, **opened.place})[:-1])
        opened.texts.append(text)
        opened.logprobs += logprobs
        more = b',"logprobs":' + _encode(logprobs) if kind is SAID else b""
        number, self._sequence = self._sequence, self._sequence + 1
        return out + b'%b,"delta":%b%b,"sequence_number":%d}\n\n' % (self._delta_head, _encode(text), more, number)

    def _events(self, events: Iterable[Event]) -> bytes:
        out = b""
        for kind, fields in events:
            out += _event(kind, fields, self._sequence)
            self._sequence += 1
        return out

    def _finished(self, reply: Reply, usage: Usage, output: list[Json]) -> msgspec.Raw:
        shown = _usage_json(usage, thought_tokens=reply.thought_tokens)
        if reply.finish_reason == LENGTH:
            return self._response("incomplete", output, usage=shown, incomplete={"reason": "max_output_tokens"})
        return self._response("completed", output, usage=shown)

    def _response(
        self,
        status: str,
        output: list[Json],
        *,
        usage: Json | None = None,
        error: Json | None = None,
        incomplete: Json | None = None,
    ) -> msgspec.Raw:
        """The response object, encoded."""
        now = {
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "output": output,
            "usage": usage,
        }
        return msgspec.Raw(self._about + b"," + _encode(now)[1:])


def _event(kind: str, fields: Json, number: int) -> bytes:
    data = _encode({"type": kind, **fields, "sequence_number": number})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _asked(call: Call, body: ResponsesBody) -> Json:
    """What a response says of its call."""
    text = msgspec.to_builtins(body.text) if body.text else {}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": call.parallel_tools,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": call.sampling.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": call.top_logprobs,
        "top_p": call.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _usage_json(usage: Usage, *, thought_tokens: int) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": usage.prompt + usage.completion,
    }


def _shown_logprobs(entries: list[Json]) -> list[Json]:
    """Logprobs as this API has them: bytes are a list, empty for a part of a character."""
    return [{**_with_bytes(entry), "top_logprobs": list(map(_with_bytes, entry["top_logprobs"]))} for entry in entries]


def _with_bytes(entry: Json) -> Json:
    return {**entry, "bytes": entry["bytes"] or []}
