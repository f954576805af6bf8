"""Checking a pool from end to end, and counting what is in it. Reads on any connection; changes nothing."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import PoolReport
from clawloop_edge.pool.tally import read_counts, recount
from clawloop_shared.database import sqlcipher
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from sqlite_utils import Database

_MAX_PROBLEMS = 100


class SealedColumn(NamedTuple):
    """A sealed column: where it is, the SQL expression that names each row, and the one that names its scope."""

    table: str
    column: str
    record: str
    scope: str = f"'{POOL_SCOPE}'"


_SESSION = "'session/' || session_id"
SEALED = (
    SealedColumn("state", "body", "name"),
    SealedColumn("sessions", "summary", "session_id", _SESSION),
    SealedColumn("steps", "tokens", "step_id", _SESSION),
    SealedColumn("steps", "talk", "step_id", _SESSION),
    SealedColumn("parts", "body", "part_id", _SESSION),
    SealedColumn("signals", "body", "signal_id", _SESSION),
    SealedColumn("tallies", "label", "tally_id"),
)


def count_pool(database: "Database") -> dict[str, int]:
    """The counts of `PoolStats`, from the plain columns alone."""
    row = database.conn.execute(
        "SELECT (SELECT count(*) FROM sessions), (SELECT coalesce(sum(steps), 0) FROM sessions),"
        " (SELECT coalesce(sum(trainable), 0) FROM sessions), (SELECT count(*) FROM signals),"
        " (SELECT coalesce(sum(size), 0) FROM steps) + (SELECT coalesce(sum(size), 0) FROM parts),"
        " (SELECT coalesce(max(seq), 0) FROM changes)"
    ).fetchone()
    names = ("sessions", "steps", "trainable", "signals", "payload_bytes", "last_seq")
    return dict(zip(names, row, strict=True))


def verify_pool(database: "Database", keyring: Keyring, *, extra: Sequence[SealedColumn] = ()) -> PoolReport:
    """Check pages and references, open every sealed column, rebuild every step, and compare the counts."""
    problems = list(_check_file(database))
    sealed = 0
    for column in (*SEALED, *extra):
        opened, found = _open_column(database, keyring, column=column)
        sealed += opened
        problems += found
    if not problems:
        problems += _rebuild(database, keyring)
    if not problems:
        problems += _recount(database, keyring)
    counts = count_pool(database)
    return PoolReport(
        sessions=counts["sessions"],
        steps=counts["steps"],
        signals=counts["signals"],
        sealed=sealed,
        problems=problems[:_MAX_PROBLEMS],
    )


def _check_file(database: "Database") -> Iterator[str]:
    try:
        for pragma in ("cipher_integrity_check", "integrity_check", "foreign_key_check"):
            for row in database.conn.execute(f"PRAGMA {pragma}"):
                if row[0] != "ok":
                    yield f"{pragma}: {' '.join(str(value) for value in row)}"
    except sqlcipher().DatabaseError as error:
        yield f"the file is damaged: {error}; restore a backup"


def _open_column(database: "Database", keyring: Keyring, *, column: SealedColumn) -> tuple[int, list[str]]:
    query = (
        f"SELECT {column.record}, {column.scope}, {column.column} FROM {column.table}"  # noqa: S608  # names of ours
        f" WHERE {column.column} IS NOT NULL"
    )
    opened, problems = 0, []
    try:
        for record, scope, sealed in database.conn.execute(query):
            try:
                keyring.find(database, scope).unseal(column.table, record, column=column.column, sealed=sealed)
                opened += 1
            except ClawloopError as error:
                problems.append(f"{column.table}.{column.column} of {record}: {error}")
    except sqlcipher().DatabaseError as error:
        problems.append(f"{column.table} cannot be read: {error}; restore a backup")
    return opened, problems[:_MAX_PROBLEMS]


def _rebuild(database: "Database", keyring: Keyring) -> Iterator[str]:
    for session_id, steps, trainable in database.conn.execute("SELECT session_id, steps, trainable FROM sessions"):
        try:
            kept = [step.step.trainable for step in Reading(database, keyring).session_steps(session_id)]
        except ClawloopError as error:
            yield f"session {session_id}: {error}"
            continue
        if (len(kept), sum(kept)) != (steps, trainable):
            yield f"session {session_id} counts {steps} steps ({trainable} trainable) but has {len(kept)} ({sum(kept)})"


def _recount(database: "Database", keyring: Keyring) -> Iterator[str]:
    counted = {(count.kind, count.app, count.untrainable): count.steps for count in read_counts(database, keyring)}
    wrong = sorted(label for label, _ in counted.items() ^ recount(database, keyring).items())
    for label in dict.fromkeys(wrong):
        yield f"tallies: the number of steps that are {' / '.join(filter(None, label))} is not what is kept"
