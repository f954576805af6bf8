"""What the pool is compared with: SQLite as Python brings it, the pool's own tables and indexes, zstd, and no more.

No encryption of the file, no sealing, no chain of MACs, no blind index, nothing stored relative to another step; the
same durability (WAL, synchronous = FULL), and the same care that a step is kept once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zstandard

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool

_STEP = "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_CHANGE = "INSERT INTO changes VALUES (?, ?, ?, ?, ?)"
_LOOKUP = "INSERT INTO lookups VALUES (?, ?)"
_SESSION = (
    "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (session_id) DO UPDATE SET"
    " last_seq = excluded.last_seq, last_ms = max(last_ms, excluded.last_ms), steps = steps + excluded.steps,"
    " trainable = trainable + excluded.trainable, size = size + excluded.size"
)
_TALLY = "INSERT INTO tallies VALUES (?, ?, x'') ON CONFLICT DO UPDATE SET steps = steps + excluded.steps"


def tables_of_a_pool(folder: Path) -> list[str]:
    """The SQL of the tables and indexes that a pool has."""
    with Pool.open(folder, KnownKey.of(bytes(32))) as pool, pool.read() as database:
        names = ("pool", "_sqlite_migrations", "sqlite_sequence")
        query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND tbl_name NOT IN (?, ?, ?) ORDER BY rowid"
        return [row[0] for row in database.conn.execute(query, names)]


class Plain:
    """A plain database with these tables. Writing them one after the other, as the pool does, made it no faster."""

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY"):
            self._connection.execute(f"PRAGMA {pragma}")
        for table in tables:
            self._connection.execute(table)
        self._connection.execute("INSERT INTO chain VALUES (0, x'')")
        self._pack = zstandard.ZstdCompressor(level=3).compress
        self._json = msgspec.json.Encoder().encode
        self._seq = 0

    def keep(self, steps: Sequence[KeptStep], tags: Sequence[bytes]) -> None:
        """Keep steps in one transaction, each with the tag of one look-up."""
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        for kept, tag in zip(steps, tags, strict=True):
            self._keep(kept, tag)
        run("UPDATE chain SET seq = ?", (self._seq,))
        run("COMMIT")

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def _keep(self, kept: KeptStep, tag: bytes) -> None:
        run = self._connection.execute
        if run("SELECT 1 FROM steps WHERE step_id = ?", (kept.step.step_id,)).fetchone():
            return
        step, change, session = self._rows(kept)
        run(_SESSION, session)
        run(_STEP, step)
        run(_CHANGE, change)
        run(_LOOKUP, (tag, self._seq))
        run(_TALLY, (kept.kind, 1))

    def _rows(self, kept: KeptStep) -> tuple[tuple[object, ...], tuple[object, ...], tuple[object, ...]]:
        """A step's rows of `steps`, `changes` and `sessions`."""
        step = kept.step
        tokens = self._pack(self._json(step))
        said = (
            kept.messages,
            kept.tools,
            kept.reply,
            kept.text,
            kept.kind,
            kept.app,
            kept.started_ms,
            kept.finished_ms,
        )
        talk = self._pack(self._json(said))
        self._seq += 1
        size = len(tokens) + len(talk)
        names = (self._seq, step.step_id, step.session_id, step.run_id, step.trajectory_id, step.trainable)
        return (
            (*names, None, None, 0, 0, 0, size, talk, tokens),
            (self._seq, "step", step.step_id, step.session_id, b""),
            (step.session_id, self._seq, kept.finished_ms, 1, step.trainable, size, b""),
        )
