"""Given values, found wherever they stand, in one pass; also in base64 and hex. Knows not where they are from."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ahocorasick_rs import AhoCorasick, Implementation

from clawloop_edge.privacy.redact.spans import Hit

_ENCODED_FROM = 8
"""characters from which a value is looked for in base64 and hex too"""


class Value(NamedTuple):
    """A string to find. `any_case`: whatever its letters' case; `whole`: not within a longer word."""

    text: str
    kind: str
    any_case: bool = False
    whole: bool = True


class Values:
    """A set of values, compiled."""

    def __init__(self, values: Iterable[Value]) -> None:
        forms = {form.text: form for value in values for form in _forms(value)}
        self._exact = _Automaton([form for form in forms.values() if not form.any_case])
        self._folded = _Automaton([form for form in forms.values() if form.any_case])

    def hits(self, text: str, lower: str) -> Iterator[Hit]:
        """Where values stand in `text`; `lower` is the same text in small letters, character by character."""
        yield from self._exact.hits(text, text)
        yield from self._folded.hits(text, lower)


class _Automaton:
    def __init__(self, forms: list[Value]) -> None:
        self._forms = forms
        patterns = [lowered(form.text) if form.any_case else form.text for form in forms]
        self._automaton = AhoCorasick(patterns, implementation=Implementation.ContiguousNFA) if patterns else None

    def hits(self, text: str, haystack: str) -> Iterator[Hit]:
        if self._automaton is None:
            return
        for number, start, end in self._automaton.find_matches_as_indexes(haystack, overlapping=True):
            form = self._forms[number]
            if not form.whole or is_whole(text, start, end):
                yield Hit(start, end, form.kind)


def is_whole(text: str, start: int, end: int) -> bool:
    """Whether a stretch breaks no word: no letter or digit on both sides of an edge; that of an escape is none."""
    if end < len(text) and text[end].isalnum() and text[end - 1].isalnum():
        return False
    if start == 0 or not text[start].isalnum() or not text[start - 1].isalnum():
        return True
    return text[start - 1] in "nrtbf" and text[start - 2 : start - 1] == "\\"


def _forms(value: Value) -> Iterator[Value]:
    yield value
    data = value.text.encode("utf-8", "surrogatepass")
    if len(data) < _ENCODED_FROM:
        return
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + data)
        core = encoded[(0, 2, 3)[shift] : len(encoded) - (0, 3, 2)[(shift + len(data)) % 3]].decode()
        for form in {core, core.translate(str.maketrans("+/", "-_"))}:
            yield Value(form, value.kind, whole=False)
    yield Value(data.hex(), value.kind, whole=False)


def lowered(text: str) -> str:
    """Small letters, one for each character (`İ` alone would become two), and no lone surrogates, which nothing is."""
    lower = text.replace("İ", "i").lower()
    try:
        lower.encode()
    except UnicodeEncodeError:
        lower = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in lower)
    return lower
