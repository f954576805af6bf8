"""The encrypted database: one key, whole transactions, migrations that run once."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from clawloop_shared.database import engine, migrate, open_database, transaction
from clawloop_shared.errors import KeyMissing, StorageError

if TYPE_CHECKING:
    from sqlite_utils import Database

KEY = bytes(range(32))


def numbers(database: "Database") -> list[int]:
    return [row[0] for row in database.execute("SELECT number FROM numbers ORDER BY number")]


def write(database: "Database", *statements: str, then: Exception | None = None) -> None:
    """Run statements in one transaction, and fail at its end if told to."""
    with transaction(database):
        for statement in statements:
            database.execute(statement)
        if then:
            raise then


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An encrypted database with the numbers 1 and 2 in it."""
    path = tmp_path / "numbers.db"
    database = open_database(path, KEY)
    with transaction(database):
        database.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO numbers VALUES (1), (2)")
    database.close()
    return path


def test_the_file_is_its_owners_alone_and_opens_under_its_key(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.read_bytes().startswith(b"SQLite format 3")
    database = open_database(path, KEY)
    assert numbers(database) == [1, 2]
    database.close()


def test_another_key_is_refused_and_the_file_stays(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(KeyMissing, match="does not open with this key"):
        open_database(path, bytes(32))
    assert path.read_bytes() == before


def test_a_plain_file_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("some notes\n" * 500)
    with pytest.raises(KeyMissing):
        open_database(path, KEY)


def test_a_missing_file_is_not_made_for_reading(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot open"):
        open_database(tmp_path / "none" / "pool.db", KEY, read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_read_only_connection_does_not_write(path: Path) -> None:
    database = open_database(path, KEY, read_only=True)
    with pytest.raises(StorageError, match="could not be written"), transaction(database):
        database.execute("INSERT INTO numbers VALUES (3)")
    assert numbers(database) == [1, 2]
    database.close()


def test_a_failed_transaction_leaves_nothing_and_the_connection_goes_on(path: Path) -> None:
    database = open_database(path, KEY)
    with pytest.raises(ZeroDivisionError):
        write(database, "INSERT INTO numbers VALUES (3)", then=ZeroDivisionError())
    with pytest.raises(engine().IntegrityError), transaction(database):
        database.execute("INSERT INTO numbers VALUES (4), (1)")
    with transaction(database):
        database.execute("INSERT INTO numbers VALUES (5)")
    assert numbers(database) == [1, 2, 5]
    database.close()


def test_a_transaction_that_the_engine_ended_tells_the_first_cause(path: Path) -> None:
    database = open_database(path, KEY)
    with pytest.raises(ValueError, match="the first cause"):
        write(database, "ROLLBACK", then=ValueError("the first cause"))
    assert not database.conn.in_transaction
    database.close()


def test_a_full_disk_is_said_and_nothing_of_the_transaction_stays(path: Path) -> None:
    database = open_database(path, KEY)
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StorageError, match="full"):
        write(database, "CREATE TABLE large (text TEXT)", "INSERT INTO large VALUES (randomblob(1000000))")
    assert not database.conn.in_transaction
    assert database.table_names() == ["numbers"]
    database.close()


def test_migrations_run_once_and_in_order_whoever_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    ran: list[str] = []

    def first(database: "Database") -> None:
        ran.append("first")
        database.execute("CREATE TABLE one (a TEXT)")

    def second(database: "Database") -> None:
        ran.append("second")
        database.execute("ALTER TABLE one ADD COLUMN b TEXT")

    def opened() -> None:
        database = open_database(path, KEY)
        migrate(database, "test", migrations=(first, second))
        database.close()

    open_database(path, KEY).close()
    threads = [threading.Thread(target=opened) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == ["first", "second"]


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    database = open_database(tmp_path / "new.db", KEY)

    def broken(database: "Database") -> None:
        database.execute("CREATE TABLE one (a TEXT)")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        migrate(database, "test", migrations=(broken,))
    assert database.table_names() == []
    database.close()
