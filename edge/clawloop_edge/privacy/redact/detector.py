"""Finds what must not leave in a text: patterns, known values and the owner's words, in the text and in its views.

Pure: no file, no clock, no log. What was found by what stood around it (a password behind `password:`) is looked for
again wherever it stands by itself, in all texts that are searched together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from clawloop_edge.privacy.redact.patterns import Patterns
from clawloop_edge.privacy.redact.plausible import is_placeholder, is_random
from clawloop_edge.privacy.redact.spans import Hit, Span, merged
from clawloop_edge.privacy.redact.values import Value, Values, lowered
from clawloop_edge.privacy.redact.views import View, views

_DEPTH = 2
_MAX_SHARED = 1_000
_SHARED_LENGTH = range(6, 4_097)


class _Page(NamedTuple):
    """A text to search, and the views that lead back to what was given, the last first."""

    text: str
    lower: str
    way: tuple[View, ...] = ()

    def back(self, start: int, end: int) -> tuple[int, int]:
        for view in self.way:
            start, end = view.back(start, end)
        return start, end


class Searched(NamedTuple):
    """What a text holds, and the values that it `told` by what stands around them."""

    spans: list[Span]
    told: list[Value]


class Detector:
    """What one device redacts: what `patterns` describe, values that are `known` to it, and its owner's `words`."""

    def __init__(self, patterns: Patterns, known: Iterable[Value] = (), *, words: Iterable[str] = ()) -> None:
        self._patterns = patterns
        own = [Value(word, "own-word", any_case=True) for word in words if word.strip()]
        self._values = Values([*known, *own])

    def find(self, text: str) -> list[Span]:
        """The stretches of `text` that must not leave: sorted, without overlaps."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[list[Span]]:
        """`find` for texts that belong together: a secret that one of them gives away is found in all."""
        books = [list(_pages(text)) for text in texts]
        shared: dict[str, Value] = {}
        found = [[hit for page in book for hit in self._hits(page, shared)] for book in books]
        again = Values(list(shared.values())[:_MAX_SHARED])
        return [merged([*hits, *_hits_again(book, again)]) for book, hits in zip(books, found, strict=True)]

    def search(self, text: str, also: Iterable[Value] = ()) -> Searched:
        """`find` for texts that come one after the other: what one of them told, the next are searched for (`also`)."""
        book = list(_pages(text))
        shared: dict[str, Value] = {}
        hits = [hit for page in book for hit in self._hits(page, shared)]
        told = list(shared.values())[:_MAX_SHARED]
        return Searched(merged([*hits, *_hits_again(book, Values([*told, *also]))]), told)

    def _hits(self, page: _Page, shared: dict[str, Value]) -> Iterator[Hit]:
        for hit in self._patterns.hits(page.text, page.lower):
            value = page.text[hit.start : hit.end]
            if hit.by_context and value not in shared and _can_stand_alone(value):
                shared[value] = Value(value, hit.kind)
            yield _placed(page, hit)
        for hit in self._values.hits(page.text, page.lower):
            yield _placed(page, hit)


def _pages(text: str, way: tuple[View, ...] = ()) -> Iterator[_Page]:
    lower = lowered(text)
    yield _Page(text if lower.isascii() else _whole(text), lower, way)
    if len(way) < _DEPTH:
        for view in views(text):
            yield from _pages(view.text, (view, *way))


def _whole(text: str) -> str:
    """The text without lone surrogates, which no secret has and no automaton reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return text


def _hits_again(book: Iterable[_Page], values: Values) -> Iterator[Hit]:
    for page in book:
        for hit in values.hits(page.text, page.lower):
            yield _placed(page, hit)


def _placed(page: _Page, hit: Hit) -> Hit:
    return Hit(*page.back(hit.start, hit.end), hit.kind) if page.way else hit


def _can_stand_alone(value: str) -> bool:
    """Whether a value that was found by its context says enough to be looked for without it."""
    if len(value) not in _SHARED_LENGTH or is_placeholder(value):
        return False
    return is_random(value) or len(value) >= 16 or any(not c.isalpha() and c not in "-_. " for c in value)
