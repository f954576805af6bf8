"""From a model's raw text to content and tool calls, whole or piece by piece with the same result.

A call that cannot be read is never lost: its raw text becomes content. White space that touches a call is layout, not
content. Knows the model's markers and parser through `ToolFormat`; knows no token, model or HTTP.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from clawloop_edge.engine.thinking import Reasoning, overlap

Tools = Sequence[dict[str, Any]]


class ToolCall(msgspec.Struct, frozen=True):
    """One call: an alphanumeric id, the function's name, and its arguments as JSON text of an object."""

    call_id: str
    name: str
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """The call in the shape of `message.tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


Said = str | ToolCall
"""what a reply says aloud: text, or a whole call"""
Piece = Said | Reasoning
"""what a client gets to see of a reply"""


class ToolFormat(msgspec.Struct, frozen=True):
    """How a model writes calls: between `start` and `end`; `end` is empty if they run to the end of the reply.

    `parse` reads what stands between and returns (name, arguments as JSON text) pairs; it raises ValueError if it
    cannot.
    """

    name: str
    start: str
    end: str
    parse: Callable[[str, Tools], list[tuple[str, str]]]


class HasToolFormat(Protocol):
    """Whatever knows how its model writes tool calls; a `ChatTokenizer` does."""

    @property
    def tool_format(self) -> ToolFormat | None: ...


def new_call_id() -> str:
    """A fresh id of letters and digits, which every client accepts."""
    return "call" + secrets.token_hex(10)


class ReplyParser:
    """Takes the text of one reply in any pieces and gives back content and calls, in order, once they are sure."""

    def __init__(
        self, tool_format: ToolFormat | None, *, tools: Tools = (), new_id: Callable[[], str] = new_call_id
    ) -> None:
        """Without a format (the model has none, or the request named no tools) all text is content."""
        self._format, self._tools, self._new_id = tool_format, tools, new_id
        self._text = ""  # not delivered yet: white space, a possible start marker, or an open call
        self._in_call = False
        self._searched = 0  # how much of an open call was already searched for its end
        self._after_call = False

    def feed(self, text: str) -> list[Said]:
        """What is sure now. Content comes at once, but for white space and what may become a start marker."""
        if self._format is None:
            return [text] if text else []
        self._text += text
        found: list[Said] = []
        while self._advance(self._format, found):
            pass
        return found

    def finish(self) -> list[Said]:
        """What was held back when the reply is over."""
        found: list[Said] = []
        if self._in_call and self._format is not None and not self._format.end:
            self._close(self._format, found, len(self._text))
        if self._text.strip() or not self._after_call:
            self._content(found, self._text)
        self._text = ""
        return found

    def _advance(self, form: ToolFormat, found: list[Said]) -> bool:
        """Take one marker from the text held; False if none is complete."""
        if self._in_call:
            return self._find_end(form, found)
        at = self._text.find(form.start)
        if at < 0:
            sure = len(self._text) - overlap(self._text, form.start)
            sure = len(self._text[:sure].rstrip())
            self._content(found, self._text[:sure])
            self._text = self._text[sure:]
            return False
        body = len(self._text[:at].rstrip())
        self._content(found, self._text[:body])
        self._text, self._in_call, self._searched = self._text[body:], True, 0
        return True

    def _find_end(self, form: ToolFormat, found: list[Said]) -> bool:
        if not form.end:
            return False
        head = self._text.index(form.start) + len(form.start)
        at = self._text.find(form.end, max(head, self._searched))
        if at < 0:
            self._searched = len(self._text) - len(form.end) + 1
            return False
        self._close(form, found, at + len(form.end))
        return True

    def _close(self, form: ToolFormat, found: list[Said], end: int) -> None:
        raw, self._text, self._in_call = self._text[:end], self._text[end:], False
        body = raw[raw.index(form.start) + len(form.start) : len(raw) - len(form.end)]
        try:
            calls = form.parse(body, self._tools)
        except ValueError:
            self._content(found, raw)
            return
        found.extend(ToolCall(self._new_id(), name, arguments) for name, arguments in calls)
        self._after_call = True

    def _content(self, found: list[Said], text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            found.append(text)
            self._after_call = False


def parse_reply(text: str, tokenizer: HasToolFormat, *, tools: Tools = ()) -> tuple[str, list[dict[str, Any]]]:
    """The content and the tool calls (OpenAI's shape) of a whole reply."""
    parser = ReplyParser(tokenizer.tool_format, tools=tools)
    pieces = parser.feed(text) + parser.finish()
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return content, [piece.as_openai() for piece in pieces if isinstance(piece, ToolCall)]


def parse_json_calls(text: str, tools: Tools) -> list[tuple[str, str]]:
    """The calls in JSON text `{"name": ..., "arguments": {...}}`, the arguments kept as the model wrote them.

    Raises:
        ValueError: not JSON, no name, or arguments that are not an object.
    """
    del tools
    try:
        call = msgspec.json.decode(text, type=_JsonCall)
        arguments = bytes(call.arguments) or b"{}"
        msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not a tool call: {error}") from error
    if not call.name:
        raise ValueError("not a tool call: its name is empty")
    return [(call.name, arguments.decode())]


class _JsonCall(msgspec.Struct, frozen=True):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
