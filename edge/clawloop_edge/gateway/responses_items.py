"""The items of a Responses answer in the making, and the events that tell of them. Pure; knows no JSON text.

An answer is thoughts, text and tool calls in the order of their coming. Thoughts and text grow while they are open; a
call is there at once.
"""

from typing import Any

import msgspec

from clawloop_edge.engine.tool_calls import ToolCall
from clawloop_edge.gateway.reply import Reply
from clawloop_edge.gateway.responses_input import new_item_id

Json = dict[str, Any]
Event = tuple[str, Json]
"""its type, and its fields but for `sequence_number`"""
LENGTH = "length"
"""the finish reason of an answer that was cut"""


class TextKind(msgspec.Struct, frozen=True):
    """A kind of item that has text: its type, its part's, the events' stem and the prefix of its id."""

    item: str
    part: str
    events: str
    prefix: str

    def shown(self, item_id: str, status: str, parts: list[Json]) -> Json:
        """The item."""
        if self is SAID:
            return {"id": item_id, "type": self.item, "status": status, "role": "assistant", "content": parts}
        return {
            "id": item_id,
            "type": self.item,
            "status": status,
            "summary": [],
            "content": parts,
            "encrypted_content": None,
        }

    def shown_part(self, text: str, logprobs: list[Json]) -> Json:
        """The one part of the item."""
        part: Json = {"type": self.part, "text": text}
        return {**part, "annotations": [], "logprobs": logprobs} if self is SAID else part


SAID = TextKind("message", "output_text", "response.output_text", "msg")
THOUGHT = TextKind("reasoning", "reasoning_text", "response.reasoning_text", "rs")


class OpenText:
    """A text that grows."""

    def __init__(self, kind: TextKind, item_id: str, *, index: int) -> None:
        self.kind, self.item_id, self.index = kind, item_id, index
        self.texts: list[str] = []
        self.logprobs: list[Json] = []

    @property
    def place(self) -> Json:
        """Where its events belong."""
        return {"item_id": self.item_id, "output_index": self.index, "content_index": 0}

    def begun(self) -> list[Event]:
        """The events that open it."""
        item = self.kind.shown(self.item_id, "in_progress", [])
        return [
            ("response.output_item.added", {"output_index": self.index, "item": item}),
            ("response.content_part.added", {**self.place, "part": self.kind.shown_part("", [])}),
        ]

    def closed(self, status: str) -> tuple[Json, list[Event]]:
        """The item as it is at its end, and the events that close it."""
        text = "".join(self.texts)
        part = self.kind.shown_part(text, self.logprobs)
        item = self.kind.shown(self.item_id, status, [part])
        more: Json = {"logprobs": self.logprobs} if self.kind is SAID else {}
        return item, [
            (f"{self.kind.events}.done", {**self.place, "text": text, **more}),
            ("response.content_part.done", {**self.place, "part": part}),
            ("response.output_item.done", {"output_index": self.index, "item": item}),
        ]


class Output:
    """The items so far; at most one of them is open."""

    def __init__(self, step_id: str) -> None:
        self._step_id = step_id
        self.items: list[Json] = []
        self.open: OpenText | None = None

    def text(self, kind: TextKind) -> tuple[OpenText, list[Event]]:
        """The open text of this kind, and the events that opened it if it was not; what else is open is complete."""
        if self.open is not None and self.open.kind is kind:
            return self.open, []
        events = self.close()
        self.open = OpenText(kind, self._new_id(kind.prefix), index=len(self.items))
        return self.open, events + self.open.begun()

    def call(self, call: ToolCall) -> list[Event]:
        """Add a tool call; whatever is open is complete."""
        events, index = self.close(), len(self.items)
        item_id = self._new_id("fc")
        place = {"item_id": item_id, "output_index": index}
        item = _call_item(item_id, call, arguments=call.arguments, status="completed")
        begun = _call_item(item_id, call, arguments="", status="in_progress")
        self.items.append(item)
        return [
            *events,
            ("response.output_item.added", {"output_index": index, "item": begun}),
            ("response.function_call_arguments.delta", {**place, "delta": call.arguments}),
            ("response.function_call_arguments.done", {**place, "name": call.name, "arguments": call.arguments}),
            ("response.output_item.done", {"output_index": index, "item": item}),
        ]

    def close(self, status: str = "completed") -> list[Event]:
        """Close what is open."""
        if self.open is None:
            return []
        item, events = self.open.closed(status)
        self.items.append(item)
        self.open = None
        return events

    def finish(self, finish_reason: str) -> list[Event]:
        """Close the answer. One that is complete and says nothing has an empty message."""
        if finish_reason == LENGTH:
            return self.close("incomplete")
        said = self.open is not None and self.open.kind is SAID
        silent = not said and all(item["type"] == THOUGHT.item for item in self.items)
        events = self.text(SAID)[1] if silent else []
        return events + self.close()

    def _new_id(self, prefix: str) -> str:
        return new_item_id(prefix, self._step_id, len(self.items))


def whole_output(step_id: str, reply: Reply, *, logprobs: list[Json]) -> list[Json]:
    """The items of an answer that is over."""
    output = Output(step_id)
    if reply.reasoning:
        output.text(THOUGHT)[0].texts.append(reply.reasoning)
    if reply.content:
        said, _ = output.text(SAID)
        said.texts.append(reply.content)
        said.logprobs = logprobs
    for call in reply.calls:
        output.call(call)
    output.finish(reply.finish_reason)
    return output.items


def text_entries(entries: list[Json], text: str) -> list[Json]:
    """Those of an answer's logprobs whose tokens make up its text; all of them if that cannot be told."""
    joined = "".join(entry["token"] for entry in entries)
    start = joined.rfind(text) if text else -1
    if start < 0:
        return entries
    found, at = [], 0
    for entry in entries:
        after = at + len(entry["token"])
        if after > start and at < start + len(text):
            found.append(entry)
        at = after
    return found


def _call_item(item_id: str, call: ToolCall, *, arguments: str, status: str) -> Json:
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": arguments,
    }
