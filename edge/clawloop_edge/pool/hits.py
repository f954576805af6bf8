"""What a search gives: the texts in which words were found, shown from the pool; and searching without an index.

Reads on any connection; changes nothing.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Turn
from clawloop_edge.pool.said import Said, Speaker, said
from clawloop_edge.pool.words import Query, matches, snippet

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

_STEPS_BACK = "SELECT seq FROM steps WHERE seq < ? ORDER BY seq DESC LIMIT ?"
_PLACES, _WALK_STEPS = 1 << 12, 256
"""without an index: the most texts of a step, and how many steps are read at a time"""


class Hit(msgspec.Struct, frozen=True, kw_only=True):
    """One text in which the words were found.

    `marks` are (start, end) of the found words in `snippet`. `rank`: the larger, the better the words fit (BM25).
    `place` goes into `before` to ask for the hits after this one.
    """

    session_id: str
    step_id: str
    title: str
    app: str
    at_ms: int
    who: Speaker
    snippet: str
    marks: list[tuple[int, int]]
    rank: float
    place: int


class Within(NamedTuple):
    """What is searched: texts before a place, of an app (or of any), and of a time (`until_ms` is outside of it)."""

    before: int
    app: str
    since_ms: int
    until_ms: int


class Found(NamedTuple):
    """A row of the index: the number of a text, its step's `seq`, its digest, and how well it fits."""

    text: int
    seq: int
    digest: bytes
    rank: float


def digest_of(one: Said) -> bytes:
    """What a text is known by in its session."""
    return blake2b(f"{one.who}:{one.text}".encode(), digest_size=12).digest()


def hit_of(reading: Reading, row: Found, *, query: Query) -> Hit | None:
    """A hit with its words from the pool; None if they are not there any more."""
    turn = next((one for one in reading.turns(row.seq - 1, 1) if one.step.seq == row.seq), None)
    one = next((each for each in said(turn) if digest_of(each) == row.digest), None) if turn else None
    return _as_hit(reading, turn, one, query=query, place=(row.text, row.rank)) if turn and one else None


def walk(pool: "Pool", query: Query, *, within: Within) -> Iterator[Hit]:
    """The hits without an index: every step is read, from the newest back."""
    before = within.before
    while True:
        with pool.reading() as reading:
            last = before // _PLACES + 1
            rows = reading.database.conn.execute(_STEPS_BACK, (last, _WALK_STEPS)).fetchall()
            hits = [hit for (seq,) in rows for hit in _walked(reading, seq, query=query, within=within)]
        yield from hits
        if len(rows) < _WALK_STEPS:
            return
        before = rows[-1][0] * _PLACES - 1


def _walked(reading: Reading, seq: int, *, query: Query, within: Within) -> Iterator[Hit]:
    (turn,) = reading.turns(seq - 1, 1)
    if (within.app and turn.step.app != within.app) or not within.since_ms <= turn.step.at_ms < within.until_ms:
        return
    for number, one in reversed(list(enumerate(islice(said(turn), _PLACES)))):
        place = seq * _PLACES + number
        if place < within.before and matches(one.text, query):
            yield _as_hit(reading, turn, one, query=query, place=(place, 0.0))


def _as_hit(reading: Reading, turn: Turn, one: Said, *, query: Query, place: tuple[int, float]) -> Hit:
    summary, piece = reading.session(turn.step.session_id), snippet(one.text, query)
    return Hit(
        session_id=turn.step.session_id,
        step_id=turn.step.step_id,
        title=summary.title if summary else "",
        app=summary.app if summary else turn.step.app,
        at_ms=turn.step.at_ms,
        who=one.who,
        snippet=piece.text,
        marks=piece.marks,
        rank=place[1],
        place=place[0],
    )
