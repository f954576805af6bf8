"""A change of a configuration as a diff to read, with what may be secret left out. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator

from clawloop_edge.openclaw.json5 import Node, read
from clawloop_shared.errors import ConfigError

MASK = "***"
_SECRET_KEY = re.compile(
    r"(?:key|token|secret|password|passwd|passphrase|credentials?|authorization|cookie|webhook|dsn|pin|private)\Z", re.I
)
_SECRET_OBJECT = re.compile(r"\A(?:headers|env|vars)\Z", re.I)
_OPAQUE = re.compile(r"(?<![\w.-])(?=[\w.-]*\d)(?=[\w.-]*[A-Za-z])[\w-][\w.-]{18,}[\w=-]*")
_IN_URL = re.compile(r"(?<=://)[^\s/@\"']+(?=@)")


def diff(before: str, after: str, *, name: str) -> str:
    """The unified diff of two JSON5 texts."""
    lines = difflib.unified_diff(_lines(before), _lines(after), f"{name} (now)", f"{name} (then)", lineterm="")
    return "\n".join(lines)


def masked(text: str) -> str:
    """A JSON5 text without what its names or its looks tell to be a secret."""
    try:
        spans = list(_secrets(read(text), hidden=False))
    except ConfigError:
        spans = []
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + json.dumps(MASK) + text[end:]
    return _IN_URL.sub(MASK, _OPAQUE.sub(MASK, text))


def _lines(text: str) -> list[str]:
    return masked(text).splitlines()


def _secrets(node: Node, *, hidden: bool) -> Iterator[tuple[int, int]]:
    """Where texts and numbers stand that are secret by the names above them."""
    if isinstance(node.value, dict):
        for part in node.parts:
            if isinstance(part.node.value, dict):
                yield from _secrets(part.node, hidden=hidden or bool(_SECRET_OBJECT.match(part.key)))
            else:
                yield from _secrets(part.node, hidden=hidden or bool(_SECRET_KEY.search(part.key)))
    elif isinstance(node.value, list):
        for part in node.parts:
            yield from _secrets(part.node, hidden=hidden)
    elif hidden and isinstance(node.value, str | int | float) and not isinstance(node.value, bool):
        yield node.start, node.end
