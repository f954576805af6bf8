"""JSON5 as text: reads it with the place of each value, and changes single members of it.

All else stays byte for byte: comments, order, spacing. Knows nothing of what is in it. Grammar: https://spec.json5.org.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clawloop_shared.errors import ConfigError

Json = Any
"""a JSON value; what stands in a configuration file is its owner's"""
Path = Sequence[str]

_BLANK = re.compile(r"(?:[\s\ufeff]+|//[^\n\r\u2028\u2029]*|/\*.*?\*/)*", re.DOTALL)
_WORD = re.compile(r"[^\s\ufeff,:{}\[\]\"'/]+")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(\r\n|.))", re.DOTALL)
_STRING = {quote: re.compile(rf"{quote}((?:[^{quote}\\\n\r]|\\(?:\r\n|.))*){quote}", re.DOTALL) for quote in "\"'"}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0", "\n": "", "\r": "", "\r\n": ""}
_WORDS: dict[str, Json] = {"true": True, "false": False, "null": None}
_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|Infinity|NaN|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
_DEEPEST = 100
_INDENT = "  "
_SHORT = 80
"""characters of a value that may stand on the line of others"""


@dataclass(frozen=True)
class Node:
    """A value, and where it stands: text[start:end]. Objects and arrays have parts."""

    value: Json
    start: int
    end: int
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Part:
    """A member of an object, or an item of an array (its key is empty); where it begins, and where its comma is."""

    key: str
    start: int
    node: Node
    comma: int | None


def read(text: str) -> Node:
    """The value that the whole of `text` is.

    Raises:
        ConfigError: it is not JSON5; says where.
    """
    reader = _Reader(text)
    found = reader.value(reader.blank(0), depth=0)
    if (end := reader.blank(found.end)) != len(text):
        raise reader.wrong(end, "something after the end of the value")
    return found


def find(node: Node, path: Path) -> Node | None:
    """The value under these keys, or None."""
    for key in path:
        part = _part(node, key) if isinstance(node.value, dict) else None
        if part is None:
            return None
        node = part.node
    return node


def put(text: str, path: Path, value: Json) -> str:
    """`text` with `value` under these keys; objects on the way are made where they are missing.

    Raises:
        ConfigError: something on the way is no object.
    """
    node = read(text)
    for depth, key in enumerate(path):
        if not isinstance(node.value, dict):
            raise ConfigError(
                f"{'.'.join(path[:depth]) or 'the whole'} is not an object, so nothing can be put into it"
            )
        part = _part(node, key)
        if part is None:
            for name in reversed(path[depth + 1 :]):
                value = {name: value}
            return _added(text, node, value, key=key)
        node = part.node
    rendered = _rendered(value, text, outer=_indent(text, node.start), inline=False)
    return text[: node.start] + rendered + text[node.end :]


def append(text: str, path: Path, item: Json) -> str:
    """`text` with `item` at the end of the array under these keys.

    Raises:
        ConfigError: it is no array.
    """
    node = find(read(text), path)
    if node is None:
        return put(text, path, [item])
    if not isinstance(node.value, list):
        raise ConfigError(f"{'.'.join(path)} is not an array, so nothing can be added to it")
    return _added(text, node, item, key=None)


def drop(text: str, path: Path) -> str:
    """`text` without the member under these keys, if it is there."""
    node = find(read(text), path[:-1])
    part = _part(node, path[-1]) if node is not None and isinstance(node.value, dict) else None
    return text if node is None or part is None else _dropped(text, node, part)


def drop_item(text: str, path: Path, item: Json) -> str:
    """`text` without this item of the array under these keys, if it is there."""
    node = find(read(text), path)
    parts = node.parts if node is not None and isinstance(node.value, list) else ()
    part = next((part for part in parts if part.node.value == item), None)
    return text if node is None or part is None else _dropped(text, node, part)


