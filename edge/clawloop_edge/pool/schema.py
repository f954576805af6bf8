"""The pool's tables. Plain columns hold ids, order, sizes and states; everything else is sealed. docs/formats/pool.md.

Each migration runs once, in one transaction with the record of it. Never change one that was released: add another.
"""

from typing import TYPE_CHECKING

from clawloop_shared.ids import new_id

if TYPE_CHECKING:
    from sqlite_utils import Database

_TABLES = (
    "CREATE TABLE pool (pool_id TEXT PRIMARY KEY) STRICT",
    "CREATE TABLE keys (scope TEXT PRIMARY KEY, kek INTEGER NOT NULL, wrapped BLOB NOT NULL) STRICT",
    "CREATE TABLE state (name TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT",
    # AUTOINCREMENT: a seq is never given twice, so a cursor into the changes stays true after deletions.
    """CREATE TABLE changes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, record_id TEXT NOT NULL, session_id TEXT NOT NULL
    ) STRICT""",
    """CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY, last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL,
        steps INTEGER NOT NULL, trainable INTEGER NOT NULL, summary BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX sessions_last ON sessions (last_ms, last_seq)",
    """CREATE TABLE steps (
        step_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, session_id TEXT NOT NULL REFERENCES sessions,
        run_id TEXT NOT NULL, trajectory_id TEXT NOT NULL, trainable INTEGER NOT NULL,
        base_id TEXT, shared_tokens INTEGER NOT NULL, shared_messages INTEGER NOT NULL,
        size INTEGER NOT NULL, tokens BLOB NOT NULL, talk BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX steps_session ON steps (session_id, seq)",
    "CREATE INDEX steps_run ON steps (run_id)",
    "CREATE INDEX steps_trajectory ON steps (trajectory_id) WHERE trajectory_id != ''",
    """CREATE TABLE parts (
        session_id TEXT NOT NULL REFERENCES sessions, part_id TEXT NOT NULL, size INTEGER NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (session_id, part_id)
    ) STRICT""",
    """CREATE TABLE lookups (
        tag BLOB NOT NULL, step_id TEXT NOT NULL REFERENCES steps, PRIMARY KEY (tag, step_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX lookups_step ON lookups (step_id)",
    """CREATE TABLE signals (
        signal_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, session_id TEXT NOT NULL REFERENCES sessions,
        target TEXT NOT NULL, target_id TEXT NOT NULL, body BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX signals_target ON signals (target, target_id)",
    "CREATE INDEX signals_session ON signals (session_id, seq)",
)


def first_tables(database: "Database") -> None:
    """Steps, signals, sessions, keys and state."""
    for statement in _TABLES:
        database.execute(statement)
    database.execute("INSERT INTO pool (pool_id) VALUES (?)", (new_id(),))


def tallies(database: "Database") -> None:
    """Counts of steps; filled by what opens the pool, which has the keys."""
    database.execute(
        "CREATE TABLE tallies (tally_id TEXT PRIMARY KEY, steps INTEGER NOT NULL, label BLOB NOT NULL) STRICT"
    )


NAME, MIGRATIONS = "pool", (first_tables, tallies)
"""for clawloop_shared.database.migrate"""
