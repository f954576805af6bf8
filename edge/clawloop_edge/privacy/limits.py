"""Lower levels that the owner set for one app or one session, and the pause of everything. Format:
docs/formats/outbox.md. Stores and finds them; what they mean together is consent's.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.ladder import Ladder
from clawloop_edge.privacy.policy import POLICY_VERSION, as_meant
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database


class Subject(StrEnum):
    """What a limit holds for."""

    APP = "app"
    """the sessions of one app"""
    SESSION = "session"
    """one session"""
    PAUSE = "pause"
    """everything, for a time"""


class Limit(msgspec.Struct, frozen=True, kw_only=True, tag="limit.v1"):
    """At most this may leave of its subject. A limit that was lifted stays, because what was kept under it does not
    leave. `until_ms` is when a pause ends by itself; 0: it does not, or has ended.
    """

    subject: Subject
    name: str
    ladder: Ladder
    set_ms: int
    until_ms: int = 0
    policy_version: int = 2

    @property
    def level(self) -> Level:
        """The most that may leave of what is kept from now on."""
        return self.ladder.latest


class Limits:
    """The limits of a pool. Its methods work inside any transaction or snapshot."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def find(self, database: "Database", subject: Subject, *, name: str = "") -> Limit | None:
        """The limit of a subject; None if none was ever set."""
        limit_id = self._id(subject, name)
        row = database.conn.execute("SELECT body FROM limits WHERE limit_id = ?", (limit_id,)).fetchone()
        return self._open(database, limit_id, row[0]) if row else None

    def all(self, database: "Database") -> Iterator[Limit]:
        """All limits, also those that were lifted."""
        for limit_id, body in database.conn.execute("SELECT limit_id, body FROM limits ORDER BY limit_id"):
            yield self._open(database, limit_id, body)

    def apps_in(self, database: "Database", session_id: str) -> frozenset[str]:
        """The apps that the steps of a session came from. Opens them all, so only where an app has a limit; else none:
        nobody needs to know."""
        if not any(limit.subject is Subject.APP for limit in self.all(database)):
            return frozenset()
        return frozenset(app for _, app, _ in Reading(database, self._pool.keyring).labels(session_id))

    def put(self, database: "Database", limit: Limit) -> None:
        """Keep a limit in the place of the one before. Needs a write transaction."""
        limit_id = self._id(limit.subject, limit.name)
        limit = msgspec.structs.replace(limit, policy_version=POLICY_VERSION)
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("limits", limit_id, column="body", plain=msgspec.msgpack.encode(limit))
        database.conn.execute("INSERT OR REPLACE INTO limits (limit_id, body) VALUES (?, ?)", (limit_id, body))

    def remove(self, database: "Database", subject: Subject, *, name: str) -> None:
        """Forget a limit together with what it was for. Needs a write transaction."""
        database.conn.execute("DELETE FROM limits WHERE limit_id = ?", (self._id(subject, name),))

    def _id(self, subject: Subject, name: str) -> str:
        return self._pool.tag(f"limit/{subject}", name.encode("utf-8", "surrogatepass")).hex()

    def _open(self, database: "Database", limit_id: str, body: bytes) -> Limit:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        found = msgspec.msgpack.decode(scope.unseal("limits", limit_id, column="body", sealed=body), type=Limit)
        return msgspec.structs.replace(found, ladder=as_meant(found.ladder, found.policy_version))
