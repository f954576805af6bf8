"""The anchor: how far the pool's chain was, kept outside of the database, so that an older file in its place is seen.

It holds one point of the chain (two while a backup takes the pool's place), under a MAC with a key from the file key.
A pool that does not reach the point, or has another history up to it, is refused; checking costs the same however
long the chain is. What was kept after the last anchor can be taken back unseen: it is written when the edge opens and
closes the pool, every minute between, and before each upload. Format: docs/formats/pool.md.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from clawloop_edge.errors import AnchorError
from clawloop_edge.pool.heads import Head, current, head_at, note
from clawloop_edge.pool.places import Place
from clawloop_shared.envelope import derive_key

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

_WAY_OUT = "bring back the newer pool, or, if this one is meant: clawloop-edge pool accept"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A point of the chain of one pool, and when it was written down (milliseconds since 1970)."""

    pool_id: str
    seq: int
    head: bytes
    at_ms: int


class _Written(msgspec.Struct, frozen=True, tag_field="is", tag="clawloop-pool-anchor.v1", forbid_unknown_fields=True):
    points: Annotated[list[Point], Meta(min_length=1, max_length=2)]
    mac: bytes


def point_of(database: "Database", head: Head | None = None) -> Point:
    """Where the chain of this pool ends now (or `head`)."""
    pool_id = database.conn.execute("SELECT pool_id FROM pool").fetchone()[0]
    seq, digest = head or current(database)
    return Point(pool_id=pool_id, seq=seq, head=digest, at_ms=time.time_ns() // 1_000_000)


class Anchor:
    """The anchor of one pool. Writing it needs `keys.key_lock`, so that it never goes back."""

    def __init__(self, place: Place | None, file_key: bytes) -> None:
        """Without a `place` nothing is checked and nothing kept."""
        self._place, self._key = place, derive_key(file_key, "clawloop pool anchor v1")
        self._written: Point | None = None

    def read(self) -> list[Point]:
        """The points; none if there is no anchor.

        Raises:
            AnchorError: it is damaged, or another key wrote it.
        """
        data = self._place.read() if self._place else None
        if self._place is None or data is None:
            return []
        try:
            written = msgspec.json.decode(data, type=_Written)
        except msgspec.DecodeError:
            raise AnchorError(f"the {self._place.name} is damaged; {_WAY_OUT}") from None
        if not hmac.compare_digest(written.mac, self._mac(written.points)):
            raise AnchorError(f"the {self._place.name} was changed, or is another pool's; {_WAY_OUT}")
        return written.points

    def write(self, points: Sequence[Point]) -> None:
        """Put these points in the place of what is there.

        Raises:
            PoolError, StorageError: the place cannot be written.
        """
        if self._place is not None:
            written = _Written(points=list(points), mac=self._mac(points))
            self._place.replace(msgspec.json.encode(written) + b"\n")

    def follow(self, pool: "Pool") -> None:
        """Put the end of the pool's chain there, unless it is there already."""
        if self._place is None:
            return
        with pool.read() as database:
            end = point_of(database)
        if self._written is not None and (self._written.pool_id, self._written.seq) == (end.pool_id, end.seq):
            return
        point = pool.submit(lambda database: point_of(database, note(database))).result()
        self.write([point])
        self._written = point

    def check(self, database: "Database") -> None:
        """See that this pool is where its anchor says, or further.

        Raises:
            AnchorError: it is an older copy, has another history, or is another pool; or its anchor is gone.
        """
        if self._place is None:
            return
        problems = [_problem(database, point) for point in self.read()] or [_unanchored(database)]
        if all(problems):
            raise AnchorError(f"{problems[0]} ({self._place.name}); {_WAY_OUT}")

    def _mac(self, points: Sequence[Point]) -> bytes:
        return hmac.digest(self._key, msgspec.json.encode(points), hashlib.sha256)


def _problem(database: "Database", point: Point) -> str:
    """Why the pool is not one that came to this point; empty if it is."""
    then = datetime.fromtimestamp(point.at_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    if not _has_chain(database):
        return f"the pool is older than it was: it had change {point.seq} at {then}, and has no chain of changes yet"
    end = point_of(database)
    if end.pool_id != point.pool_id:
        return f"this is another pool ({end.pool_id}) than was here at {then} ({point.pool_id})"
    if end.seq < point.seq:
        return f"the pool is older than it was: it ends with change {end.seq}, and had change {point.seq} at {then}"
    if point.seq and head_at(database, point.seq) != point.head:
        return f"the pool's changes up to {point.seq} are not those that it had at {then}"
    return ""


def _unanchored(database: "Database") -> str:
    """What to say of a pool without an anchor: it had one if its chain has noted a head for it."""
    last = database.conn.execute("SELECT max(seq) FROM heads").fetchone()[0] if _has_chain(database) else None
    return "" if last is None else f"the pool's anchor is gone, and it had one at change {last}"


def _has_chain(database: "Database") -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE name IN ('chain', 'heads')"
    return bool(database.conn.execute(query).fetchone()[0] == 2)
