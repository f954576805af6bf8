"""What waits to be judged: one row for each case and scorer, in the pool's database, so that a restart forgets nothing.

The cursor into the pool's steps moves in the transaction that adds the rows; a row goes once its signals are on disk,
or it was given up. Holds ids and times, nothing of what was said. Format: docs/formats/pool.md.
"""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.forgetting import Going
from clawloop_edge.pool.heads import current
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.signals.protocol import Moment
from clawloop_shared.records import Target

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

CURSOR = "signals.cursor"
"""state: the last change (8 bytes, big-endian) whose step was looked at"""
_TABLES = (
    """CREATE TABLE signal_cases (
        case_id INTEGER PRIMARY KEY, scorer TEXT NOT NULL, moment TEXT NOT NULL, target TEXT NOT NULL,
        target_id TEXT NOT NULL, session_id TEXT NOT NULL, step_id TEXT NOT NULL, next_id TEXT NOT NULL,
        due_ms INTEGER NOT NULL, tries INTEGER NOT NULL,
        UNIQUE (session_id, target_id, scorer, moment, target)
    ) STRICT""",
    "CREATE INDEX signal_cases_due ON signal_cases (scorer, due_ms)",
    "CREATE INDEX signal_cases_open ON signal_cases (target, due_ms) WHERE moment = 'ended'",
)
_COLUMNS = "moment, target, target_id, session_id, step_id, next_id, due_ms"
_INSERT = (
    f"INSERT INTO signal_cases (scorer, {_COLUMNS}, tries) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0)"  # noqa: S608
    " ON CONFLICT DO UPDATE SET step_id = excluded.step_id, due_ms = excluded.due_ms WHERE moment = 'ended'"
)
_DUE = (
    f"SELECT {_COLUMNS}, case_id, tries FROM signal_cases WHERE scorer = ? AND due_ms <= ?"  # noqa: S608
    " ORDER BY due_ms, case_id LIMIT ?"
)
_DROP_ENDED = "DELETE FROM signal_cases WHERE moment = 'ended' AND session_id = ? AND target = 'run' AND target_id = ?"


class Entry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A case that is to be judged by and by. `step_id` is the step with the answer, `next_id` the one after it."""

    moment: Moment
    target: Target
    target_id: str
    session_id: str
    step_id: str
    next_id: str = ""
    due_ms: int = 0


class Waiting(Entry, frozen=True, kw_only=True, array_like=True):
    """One row: an entry as it waits for one scorer, and how often that has failed at it."""

    case_id: int = 0
    tries: int = 0


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What the step `seq` gave: entries, and the (session, run) pairs of which nothing more is waited for."""

    seq: int
    entries: list[Entry] = []
    followed: list[tuple[str, str]] = []


def case_tables(database: "Database") -> None:
    """Cases that wait."""
    for statement in _TABLES:
        database.execute(statement)


def prepare(pool: "Pool") -> None:
    """Have the table in `pool`; rows go with the sessions that go."""
    pool.adopt("signals", (case_tables,), goes_with=forget_cases)


def forget_cases(database: "Database", going: Going) -> None:
    """Delete what waits of sessions that go."""
    if going.everything:
        database.conn.execute("DELETE FROM signal_cases")
        return
    delete = "DELETE FROM signal_cases WHERE session_id IN (SELECT value FROM json_each(?))"
    database.conn.execute(delete, (msgspec.json.encode(going.session_ids).decode(),))


class Docket:
    """The rows of one pool. Blocking: for a thread."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        prepare(pool)

    def begin(self, scorers: Collection[str]) -> int:
        """Let go of what waits for other scorers than these; where the reading of steps goes on: after what is there,
        if it never began."""
        names = msgspec.json.encode(sorted(scorers)).decode()

        def operation(database: "Database") -> int:
            delete = "DELETE FROM signal_cases WHERE scorer NOT IN (SELECT value FROM json_each(?))"
            database.conn.execute(delete, (names,))
            found = read_state(database, self._pool.keyring, name=CURSOR)
            if found is not None:
                return int.from_bytes(found, "big")
            seq = current(database).seq
            self._move(database, seq)
            return seq

        return self._pool.submit(operation).result()

    def add(self, found: Iterable[Taken], *, seq: int, wanted: Collection[tuple[str, Collection[Moment]]]) -> None:
        """Add entries for each scorer (name and moments) that wants them, and move the cursor to `seq`. Waits for the
        disk."""
        steps = [
            (
                [
                    (name, *msgspec.to_builtins(entry))
                    for entry in taken.entries
                    for name, moments in wanted
                    if entry.moment in moments
                ],
                taken.followed,
            )
            for taken in found
        ]

        def operation(database: "Database") -> None:
            for rows, followed in steps:
                database.conn.executemany(_DROP_ENDED, followed)
                database.conn.executemany(_INSERT, rows)
            self._move(database, seq)

        self._pool.submit(operation).result()

    def due(self, scorer: str, *, now_ms: int, limit: int) -> list[Waiting]:
        """What a scorer should judge now, in the order in which it fell due."""
        with self._pool.read() as database:
            rows = database.conn.execute(_DUE, (scorer, now_ms, limit)).fetchall()
        return [msgspec.convert(row, Waiting) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many cases wait for each scorer, those of runs that may go on included."""
        with self._pool.read() as database:
            query = "SELECT scorer, count(*) FROM signal_cases GROUP BY scorer"
            return dict(database.conn.execute(query).fetchall())

    def open_trajectories(self, *, now_ms: int) -> dict[str, int]:
        """Those with cases that wait for their end, and until when."""
        query = (
            "SELECT target_id, max(due_ms) FROM signal_cases WHERE moment = 'ended' AND target = 'trajectory'"
            " AND due_ms > ? GROUP BY target_id"
        )
        with self._pool.read() as database:
            return dict(database.conn.execute(query, (now_ms,)).fetchall())

    def hasten(self, due_ms: dict[str, int]) -> None:
        """Have the ends of trajectories judged at these times, if not before. Waits for the disk."""
        update = (
            "UPDATE signal_cases SET due_ms = min(due_ms, ?)"
            " WHERE moment = 'ended' AND target = 'trajectory' AND target_id = ?"
        )
        rows = [(at, name) for name, at in due_ms.items()]
        self._pool.submit(lambda database: database.conn.executemany(update, rows)).result()

    def settle(self, done: Iterable[Waiting], *, again: Iterable[tuple[Waiting, int]] = ()) -> None:
        """Delete the rows that are `done`, and put off those that failed until a time. A row whose run went on
        meanwhile stays. Waits for the disk."""
        gone = [(row.case_id, row.step_id) for row in done]
        later = [(due_ms, row.case_id, row.step_id) for row, due_ms in again]

        def operation(database: "Database") -> None:
            run = database.conn.executemany
            run("DELETE FROM signal_cases WHERE case_id = ? AND step_id = ?", gone)
            run("UPDATE signal_cases SET due_ms = ?, tries = tries + 1 WHERE case_id = ? AND step_id = ?", later)

        self._pool.submit(operation).result()

    def _move(self, database: "Database", seq: int) -> None:
        write_state(database, self._pool.keyring, name=CURSOR, value=seq.to_bytes(8, "big"))
