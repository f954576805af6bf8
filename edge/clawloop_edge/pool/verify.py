"""Checking a pool from end to end, and counting what is in it. Reads on any connection; changes nothing."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from clawloop_edge.pool.crypt import INDEX_SCOPE, POOL_SCOPE, Keyring
from clawloop_edge.pool.heads import CHAINED, Chained, chain_key_of, check
from clawloop_edge.pool.parts import used_parts
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import PoolReport
from clawloop_edge.pool.rows import Rows
from clawloop_edge.pool.tally import read_counts, recount
from clawloop_shared.database import engine
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from sqlite_utils import Database

_MAX_PROBLEMS = 100

Progress = Callable[[str, int, int], None]
"""called with what is being done, how much of it is done, and how much there is"""


def in_silence(_what: str, _done: int, _total: int) -> None:
    """A `Progress` that nobody looks at."""


class SealedColumn(NamedTuple):
    """A sealed column: where it is, and SQL expressions: what names each row, its scope, and the step whose `talk` is
    its dictionary (NULL: it has none)."""

    table: str
    column: str
    record: str
    scope: str = f"'{POOL_SCOPE}'"
    root: str = "NULL"


_SESSION = "'session/' || session_id"
SEALED = (
    SealedColumn("state", "body", "name"),
    SealedColumn("sessions", "summary", "session_id", _SESSION),
    SealedColumn("steps", "tokens", "step_id", _SESSION),
    SealedColumn("steps", "talk", "step_id", _SESSION, "root"),
    SealedColumn("parts", "body", "part_id", _SESSION),
    SealedColumn("shared_parts", "body", "part_id", "part_id"),
    SealedColumn("signals", "body", "signal_id", _SESSION),
    SealedColumn("tallies", "label", "tally_id"),
)


def count_pool(database: "Database") -> dict[str, int]:
    """The counts of `PoolStats`, from the plain columns alone."""
    row = database.conn.execute(
        "SELECT count(*), coalesce(sum(steps), 0), coalesce(sum(trainable), 0), (SELECT count(*) FROM signals),"
        " coalesce(sum(size), 0) + (SELECT coalesce(sum(size), 0) FROM shared_parts), (SELECT seq FROM chain)"
        " FROM sessions"
    ).fetchone()
    names = ("sessions", "steps", "trainable", "signals", "payload_bytes", "last_seq")
    return dict(zip(names, row, strict=True))


def verify_pool(
    database: "Database",
    keyring: Keyring,
    *,
    extra: Sequence[SealedColumn] = (),
    chained: Sequence[Chained] = (),
    progress: Progress = in_silence,
) -> PoolReport:
    """Check pages, references and the chain, open every sealed column, rebuild every step, and compare the counts."""
    columns = (*SEALED, *extra)
    progress("checking pages", 0, 1)
    problems = list(_check_file(database))
    sealed = 0
    for number, column in enumerate(columns):
        opened, found = _open_column(database, keyring, column=column)
        sealed += opened
        problems += found
        progress("opening rows", number + 1, len(columns))
    if not problems:
        progress("checking the chain", 0, 1)
        chain_key = chain_key_of(keyring.find(database, INDEX_SCOPE).key)
        problems += islice(check(database, chain_key, chained=(*CHAINED, *chained)), _MAX_PROBLEMS)
    if not problems:
        problems += [*_check_sums(database), *_rebuild(database, keyring, progress=progress)]
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
                    found = " ".join(str(value) for value in row)
                    yield f"{pragma}: {' '.join(found.split())}"
    except engine().DatabaseError as error:
        yield f"the file is damaged: {error}; restore a backup"


def _open_column(database: "Database", keyring: Keyring, *, column: SealedColumn) -> tuple[int, list[str]]:
    query = (
        f"SELECT {column.record}, {column.scope}, {column.root}, {column.column}"  # noqa: S608  # names of ours
        f" FROM {column.table} WHERE {column.column} IS NOT NULL"
    )
    opened, problems = 0, []
    rows = Rows(database, keyring)
    try:
        for record, scope, root, sealed in database.conn.execute(query):
            try:
                dictionary = None if root is None else rows.dictionary(root)
                unseal = keyring.find(database, scope).unseal
                unseal(column.table, record, column=column.column, sealed=sealed, dictionary=dictionary)
                opened += 1
            except ClawloopError as error:
                problems.append(f"{column.table}.{column.column} of {record}: {error}")
    except engine().DatabaseError as error:
        problems.append(f"{column.table} cannot be read: {error}; restore a backup")
    return opened, problems[:_MAX_PROBLEMS]


def _check_sums(database: "Database") -> Iterator[str]:
    run = database.conn.execute
    sizes = (
        "SELECT session_id, size, (SELECT coalesce(sum(size), 0) FROM steps WHERE steps.session_id = s.session_id)"
        " + (SELECT coalesce(sum(size), 0) FROM parts WHERE parts.session_id = s.session_id) AS found"
        " FROM sessions AS s WHERE size != found"
    )
    for session_id, size, found in run(sizes):
        yield f"session {session_id} counts {size} bytes but has {found}"
    for (part_id,) in run("SELECT part_id FROM shared_parts WHERE part_id NOT IN (SELECT part_id FROM part_refs)"):
        yield f"{part_id} is used by no session"


def _rebuild(database: "Database", keyring: Keyring, *, progress: Progress) -> Iterator[str]:
    rows = database.conn.execute("SELECT session_id, steps, trainable FROM sessions").fetchall()
    for number, (session_id, steps, trainable) in enumerate(rows):
        progress("rebuilding sessions", number, len(rows))
        reading = Reading(database, keyring)
        try:
            kept = [step.step.trainable for step in reading.session_steps(session_id)]
        except ClawloopError as error:
            yield f"session {session_id}: {error}"
            continue
        if (len(kept), sum(kept)) != (steps, trainable):
            yield f"session {session_id} counts {steps} steps ({trainable} trainable) but has {len(kept)} ({sum(kept)})"
        for part_id in sorted(reading.shared_parts - set(used_parts(database, session_id))):
            yield f"session {session_id} uses {part_id}, which does not know it"


def _recount(database: "Database", keyring: Keyring) -> Iterator[str]:
    counted = {(count.kind, count.app, count.untrainable): count.steps for count in read_counts(database, keyring)}
    wrong = sorted(label for label, _ in counted.items() ^ recount(database, keyring).items())
    for label in dict.fromkeys(wrong):
        yield f"tallies: the number of steps that are {' / '.join(filter(None, label))} is not what is kept"
