"""The forms that rules have. A rule reads the text around a place; it keeps nothing, and looks no further than a
window."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from clawloop_edge.privacy.redact.spans import Hit

Rule = Callable[[str, int, int], Iterable[Hit]]
"""Called for one place, `start` to `end`, where the rule's anchor stands: a word in small letters, or a form."""

Sweep = Callable[[str], Iterable[Hit]]
"""Called once a text."""

Anchored = tuple[tuple[str, Rule], ...]
"""Anchors and their rules."""


def at_anchor(kind: str, shape: str, *, group: str | int = 0, flags: int = 0, by_context: bool = False) -> Rule:
    """A shape that begins with its anchor."""
    pattern = re.compile(shape, flags)

    def rule(text: str, start: int, end: int) -> Iterable[Hit]:
        found = pattern.match(text, start)
        return (Hit(*found.span(group), kind, by_context),) if found else ()

    return rule


def around(kind: str, shape: str, *, back: int, flags: int = 0) -> Rule:
    """A shape that has its anchor within; `back` characters before the anchor are looked at."""
    pattern = re.compile(shape, flags)

    def rule(text: str, start: int, end: int) -> Iterable[Hit]:
        for at in range(max(0, start - back), start + 1):
            if (found := pattern.match(text, at)) is not None and start < found.end():
                return (Hit(*found.span(), kind),)
        return ()

    return rule


def sweep(kind: str, shape: str) -> Sweep:
    """A shape without an anchor. It must begin with one of few characters: it is tried wherever one of them stands."""
    pattern = re.compile(shape)

    def search(text: str) -> Iterable[Hit]:
        return [Hit(*found.span(), kind) for found in pattern.finditer(text)]

    return search
