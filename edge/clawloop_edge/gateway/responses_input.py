"""What a Responses call says so far: its items, brought to messages. Pure.

The model's own items come apart: thoughts, text and each tool call are items of their own. Those of one answer become
one assistant message again, as it was sampled, so that the conversation is found and its tokens can be put back.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from clawloop_edge.errors import RequestError
from clawloop_edge.gateway.body import Json, convert_body, unsupported

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""the parts that a text model can read, and where their text stands"""
_FOLLOWS = {
    "reasoning": frozenset({"reasoning"}),
    "message": frozenset({"reasoning", "function_call"}),
    "function_call": frozenset({"reasoning", "message", "function_call"}),
}
"""after which of an answer's items an item still belongs to that answer"""
_OPENING = ("system", "developer")


_Part = Annotated[
    Json,
    Meta(
        extra_json_schema={
            "anyOf": [
                {
                    "properties": {"type": {"const": kind}, field: {"type": "string"}},
                    "required": ["type", field],
                }
                for kind, field in _TEXTS.items()
            ]
        }
    ),
]


class InputMessage(msgspec.Struct):
    """An item that is a message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_Part]
    type: Literal["message"] | None = None


class FunctionCall(msgspec.Struct):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str  # a model may have called what was never offered, and its agent sends that back
    arguments: str = ""


class FunctionOutput(msgspec.Struct):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Part]


class _Thought(msgspec.Struct):
    text: str


class ReasoningItem(msgspec.Struct):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: list[_Thought] | None = None
    content: list[_Thought] | None = None


def new_item_id(prefix: str, step_id: str, number: int) -> str:
    """The id of an answer's item; it tells to which answer the item belongs, however a client orders them."""
    return f"{prefix}_{step_id.rpartition('-')[2]}_{number}"


def read_input(given: str | list[Any] | None, instructions: str | None) -> list[Json]:
    """The messages of a call.

    Raises:
        RequestError: nothing to answer, or an item that is wrong or of a type that is not supported.
    """
    conversation = _Conversation()
    if isinstance(given, str):
        conversation.messages.append({"role": "user", "content": given})
    for index, item in enumerate(given if isinstance(given, list) else []):
        conversation.add(item, f"input[{index}]")
    if not conversation.messages:
        raise RequestError("input has nothing to answer; send the whole conversation", param="input")
    return _instructed(conversation.messages, instructions)


class _Conversation:
    """Messages in the making. Of the answer that may still grow it knows its message, its last item's type, and from
    which call of ours it came, if the item ids say so."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._answer: Json = {}
        self._last = self._origin = ""
        self._readers: dict[str, Callable[[Json, str], None]] = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._output,
            "reasoning": self._reasoning,
        }

    def add(self, item: Any, where: str) -> None:
        """Add one item."""
        if not isinstance(item, dict):
            raise RequestError(f"{where}: an item is an object", param=where, code="invalid_type")
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "item_reference":
            raise unsupported(
                where, f"{where}: item_reference is not supported, since no items are kept; send the item"
            )
        reader = self._readers.get(kind) if isinstance(kind, str) else None
        if reader is None:
            known = ", ".join(self._readers)
            raise unsupported(where, f"{where}: items of type {kind!r} are not supported; send {known}")
        reader(item, where)

    def _message(self, item: Json, where: str) -> None:
        message = convert_body(item, InputMessage, where=where)
        texts = _texts(message.content, f"{where}.content")
        if message.role != "assistant":
            self._other({"role": message.role, "content": _content(texts)})
            return
        answer = self._open("message", item)
        answer["content"] = (answer["content"] or "") + (texts if isinstance(texts, str) else "".join(texts))

    def _call(self, item: Json, where: str) -> None:
        call = convert_body(item, FunctionCall, where=where)
        answer = self._open("function_call", item)
        function = {"name": call.name, "arguments": call.arguments}
        answer["content"] = answer["content"] or None
        answer.setdefault("tool_calls", []).append({"id": call.call_id, "type": "function", "function": function})

    def _output(self, item: Json, where: str) -> None:
        output = convert_body(item, FunctionOutput, where=where)
        content = _content(_texts(output.output, f"{where}.output"))
        self._other({"role": "tool", "tool_call_id": output.call_id, "content": content})

    def _reasoning(self, item: Json, where: str) -> None:
        reasoning = convert_body(item, ReasoningItem, where=where)
        thoughts = [thought.text for thought in reasoning.content or reasoning.summary or []]
        if any(thoughts):
            answer = self._open("reasoning", item)
            before = [answer["reasoning_content"]] if "reasoning_content" in answer else []
            answer["reasoning_content"] = "\n\n".join([*before, *thoughts])

    def _other(self, message: Json) -> None:
        self.messages.append(message)
        self._last = ""

    def _open(self, kind: str, item: Json) -> Json:
        """The assistant message that an item belongs to. Two items that say so are of one answer also if a tool's
        output stands between them."""
        origin = _origin(item)
        same = origin == self._origin if origin and self._origin else self._last in _FOLLOWS[kind]
        if not same:
            self._answer = {"role": "assistant", "content": ""}
            self.messages.append(self._answer)
            self._origin = ""
        self._last, self._origin = kind, origin or self._origin
        return self._answer


def _origin(item: Json) -> str:
    name = item.get("id")
    parts = name.split("_") if isinstance(name, str) else []
    return parts[1] if len(parts) == 3 else ""


def _texts(content: str | list[Json], where: str) -> str | list[str]:
    if isinstance(content, str):
        return content
    return [_text(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _text(part: Json, where: str) -> str:
    kind = part.get("type")
    field = _TEXTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise unsupported(where, f"{where}: parts of type {kind!r} are not supported; send text")
    text = part.get(field)
    if not isinstance(text, str):
        raise RequestError(
            f"{where}: a part of type {kind} needs {field}", param=f"{where}.{field}", code="invalid_type"
        )
    return text


def _content(texts: str | list[str]) -> str | list[Json]:
    return texts if isinstance(texts, str) else [{"type": "text", "text": text} for text in texts]


def _instructed(messages: list[Json], instructions: str | None) -> list[Json]:
    """The messages with the instructions before them: in one with the first if that is the system's too, because many
    chat templates take only one."""
    if not instructions:
        return messages
    if messages[0]["role"] not in _OPENING:
        return [{"role": "system", "content": instructions}, *messages]
    first, content = messages[0], messages[0]["content"]
    above = f"{instructions}\n\n"
    joined = above + content if isinstance(content, str) else [{"type": "text", "text": above}, *content]
    return [dict(first, content=joined), *messages[1:]]
