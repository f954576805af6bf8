"""The pool's tables. Plain columns hold ids, order, sizes and states; everything else is sealed. docs/formats/pool.md.

Each migration runs once, in one transaction with the record of it. Never change one that was released: add another.
"""

from typing import TYPE_CHECKING

from clawloop_edge.pool.tombstones import tombstone_table
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


def key_versions(database: "Database") -> None:
    """Which version of the key-encryption key is in force."""
    database.execute("ALTER TABLE pool ADD COLUMN kek INTEGER NOT NULL DEFAULT 1")


# A session's row is written after its steps: what refers to what is looked at when the transaction ends. By the tables
# and not by `PRAGMA defer_foreign_keys`, which has every statement compiled again.
_SESSION = "REFERENCES sessions DEFERRABLE INITIALLY DEFERRED"
_STEP = "REFERENCES steps DEFERRABLE INITIALLY DEFERRED"
_LEAN_TABLES = {
    "keys": "scope TEXT PRIMARY KEY, kek INTEGER NOT NULL, wrapped BLOB NOT NULL",
    "sessions": """session_id TEXT PRIMARY KEY, last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL,
        steps INTEGER NOT NULL, trainable INTEGER NOT NULL, size INTEGER NOT NULL, summary BLOB NOT NULL""",
    "steps": f"""seq INTEGER PRIMARY KEY, step_id TEXT NOT NULL UNIQUE, session_id TEXT NOT NULL {_SESSION},
        run_id TEXT NOT NULL, trajectory_id TEXT NOT NULL, trainable INTEGER NOT NULL,
        base INTEGER, root INTEGER, links INTEGER NOT NULL, shared_tokens INTEGER NOT NULL,
        shared_messages INTEGER NOT NULL, size INTEGER NOT NULL, talk BLOB NOT NULL, tokens BLOB NOT NULL""",
    "parts": f"""session_id TEXT NOT NULL {_SESSION}, part_id TEXT NOT NULL, size INTEGER NOT NULL,
        body BLOB NOT NULL, PRIMARY KEY (session_id, part_id)""",
    "lookups": f"tag BLOB NOT NULL, seq INTEGER NOT NULL {_STEP}, PRIMARY KEY (tag, seq)",
    "signals": f"""seq INTEGER PRIMARY KEY, signal_id TEXT NOT NULL UNIQUE, session_id TEXT NOT NULL {_SESSION},
        target TEXT NOT NULL, target_id TEXT NOT NULL, body BLOB NOT NULL""",
    "shared_parts": "part_id TEXT PRIMARY KEY, size INTEGER NOT NULL, body BLOB NOT NULL",
    "part_refs": f"""session_id TEXT NOT NULL {_SESSION}, part_id TEXT NOT NULL,
        PRIMARY KEY (session_id, part_id)""",
}
_WITHOUT_ROWID = frozenset({"keys", "sessions", "lookups", "part_refs"})
_LEAN_INDEXES = (
    "sessions_last ON sessions (last_ms, last_seq)",
    "steps_session ON steps (session_id)",
    "steps_run ON steps (run_id)",
    "steps_trajectory ON steps (trajectory_id) WHERE trajectory_id != ''",
    "lookups_seq ON lookups (seq)",
    "signals_target ON signals (target, target_id)",
    "signals_session ON signals (session_id)",
    "part_refs_part ON part_refs (part_id)",
)
_COPIED = {
    "keys": "SELECT scope, kek, wrapped FROM old_keys",
    "sessions": """SELECT session_id, last_seq, last_ms, steps, trainable,
        (SELECT coalesce(sum(size), 0) FROM old_steps AS s WHERE s.session_id = o.session_id)
        + (SELECT coalesce(sum(size), 0) FROM old_parts AS p WHERE p.session_id = o.session_id), summary
        FROM old_sessions AS o""",
    "steps": """SELECT s.seq, s.step_id, s.session_id, s.run_id, s.trajectory_id, s.trainable,
        b.seq, NULL, 0, s.shared_tokens, s.shared_messages, s.size, s.talk, s.tokens
        FROM old_steps AS s LEFT JOIN old_steps AS b ON b.step_id = s.base_id ORDER BY s.seq""",
    "parts": "SELECT session_id, part_id, size, body FROM old_parts",
    "lookups": "SELECT DISTINCT substr(l.tag, 1, 16), s.seq FROM old_lookups AS l JOIN old_steps AS s USING (step_id)",
    "signals": "SELECT seq, signal_id, session_id, target, target_id, body FROM old_signals ORDER BY seq",
}
_REPLACED = ("lookups", "signals", "parts", "steps", "sessions", "keys")
"""in this order, each is dropped after what refers to it"""


def lean_tables(database: "Database") -> None:
    """Fewer pages a step; parts that all sessions share; a step's place in its chain of bases."""
    run = database.conn.execute
    for index in (
        "sessions_last",
        "steps_session",
        "steps_run",
        "steps_trajectory",
        "lookups_step",
        "signals_target",
        "signals_session",
    ):
        run(f"DROP INDEX {index}")
    for name in _REPLACED:
        run(f"ALTER TABLE {name} RENAME TO old_{name}")
    for name, columns in _LEAN_TABLES.items():
        run(f"CREATE TABLE {name} ({columns}) STRICT{', WITHOUT ROWID' if name in _WITHOUT_ROWID else ''}")
    for name, rows in _COPIED.items():
        run(f"INSERT INTO {name} {rows}")
    for name in _REPLACED:
        run(f"DROP TABLE old_{name}")
    for index in _LEAN_INDEXES:
        run(f"CREATE INDEX {index}")


NAME, MIGRATIONS = "pool", (first_tables, tallies, key_versions, tombstone_table, lean_tables)
"""for clawloop_shared.database.migrate"""
