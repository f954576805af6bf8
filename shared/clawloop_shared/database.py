"""Opening a SQLCipher database through sqlite-utils, and nothing of what is in it.

sqlite-utils looks for `pysqlite3` before the standard library, so SQLCipher's module is given that name before the
first import; without it sqlite-utils would catch the wrong exception classes. SQLCipher's own SQLite (3.53) has the
fix for the WAL-reset corruption that the standard library's engine may lack (fixed in SQLite 3.51.3).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clawloop_shared.errors import KeyMissing, StorageError

if TYPE_CHECKING:
    from sqlite_utils import Database

BUSY_TIMEOUT_MS = 10_000


def sqlcipher() -> Any:
    """SQLCipher's DB-API module, known to sqlite-utils from now on."""
    import sqlcipher3

    sys.modules.setdefault("pysqlite3", sqlcipher3)
    sys.modules.setdefault("pysqlite3.dbapi2", sqlcipher3.dbapi2)
    return sqlcipher3.dbapi2


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """The first import of sqlite-utils does not find these. It would load them (numpy alone: 10 MiB) to know how their
    values are stored, and none of ours are theirs."""
    hidden = [name for name in names if name not in sys.modules] if "sqlite_utils" not in sys.modules else []
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python's import system takes as "there is none"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def open_database(path: Path, key: bytes, *, read_only: bool = False) -> Database:
    """A connection to the database at `path` under a raw 256-bit key. Made (0600) if it is missing.

    A connection may move between threads, but only one at a time may use it. Transactions are explicit (`transaction`).

    Raises:
        KeyMissing: the key is not the one that the file was made with, or the file is no database of ours.
        StorageError: the file cannot be opened.
    """
    engine = sqlcipher()
    with _without("numpy", "pandas"):
        from sqlite_utils import Database

    if not path.exists() and not read_only:
        path.touch(mode=0o600)
    try:
        connection = engine.connect(str(path), isolation_level=None, check_same_thread=False)
    except engine.Error as error:
        raise StorageError(f"cannot open {path}: {error}") from error
    try:
        _prepare(connection, key, read_only=read_only)
    except engine.DatabaseError as error:
        connection.close()
        if "not a database" in str(error):
            raise KeyMissing(f"{path} does not open with this key; restore the key it was made with") from error
        raise StorageError(f"cannot open {path}: {error}") from error
    return Database(connection)


def _prepare(connection: Any, key: bytes, *, read_only: bool) -> None:
    run = connection.execute
    run("PRAGMA cipher_log_level = NONE")
    run(f"PRAGMA key = \"x'{key.hex()}'\"")
    run(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    run("PRAGMA temp_store = MEMORY")
    run("SELECT count(*) FROM sqlite_master").fetchone()
    if read_only:
        run("PRAGMA query_only = ON")
        return
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")
    run("PRAGMA fullfsync = 1")
    run("PRAGMA checkpoint_fullfsync = 1")
    run("PRAGMA secure_delete = ON")
    run("PRAGMA foreign_keys = ON")


@contextmanager
def transaction(database: Database) -> Iterator[Database]:
    """One explicit write transaction: all or nothing.

    Raises:
        StorageError: the disk is full, read-only or broken, or another process holds the database for longer than
            `BUSY_TIMEOUT_MS`; nothing of the transaction is kept.
    """
    engine = sqlcipher()
    connection = database.conn
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield database
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk has ended it already
                connection.execute("ROLLBACK")
            raise
    except engine.OperationalError as error:
        raise StorageError(f"the database could not be written: {error}; check free disk space and rights") from error


def migrate(database: Database, name: str, *, migrations: Sequence[Callable[[Database], None]]) -> None:
    """Run those of `migrations` (known by their function names, in this order) that have not run on this database.

    Each runs once, recorded in the transaction that runs it; several processes may do this at once on a new database.
    A migration that was released is never changed: add another.
    """
    from sqlite_utils.migrations import Migrations

    known = Migrations(name)
    for migration in migrations:
        known()(migration)
    if not known.pending(database):
        return
    with transaction(database):
        known.apply(database)
