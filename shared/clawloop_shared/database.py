"""Opening a SQLCipher database through sqlite-utils, and nothing of what is in it.

sqlite-utils looks for `pysqlite3` before the standard library, so SQLCipher's module is given that name before the
first import; without it sqlite-utils would catch the wrong exception classes.

Where SQLCipher's module cannot be imported, the standard library's engine stands in for those who seal their rows
themselves (`rows_sealed`), and for nobody else. An SQLite before 3.51.3 can corrupt a log that two connections write
or copy at the same instant (sqlite.org/wal.html, "WAL-reset bug"); there, writers of all processes take turns.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clawloop_shared.errors import KeyMissing, StorageError

if TYPE_CHECKING:
    from sqlite_utils import Database

BUSY_TIMEOUT_MS = 10_000
_PLAIN = b"SQLite format 3\0"
"""how a file begins that is not encrypted"""
_OLDEST = (3, 38, 0)
"""STRICT tables, RETURNING, json_each"""
_STATEMENTS = 512
"""compiled statements that a connection remembers. The module's cache lets go of the one that came last: full of what a
first opening runs once (its own choice is 100), it would have every statement compiled at each use."""
_LOGS_SAFE_FROM = (3, 51, 3)
_TURN_POLL_S = 0.005


@cache
def engine() -> Any:
    """SQLCipher's DB-API module, known to sqlite-utils from now on; else the standard library's."""
    try:
        import sqlcipher3
    except ImportError:
        import sqlite3

        return sqlite3
    sys.modules.setdefault("pysqlite3", sqlcipher3)
    sys.modules.setdefault("pysqlite3.dbapi2", sqlcipher3.dbapi2)
    return sqlcipher3.dbapi2


def encrypts() -> bool:
    """Whether the engine at hand encrypts whole files."""
    name: str = engine().__name__
    return name.startswith("sqlcipher3")


def is_fault(error: BaseException) -> bool:
    """Whether the engine's error is of the disk or the file (full, read-only, damaged, held), not of the statement."""
    return type(error) in (engine().OperationalError, engine().DatabaseError)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the engine finds wrong with the file at `path` becomes a StorageError."""
    try:
        yield
    except engine().DatabaseError as error:
        if not is_fault(error):
            raise
        raise StorageError(f"{path} is damaged or cannot be read: {error}; restore a backup") from error


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


def open_database(path: Path, key: bytes, *, read_only: bool = False, rows_sealed: bool = False) -> Database:
    """A connection to the database at `path` under a raw 256-bit key. Made (0600) if it is missing.

    A connection may move between threads, but only one at a time may use it. Transactions are explicit (`transaction`).
    `rows_sealed`: the caller seals what must not be read, so that the file may be plain where nothing can encrypt it.

    Raises:
        KeyMissing: the key is not the one that the file was made with, or the file is no database of ours.
        StorageError: the file cannot be opened, or only by another engine.
    """
    with _without("numpy", "pandas"):
        from sqlite_utils import Database

    _check_engine(path, rows_sealed=rows_sealed)
    try:
        if not path.exists() and not read_only:
            path.touch(mode=0o600)
        connection = engine().connect(
            str(path), isolation_level=None, check_same_thread=False, cached_statements=_STATEMENTS
        )
    except (OSError, engine().Error) as error:
        raise StorageError(f"cannot open {path}: {_reason(error)}; check that its folder is yours") from error
    try:
        _prepare(connection, key, read_only=read_only)
    except engine().DatabaseError as error:
        connection.close()
        if "not a database" in str(error):
            raise KeyMissing(
                f"{path} does not open with this key, or its first page is damaged; "
                "restore the key it was made with, or a backup"
            ) from error
        raise StorageError(f"cannot open {path}: {error}; check free disk space and rights") from error
    return Database(connection)


def encrypt_file(path: Path, key: bytes) -> None:
    """Have SQLCipher encrypt the plain database at `path`, which nobody else has open, under a raw 256-bit key.

    Raises:
        StorageError: it is no database, or the disk is full.
    """
    draft = path.with_name(f"{path.name}.encrypted")
    draft.touch(mode=0o600)
    connection = engine().connect(str(path), isolation_level=None)
    try:
        connection.execute(f"ATTACH ? AS encrypted KEY \"x'{key.hex()}'\"", (str(draft),))
        connection.execute("PRAGMA encrypted.auto_vacuum = INCREMENTAL")
        connection.execute("SELECT sqlcipher_export('encrypted')").fetchone()
        connection.execute("DETACH encrypted")
    except engine().DatabaseError as error:
        raise StorageError(f"cannot encrypt {path}: {error}; check free disk space") from error
    finally:
        connection.close()
    draft.replace(path)


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _check_engine(path: Path, *, rows_sealed: bool) -> None:
    """Raises StorageError: the engine at hand is not one that may open this file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_PLAIN))
    except FileNotFoundError:
        start = b""
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}; check that it is yours") from error
    if encrypts():
        if start == _PLAIN:
            raise StorageError(
                f"{path} was made where SQLCipher is missing, so it is not encrypted as a whole, and is left as it is; "
                "open it where the module sqlcipher3 is missing too, and bring a backup of it here"
            )
        return
    if start not in (b"", _PLAIN):
        raise StorageError(f"{path} is encrypted by SQLCipher, whose module is missing here; pip install sqlcipher3")
    if not rows_sealed:
        raise StorageError(f"{path} must be encrypted, and SQLCipher's module is missing; pip install sqlcipher3")
    if engine().sqlite_version_info < _OLDEST:
        raise StorageError(f"SQLite {engine().sqlite_version} is too old for {path}; pip install sqlcipher3")


def _prepare(connection: Any, key: bytes, *, read_only: bool) -> None:
    run = connection.execute
    if encrypts():
        run("PRAGMA cipher_log_level = NONE")
        # HMAC-SHA256 authenticates a page in half the time of SQLCipher's default, HMAC-SHA512; also one of ATTACH.
        run("PRAGMA cipher_default_hmac_algorithm = HMAC_SHA256")
        run(f"PRAGMA key = \"x'{key.hex()}'\"")
    run(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    run("PRAGMA temp_store = MEMORY")
    if run("PRAGMA page_count").fetchone()[0] == 0:  # on any other file this pragma would write at each opening
        run("PRAGMA auto_vacuum = INCREMENTAL")  # so that the file's size can follow what it holds
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
    connection = database.conn
    try:
        with turn(database):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield database
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise
    except engine().DatabaseError as error:
        if not is_fault(error):
            raise
        raise StorageError(f"the database could not be written: {error}; check free disk space and rights") from error


@contextmanager
def turn(database: Database) -> Iterator[None]:
    """Held while a connection writes, or copies the log into the database: with an old SQLite, by one at a time.

    Not to be taken twice by one thread.

    Raises:
        StorageError: somebody else has held it for longer than `BUSY_TIMEOUT_MS`.
    """
    if engine().sqlite_version_info >= _LOGS_SAFE_FROM:
        yield
        return
    path: str = database.conn.execute("PRAGMA database_list").fetchone()[2]
    handle = os.open(f"{path}.turn", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(handle, path)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, path: str) -> None:
    until = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise StorageError(
                    f"the database is locked: another process has written to {path} all the time"
                ) from None
        time.sleep(_TURN_POLL_S)


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