class _Reader:
    """Recursive descent; each method takes a position and gives what begins there."""

    def __init__(self, text: str) -> None:
        self._text = text

    def blank(self, at: int) -> int:
        """Where space and comments end."""
        found = _BLANK.match(self._text, at)
        return found.end() if found else at

    def wrong(self, at: int, what: str) -> ConfigError:
        line = self._text.count("\n", 0, at) + 1
        column = at - self._text.rfind("\n", 0, at)
        return ConfigError(f"line {line}, column {column}: {what}")

    def value(self, at: int, *, depth: int) -> Node:
        if depth > _DEEPEST:
            raise self.wrong(at, f"nested deeper than {_DEEPEST}")
        match self._text[at : at + 1]:
            case "{":
                return self._container(at, depth=depth, close="}")
            case "[":
                return self._container(at, depth=depth, close="]")
            case '"' | "'":
                text, end = self._string(at)
                return Node(text, at, end)
        word = self._word(at)
        return Node(self._plain(word, at), at, at + len(word))

    def _container(self, at: int, *, depth: int, close: str) -> Node:
        parts: list[Part] = []
        here = self.blank(at + 1)
        while self._text[here : here + 1] != close:
            if parts and parts[-1].comma is None:
                raise self.wrong(here, f"expected , or {close}")
            start = here
            key, here = self._key(here) if close == "}" else ("", here)
            node = self.value(here, depth=depth + 1)
            here = self.blank(node.end)
            comma = here if self._text[here : here + 1] == "," else None
            parts.append(Part(key, start, node, comma))
            here = self.blank(here + 1) if comma is not None else here
        values = [part.node.value for part in parts]
        value = {part.key: part.node.value for part in parts} if close == "}" else values
        return Node(value, at, here + 1, tuple(parts))

    def _key(self, at: int) -> tuple[str, int]:
        """A member's name, and where its value begins."""
        if self._text[at : at + 1] in ('"', "'"):
            key, end = self._string(at)
        else:
            key = self._word(at)
            end = at + len(key)
        colon = self.blank(end)
        if self._text[colon : colon + 1] != ":":
            raise self.wrong(colon, "expected : after a name")
        return key, self.blank(colon + 1)

    def _word(self, at: int) -> str:
        found = _WORD.match(self._text, at)
        if found is None:
            raise self.wrong(at, "expected a value" if at < len(self._text) else "the text ends too early")
        return found[0]

    def _plain(self, word: str, at: int) -> Json:
        if word in _WORDS:
            return _WORDS[word]
        if not _NUMBER.fullmatch(word):
            raise self.wrong(at, "neither a value nor in quotes")
        if "x" in word.lower():
            return int(word, 16)
        return float(word) if re.search(r"[.eENI]", word) else int(word)

    def _string(self, at: int) -> tuple[str, int]:
        found = _STRING[self._text[at]].match(self._text, at)
        if found is None:
            raise self.wrong(at, "a text in quotes that does not end on its line")
        return _ESCAPE.sub(_unescaped, found[1]), found.end()


def _unescaped(found: re.Match[str]) -> str:
    code, other = found[1] or found[2], found[3]
    return chr(int(code, 16)) if code else _ESCAPES.get(other, other)


def _part(node: Node, key: str) -> Part | None:
    """The member of that name; the last one counts, as for OpenClaw."""
    return next((part for part in reversed(node.parts) if part.key == key), None)


def _indent(text: str, at: int) -> str:
    """What the line of `at` begins with."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip())]


def _unit(text: str) -> str:
    """By how much the file indents: as the first member of the whole does."""
    parts = read(text).parts
    return (_indent(text, parts[0].start) if parts else "") or _INDENT


def _rendered(value: Json, text: str, *, outer: str, inline: bool) -> str:
    """A value as it is written into `text` on a line indented by `outer`."""
    if inline:
        return json.dumps(value, ensure_ascii=False)
    newline = "\r\n" if "\r\n" in text else "\n"
    return json.dumps(value, ensure_ascii=False, indent=_unit(text)).replace("\n", newline + outer)


def _added(text: str, node: Node, value: Json, *, key: str | None) -> str:
    """`text` with one more part, the last one, in the manner of those that are there."""
    close, last = node.end - 1, node.parts[-1] if node.parts else None
    inline = last is not None and "\n" not in text[node.start : node.end]
    outer = _indent(text, node.start)
    inner = outer + _unit(text)
    label = "" if key is None else f"{json.dumps(key, ensure_ascii=False)}: "
    short = inline and ("\n" not in text.strip() or len(json.dumps(value)) <= _SHORT)
    piece = label + _rendered(value, text, outer=outer if inline else inner, inline=short)
    at = len(text[:close].rstrip())
    tail = text[at:]
    if last is not None and last.comma is not None:
        piece += "," * (not inline)
    newline = "\r\n" if "\r\n" in text else "\n"
    lead = " " if inline else newline + inner
    if not inline and "\n" not in text[at:close]:
        tail = newline + outer + text[close:]
    head = text[:at]
    if last is not None and last.comma is None:
        head = text[: last.node.end] + "," + text[last.node.end : at]
    return head + lead + piece + tail


def _dropped(text: str, node: Node, part: Part) -> str:
    """`text` without a part, its comma, and the space before it; without the comma before it, if it was the last."""
    at = node.parts.index(part)
    begin = len(text[: part.start].rstrip())
    end = part.node.end if part.comma is None else part.comma + 1
    if text[end:].partition("\n")[0].strip() and "\n" in text[begin : part.start]:
        begin = part.start  # what follows on its line must not get behind a comment on the line before
    text = text[:begin] + text[end:]
    comma = node.parts[at - 1].comma if at and part.comma is None else None
    if comma is not None:
        text = text[:comma] + text[comma + 1 :]
    if len(node.parts) > 1:
        return text
    close = node.end - (end - begin) - 1
    return text if text[node.start + 1 : close].strip() else text[: node.start + 1] + text[close:]
