"""What one transaction of the writer has begun and not written yet. Rows are written together, table by table, and what
changes with each step (a session's row, a count, the chain's end) once. Knows nothing of what a step holds.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from clawloop_edge.pool.crypt import Keyring, Scope, session_scope
from clawloop_edge.pool.heads import Chain
from clawloop_edge.pool.parts import SessionParts
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.summary import read_summary, seal_summary, summarise
from clawloop_edge.pool.tally import Label, count_step, label_of
from clawloop_edge.pool.tombstones import any_tombstone

if TYPE_CHECKING:
    from sqlite_utils import Database

_STEP = "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_LOOKUP = "INSERT INTO lookups (tag, seq) VALUES (?, ?)"
_SESSION = (
    "INSERT INTO sessions (last_seq, last_ms, steps, trainable, size, summary, session_id) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_MORE = (
    "UPDATE sessions SET last_seq = ?, last_ms = max(last_ms, ?), steps = steps + ?, trainable = trainable + ?,"
    " size = size + ? WHERE session_id = ?"
)
_PLACE = "SELECT seq, links, coalesce(root, seq) FROM steps WHERE session_id = ?"


class Place(NamedTuple):
    """Where a step stands: its `seq`, how many bases it is from a whole one, and whose `talk` is like its own."""

    seq: int
    links: int
    root: int


class OpenSession:
    """A session in a transaction that adds to it."""

    def __init__(self, database: "Database", scope: Scope, *, session_id: str, parts: SessionParts) -> None:
        """`scope` and `parts` are the session's."""
        self._database, self.scope, self.parts, self.session_id = database, scope, parts, session_id
        row = database.conn.execute("SELECT summary FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
        self.last_seq = self.last_ms = self.steps = self.trainable = self.size = 0
        self._is_new = row is None
        self._summary = read_summary(scope, session_id, sealed=row[0]) if row else None
        self._changed = False
        self._places: dict[str, Place] = {}
        self._latest: Place | None = None

    def place(self, step_id: str) -> Place | None:
        """Where a step of this session stands, or its latest step; None: it has none."""
        if self._is_new or step_id in self._places:
            return self._places.get(step_id, self._latest)
        run, mine = self._database.conn.execute, (self.session_id,)
        row = run(f"{_PLACE} AND step_id = ?", (*mine, step_id)).fetchone() if step_id else None
        if row is None and self._latest is None:
            row = run(f"{_PLACE} ORDER BY seq DESC LIMIT 1", mine).fetchone()
        return Place(*row) if row else self._latest

    def add(self, kept: KeptStep, place: Place, *, size: int) -> None:
        """Count a step of it."""
        self.last_seq, self.last_ms = place.seq, max(self.last_ms, kept.started_ms, kept.finished_ms)
        self.steps, self.trainable = self.steps + 1, self.trainable + kept.step.trainable
        self.size += size
        summary = summarise(kept, self._summary)
        self._changed = self._changed or summary != self._summary
        self._summary = summary
        self._places[kept.step.step_id] = self._latest = place

    def write(self) -> None:
        """Write its row."""
        if not self.steps:
            return
        run = self._database.conn.execute
        counts = (self.last_seq, self.last_ms, self.steps, self.trainable, self.size + self.parts.size)
        if self._is_new:
            run(_SESSION, (*counts, self._sealed(), self.session_id))
            return
        run(_MORE, (*counts, self.session_id))
        if self._changed:
            run("UPDATE sessions SET summary = ? WHERE session_id = ?", (self._sealed(), self.session_id))

    def _sealed(self) -> bytes:
        assert self._summary is not None  # a step was added
        return seal_summary(self.scope, self.session_id, summary=self._summary)


class Pending:
    """What is pending in the writer's transaction, and not to be read there before `settle` has written it."""

    def __init__(self, database: "Database", keyring: Keyring, *, index_key: bytes, chain_key: bytes) -> None:
        """Needs a write transaction, the one that it lasts for."""
        self._database, self._keyring, self._index_key = database, keyring, index_key
        self._sessions: dict[str, OpenSession] = {}
        self._steps: dict[str, tuple[Any, ...]] = {}
        self._lookups: list[tuple[bytes, int]] = []
        self._counts: Counter[Label] = Counter()
        self.chain = Chain(database, chain_key)
        self.any_forgotten = any_tombstone(database)

    def has(self, step_id: str) -> bool:
        """Whether a step is kept, or will be."""
        if step_id in self._steps:
            return True
        return self._database.conn.execute("SELECT 1 FROM steps WHERE step_id = ?", (step_id,)).fetchone() is not None

    def session(self, session_id: str) -> OpenSession:
        """A session that steps are added to, made if it is new."""
        found = self._sessions.get(session_id)
        if found is None:
            database, keyring = self._database, self._keyring
            scope = keyring.ensure(database, session_scope(session_id))
            parts = SessionParts(database, keyring, index_key=self._index_key, session_id=session_id, scope=scope)
            found = OpenSession(database, scope, session_id=session_id, parts=parts)
            self._sessions[session_id] = found
        return found

    def add(self, kept: KeptStep, row: tuple[Any, ...], *, tags: list[bytes]) -> None:
        """Have a step written: its row of `steps`, which begins with its `seq`, and the tags of its look-ups."""
        self._steps[kept.step.step_id] = row
        self._lookups += [(tag, row[0]) for tag in tags]
        self._counts[label_of(kept)] += 1

    def settle(self) -> None:
        """Write it all."""
        run_many = self._database.conn.executemany
        self.chain.write()
        run_many(_STEP, self._steps.values())
        run_many(_LOOKUP, sorted(self._lookups))
        for session in self._sessions.values():
            session.write()
        for label, steps in self._counts.items():
            count_step(self._database, self._keyring, index_key=self._index_key, label=label, steps=steps)
