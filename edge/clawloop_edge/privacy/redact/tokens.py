"""Taking what a search finds in decoded text out of token ids, one reserved id for one id, so that nothing moves.

The text of ids is their bytes put together; a span of characters is a span of bytes, and every token that has one of
those bytes is replaced. Ids are never made from text, so it does not matter whether they are the tokenizer's own choice
for it. Knows no pattern; rules: docs/redaction.md.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import msgspec

from clawloop_edge.privacy.redact.tokenizer_file import read_ids

PLACEHOLDER = "\ufffc"
"""what a reserved id is in the text that is searched: no space, no letter, and nobody's secret"""
LEAST_RUN = 4
_MAX_PASSES = 16
_NO_UTF8 = re.compile("[\udc80-\udcff]")


class Range(Protocol):
    """Characters `start` to `end` (exclusive) of a text."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


Find = Callable[[str], Iterable[Range]]


class Redaction(msgspec.Struct, frozen=True):
    """Ids after redaction, and the runs (start, length) of them that were replaced. As many ids as before."""

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class TokenTable:
    """The bytes of every id of a vocabulary, the ids that part one turn from the next, and the id that replaces."""

    pieces: tuple[bytes, ...]
    special_ids: frozenset[int]
    reserved_id: int

    @classmethod
    def of(cls, folder: Path) -> TokenTable:
        """The table of a model folder.

        Raises:
            ConfigError: its tokenizer cannot be read, has ids without bytes of their own, or no id to replace by.
        """
        found = read_ids(folder)
        pieces = list(found.pieces)
        pieces[found.reserved_id] = PLACEHOLDER.encode()
        return cls(tuple(pieces), found.special_ids - {found.reserved_id}, found.reserved_id)

    def view(self, ids: Sequence[int]) -> View:
        """The text of ids, and which token is where in it. Ids outside the vocabulary have no text."""
        pieces = self.pieces
        try:
            found = [pieces[number] for number in ids]
        except IndexError:
            found = [pieces[number] if number < len(pieces) else b"" for number in ids]
        return View(b"".join(found).decode("utf-8", "surrogateescape"), list(accumulate(map(len, found))))


class View:
    """The text of a run of ids; bytes that are no UTF-8 are U+FFFD each."""

    def __init__(self, escaped: str, ends: list[int]) -> None:
        """`ends`: the byte offset behind each token."""
        self._escaped, self._ends = escaped, ends
        self.text = escaped if escaped.isascii() else _NO_UTF8.sub("\ufffd", escaped)

    def tokens(self, spans: Iterable[Range]) -> Iterator[range]:
        """For each span that is not empty, the places of the tokens that have a byte of it."""
        wanted = [(span.start, span.end) for span in spans if span.start < span.end]
        offsets = self._offsets(point for span in wanted for point in span)
        for start, end in wanted:
            yield range(bisect_right(self._ends, offsets[start]), bisect_left(self._ends, offsets[end]) + 1)

    def _offsets(self, characters: Iterable[int]) -> Mapping[int, int]:
        """The byte offset of each of these characters."""
        if self._escaped.isascii():
            return {at: at for at in characters}
        found: dict[int, int] = {}
        done = size = 0
        for at in sorted(set(characters)):
            size += len(self._escaped[done:at].encode("utf-8", "surrogateescape"))
            found[at], done = size, at
        return found


def turns(ids: Sequence[int], special_ids: frozenset[int]) -> Iterator[tuple[int, int]]:
    """The stretches (start, end) between special tokens, none of them empty."""
    start = 0
    for at, number in enumerate(ids):
        if number in special_ids:
            if start < at:
                yield start, at
            start = at + 1
    if start < len(ids):
        yield start, len(ids)


def redact_ids(ids: Sequence[int], table: TokenTable, *, find: Find, strict: bool = True) -> Redaction:
    """`ids` with every token that has a byte of what `find` finds replaced. Done to its own result, it changes nothing.

    Each turn is searched by itself. `strict` also replaces neighbours, until a run's length is one of 4, 8, 16, 32, ...
    or its whole turn, so that it tells little of how long the secret was.
    """
    found = list(ids)
    for start, end in turns(found, table.special_ids):
        found[start:end] = redact_turn(found[start:end], table, find=find, strict=strict)
    return Redaction(found, runs(found, table.reserved_id))


def redact_turn(ids: list[int], table: TokenTable, *, find: Find, strict: bool) -> list[int]:
    """The same for the ids of one turn.

    What was replaced may bring something else to light, so the search is repeated until it finds nothing more; a turn
    that does not come to rest is taken out whole.
    """
    hidden = bytearray(number == table.reserved_id for number in ids)
    for _ in range(_MAX_PASSES):
        before = bytes(hidden)
        view = table.view(ids)
        for places in view.tokens(find(view.text)):
            hidden[places.start : places.stop] = b"\x01" * len(places)
        if strict:
            _widen(hidden)
        if hidden == before:
            return ids
        ids = [table.reserved_id if gone else number for number, gone in zip(ids, hidden, strict=True)]
    return [table.reserved_id] * len(ids)


def runs(ids: Sequence[int], reserved_id: int) -> list[tuple[int, int]]:
    """Where the reserved id stands: (start, length) of each run."""
    found: list[tuple[int, int]] = []
    hidden = bytes(number == reserved_id for number in ids)
    start = hidden.find(1)
    while start >= 0:
        end = hidden.find(0, start)
        end = len(hidden) if end < 0 else end
        found.append((start, end - start))
        start = hidden.find(1, end)
    return found


def _widen(hidden: bytearray) -> None:
    """Make every run a power of two long, at least `LEAST_RUN`: by what follows it, else by what stands before it."""
    start = hidden.find(1)
    while start >= 0:
        end = hidden.find(0, start)
        end = len(hidden) if end < 0 else end
        length = end - start
        missing = max(LEAST_RUN, 1 << (length - 1).bit_length()) - length
        after = min(missing, len(hidden) - end)
        before = min(missing - after, start)
        if after + before == 0:
            start = hidden.find(1, end)
            continue
        hidden[start - before : end + after] = b"\x01" * (before + length + after)
        start = hidden.rfind(0, 0, start - before) + 1  # it may have grown into another run
