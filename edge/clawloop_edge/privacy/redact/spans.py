"""What a search finds: stretches of a text with the kind of thing that stands there. Knows no pattern."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text, and what they are."""

    start: int
    end: int
    kind: str


class Hit(NamedTuple):
    """A span as a rule found it. `by_context`: what stood around it told, so its value is looked for elsewhere too."""

    start: int
    end: int
    kind: str
    by_context: bool = False


def merged(hits: Iterable[Hit]) -> list[Span]:
    """The spans that the hits cover: sorted, without overlaps; what overlaps becomes one, of the longest one's kind."""
    found: list[Span] = []
    length = 0
    for start, end, kind, _ in sorted(hits, key=lambda hit: (hit.start, -hit.end)):
        if not found or start >= found[-1].end:
            found.append(Span(start, end, kind))
            length = end - start
            continue
        last = found[-1]
        if end - start > length:
            kind, length = kind, end - start
        else:
            kind = last.kind
        found[-1] = Span(last.start, max(last.end, end), kind)
    return found
