"""Redacting the steps of sessions at the price of what is new in them: each turn is searched once and remembered.

What a turn gives away by its context (the word behind `password:`) is taken out of every turn of the step, and of what
is redacted of that session afterwards. Remembers hashes, places and such values in memory, within bounds; nothing else.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from clawloop_edge.privacy.redact.tokens import PLACEHOLDER, Range, Redaction, TokenTable, redact_turn, runs, turns
from clawloop_edge.privacy.redact.values import Value

MARK = "[redacted]"
"""what stands in a text for what was taken out"""
MAX_BYTES = 32 << 20
MAX_SESSIONS = 256
MAX_VALUES = 1_000
"""of one session; more tell that something is not as it should be, and would cost more than they save"""
_MAX_PASSES = 8
_ENTRY_BYTES = 300
_HIDDEN = re.compile(f"{PLACEHOLDER}+")


class Searched(Protocol):
    """What a search found: the places, and the values whose context gave them away."""

    @property
    def spans(self) -> Sequence[Range]: ...
    @property
    def told(self) -> Iterable[Value]: ...


class Detector(Protocol):
    """Finds what must not leave (detector.py); `also` are values to find beside its own."""

    def search(self, text: str, also: Iterable[Value] = ()) -> Searched: ...


@dataclass(frozen=True)
class _Turn:
    """Which tokens of a turn are replaced, and what it gave away."""

    spans: list[tuple[int, int]]
    told: frozenset[Value]

    @property
    def size_bytes(self) -> int:
        return _ENTRY_BYTES + 100 * len(self.spans) + sum(200 + 4 * len(value.text) for value in self.told)


@dataclass(frozen=True)
class _Also:
    """Values to find beside what a detector finds, and a name for them."""

    values: frozenset[Value]
    name: bytes

    @classmethod
    def of(cls, values: Iterable[Value]) -> _Also:
        kept = frozenset(values)
        return cls(kept, msgspec.msgpack.encode(sorted(kept)) if kept else b"")


class TurnSearch:
    """Redacts ids and texts of one device. Not for several threads at once."""

    def __init__(
        self, table: TokenTable, detector: Detector, *, strict: bool = True, max_bytes: int = MAX_BYTES
    ) -> None:
        """`strict`: lengths of runs are made alike (see `redact_ids`). `max_bytes` may be remembered of turns."""
        self._table, self._detector, self._strict = table, detector, strict
        self._turns: OrderedDict[bytes, _Turn] = OrderedDict()
        self._room = max_bytes
        self._told: OrderedDict[str, dict[Value, None]] = OrderedDict()

    @property
    def reserved_id(self) -> int:
        """The id that replaces others."""
        return self._table.reserved_id

    def learn(self, ids: Sequence[int], *, session_id: str) -> None:
        """Search a step for what it gives away of its session, so that what is redacted next knows it."""
        self._values(ids, session_id=session_id)

    def redact(self, ids: Sequence[int], *, session_id: str = "", also: Iterable[Value] = ()) -> Redaction:
        """The ids of a step without what is found in its turns, and without `also`."""
        wanted = _Also.of([*self._values(ids, session_id=session_id), *also])
        found = list(ids)
        for start, end in turns(ids, self._table.special_ids):
            for at, length in self._turn(ids[start:end], wanted).spans:
                found[start + at : start + at + length] = [self.reserved_id] * length
        return Redaction(found, runs(found, self.reserved_id))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each turn."""
        return [self._table.view(ids[start:end]).text for start, end in turns(ids, self._table.special_ids)]

    def text(self, text: str, *, session_id: str = "") -> str:
        """A text without what is found in it, or is known to be secret in its session."""
        also = self._told.get(session_id, ())
        for _ in range(_MAX_PASSES):
            fewer = _without(text, self._detector.search(text, also).spans)
            if fewer == text:
                return _HIDDEN.sub(MARK, text)
            text = fewer
        return MARK

    def _values(self, ids: Sequence[int], *, session_id: str) -> Iterable[Value]:
        """What the turns of a step give away, with what was given away in its session before."""
        session = self._told.pop(session_id, {})
        for start, end in turns(ids, self._table.special_ids):
            session.update(dict.fromkeys(sorted(self._turn(ids[start:end], _NOTHING).told)))
        while len(session) > MAX_VALUES:
            session.pop(next(iter(session)))
        if session_id and session:
            self._told[session_id] = session
            while len(self._told) > MAX_SESSIONS:
                self._told.popitem(last=False)
        return session

    def _turn(self, ids: Sequence[int], also: _Also) -> _Turn:
        name = hashlib.blake2b(array("q", ids).tobytes(), key=hashlib.blake2b(also.name).digest()).digest()
        known = self._turns.get(name)
        if known is not None:
            self._turns.move_to_end(name)
            return known
        found = self._turns[name] = self._searched(list(ids), also)
        self._room -= found.size_bytes
        while self._room < 0:
            self._room += self._turns.popitem(last=False)[1].size_bytes
        return found

    def _searched(self, ids: list[int], also: _Also) -> _Turn:
        told: set[Value] = set()

        def find(text: str) -> Iterable[Range]:
            found = self._detector.search(text, also.values)
            told.update(value for value in found.told if PLACEHOLDER not in value.text)
            return found.spans

        hidden = redact_turn(ids, self._table, find=find, strict=self._strict)
        return _Turn(runs(hidden, self.reserved_id), frozenset(told))


_NOTHING = _Also.of(())


def _without(text: str, spans: Iterable[Range]) -> str:
    """A text with one placeholder for each span; what is a placeholder already stays."""
    return "".join(_pieces(text, sorted((span.start, span.end) for span in spans if span.start < span.end)))


def _pieces(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[str]:
    done = 0
    for start, end in spans:
        if end <= done:
            continue
        yield text[done : max(start, done)]
        yield PLACEHOLDER
        done = end
    yield text[done:]
