"""What was forgotten, as blind tags alone: so that the same ids are never kept again, and a conversation that goes on
after it was forgotten is known. Works inside any transaction or snapshot. Format: docs/formats/pool.md.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from clawloop_edge.pool.crypt import blind

if TYPE_CHECKING:
    from sqlite_utils import Database

_TAG_BYTES = 16
STEP, SIGNAL, SESSION = "step", "signal", "session"


def tombstone_table(database: "Database") -> None:
    """A migration: the tags of what was forgotten."""
    database.execute("CREATE TABLE tombstones (tag BLOB PRIMARY KEY) STRICT, WITHOUT ROWID")


class Tombstones:
    """The tombstones of a pool. A tag is 16 bytes of an HMAC; nothing can be read from it without the index key."""

    def __init__(self, index_key: bytes) -> None:
        self._index_key = index_key

    def forgot(self, database: "Database", **ids: str) -> bool:
        """Whether one of these ids, each under its kind (`step=`, `signal=`, `session=`), was forgotten."""
        return bool(_found(database, [self._tag(kind, record_id) for kind, record_id in ids.items()]))

    def forgot_lookup(self, database: "Database", tags: Iterable[bytes]) -> bool:
        """Whether a forgotten step could be found by one of these look-ups (`Pool.tag`)."""
        return bool(_found(database, [tag[:_TAG_BYTES] for tag in tags]))

    def forgotten_sessions(self, database: "Database", session_ids: Collection[str]) -> set[str]:
        """Those of `session_ids` that were forgotten."""
        tags = {self._tag(SESSION, session_id): session_id for session_id in session_ids}
        return {tags[tag] for tag in _found(database, tags)}

    def add(self, database: "Database", kind: str, *, record_ids: Iterable[str]) -> None:
        """Never keep these again. Needs a write transaction."""
        _insert(database, (self._tag(kind, record_id) for record_id in record_ids))

    def add_lookups(self, database: "Database", tags: Iterable[bytes]) -> None:
        """Know these look-ups for those of forgotten steps. Needs a write transaction."""
        _insert(database, (tag[:_TAG_BYTES] for tag in tags))

    def _tag(self, kind: str, record_id: str) -> bytes:
        value = record_id.encode("utf-8", "surrogatepass")
        return blind(self._index_key, f"tombstone/{kind}", value=value)[:_TAG_BYTES]


def any_tombstone(database: "Database") -> bool:
    """Whether anything was ever forgotten."""
    return database.conn.execute("SELECT 1 FROM tombstones LIMIT 1").fetchone() is not None


def _found(database: "Database", tags: Collection[bytes]) -> list[bytes]:
    run = database.conn.execute
    return [tag for tag in tags if run("SELECT 1 FROM tombstones WHERE tag = ?", (tag,)).fetchone()]


def _insert(database: "Database", tags: Iterable[bytes]) -> None:
    database.conn.executemany("INSERT OR IGNORE INTO tombstones (tag) VALUES (?)", ((tag,) for tag in tags))
