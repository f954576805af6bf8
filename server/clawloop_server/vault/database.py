"""One connection to server.db for one part of one process, with its lock; several processes may hold one each.

A write joins the transaction that the same thread has open, so that parts can be combined into one. Knows no table
but the one that names the vault; the tables are in `schema`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clawloop_server.vault.schema import migrate
from clawloop_shared.database import open_database, transaction
from clawloop_shared.envelope import derive_key
from clawloop_shared.errors import StorageError

if TYPE_CHECKING:
    from sqlite_utils import Database


class ServerDatabase:
    """server.db, safe to use from any thread, one at a time."""

    def __init__(self, database: Database, vault_id: str, path: Path) -> None:
        self.vault_id, self.path = vault_id, path
        self._database = database
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path, master_key: bytes) -> ServerDatabase:
        """Open (or make) the database and bring its tables up to date.

        Raises:
            KeyMissing: the master key is another one.
            StorageError: the file cannot be opened or written.
        """
        database = open_database(path, derive_key(master_key, "clawloop server.db"))
        try:
            migrate(database)
            row = database.execute("SELECT value FROM meta WHERE name = 'vault_id'").fetchone()
        except BaseException:
            database.close()
            raise
        return cls(database, row[0], path)

    @contextmanager
    def write(self) -> Iterator[ServerDatabase]:
        """One transaction, all or nothing; inside another one of this thread it becomes a part of it.

        Raises:
            StorageError: the disk is full or broken; nothing of it is kept.
        """
        with self._lock:
            if self._database.conn.in_transaction:
                yield self
                return
            with transaction(self._database):
                yield self

    @contextmanager
    def snapshot(self) -> Iterator[ServerDatabase]:
        """Reads that see one state, whatever other processes write meanwhile; holds up none of them."""
        with self._lock:
            if self._database.conn.in_transaction:
                yield self
                return
            self._database.execute("BEGIN")
            try:
                yield self
            finally:
                self._database.execute("ROLLBACK")

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run one statement inside `write`; how many rows it changed."""
        with self._lock:
            return int(self._database.execute(sql, list(values)).rowcount)

    def run_each(self, sql: str, values: Iterable[Sequence[Any]]) -> None:
        """Run one statement inside `write`, once for each of `values`."""
        with self._lock:
            self._database.conn.executemany(sql, values)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self._lock:
            return list(self._database.execute(sql, list(values)).fetchall())

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a query."""
        with self._lock:
            found: tuple[Any, ...] | None = self._database.execute(sql, list(values)).fetchone()
            return found

    def count(self, sql: str, values: Sequence[Any] = ()) -> int:
        """The number that a query gives in its first row."""
        found = self.row(sql, values)
        return int(found[0] or 0) if found else 0

    def scrub(self) -> None:
        """Write the log back and empty it, so that what was deleted is in no page of the files (security by
        `secure_delete` needs both).

        Raises:
            StorageError: another process reads on and on, so old pages may still be in the log.
        """
        with self._lock:
            busy = self.count("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise StorageError("it is deleted, but the log could not be emptied while it is read; run it again")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._database.close()
