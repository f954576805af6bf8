"""Getting steps, signals and sessions back out of the tables, exactly. Runs on any connection; changes nothing.

One `Reading` is for one snapshot of the database and for one thread; it remembers keys and long texts it has opened.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.chain import Link, prefix
from clawloop_edge.pool.codec import Talk, Tokens, decode_talk, decode_tokens, from_json, join_kept, join_step, own_ids
from clawloop_edge.pool.crypt import Keyring, Scope, session_scope
from clawloop_edge.pool.records import Change, KeptStep, SessionSummary
from clawloop_edge.pool.summary import read_summary
from clawloop_shared.records import Signal, Step, Target

if TYPE_CHECKING:
    from sqlite_utils import Database

_MAIN = "main"
_SIDE_STEPS = 200
_RUN_SESSIONS = 16
_STEP = "SELECT step_id, session_id, base_id, shared_tokens, shared_messages, tokens, talk FROM steps"


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of `steps`, as `_STEP` selects it."""

    step_id: str
    session_id: str
    base_id: str | None
    shared_tokens: int
    shared_messages: int
    tokens: bytes
    talk: bytes


class Reading:
    """Reads one snapshot."""

    def __init__(self, database: "Database", keyring: Keyring) -> None:
        self.database, self._keyring = database, keyring
        self._run = database.conn.execute
        self._scopes: dict[str, Scope] = {}
        self._parts: dict[tuple[str, str], bytes] = {}
        self._ids: dict[str, list[int]] = {}
        self._texts: dict[str, list[bytes]] = {}
        self._values: dict[bytes, Any] = {}

    def step(self, step_id: str) -> Step | None:
        """A step's tokens and facts; None if it is not here."""
        row = self._row(step_id)
        return self._join_step(row) if row else None

    def kept(self, step_id: str) -> KeptStep | None:
        """A step with what was said; None if it is not here."""
        row = self._row(step_id)
        return self._join_kept(row) if row else None

    def session_steps(self, session_id: str) -> Iterator[KeptStep]:
        """All steps of a session in the order in which they were kept: one pass, each row opened once."""
        query = f"{_STEP} WHERE session_id = ? ORDER BY seq"
        for row in map(_as_row, self._run(query, (session_id,)).fetchall()):
            kept = self._join_kept(row)
            self._ids[row.step_id] = kept.step.token_ids
            yield kept

    def labels(self, session_id: str) -> Iterator[tuple[str, str, str]]:
        """Of each step of a session its kind, its app and why nothing may be learned from it."""
        for row in map(_as_row, self._run(f"{_STEP} WHERE session_id = ? ORDER BY seq", (session_id,))):
            rest = from_json(self._talk(row).rest)
            yield rest["kind"], rest["app"], self._tokens(row).step.untrainable

    def last_main(self, session_id: str) -> KeptStep | None:
        """The latest main-line step of a session; one behind more than `_SIDE_STEPS` others is not looked for."""
        query = f"{_STEP} WHERE session_id = ? ORDER BY seq DESC LIMIT ?"
        for row in map(_as_row, self._run(query, (session_id, _SIDE_STEPS + 1))):
            if from_json(self._talk(row).rest)["kind"] == _MAIN:
                return self._join_kept(row)
        return None

    def run_steps(self, run_id: str) -> list[KeptStep]:
        """The latest step of a run in each of its sessions, latest first."""
        latest = "SELECT max(seq) FROM steps WHERE run_id = ? GROUP BY session_id ORDER BY max(seq) DESC LIMIT ?"
        query = f"{_STEP} WHERE seq IN ({latest}) ORDER BY seq DESC"
        return [self._join_kept(row) for row in map(_as_row, self._run(query, (run_id, _RUN_SESSIONS)).fetchall())]

    def changes(self, after_seq: int, limit: int) -> list[Change]:
        """Steps and signals kept after `after_seq`, oldest first. Deleted ones are passed by."""
        query = (
            "SELECT seq, kind, record_id, session_id FROM changes AS c WHERE seq > ? AND "
            "(EXISTS (SELECT 1 FROM steps AS s WHERE s.seq = c.seq)"
            " OR EXISTS (SELECT 1 FROM signals AS s WHERE s.seq = c.seq)) ORDER BY seq LIMIT ?"
        )
        return [self._change(*row) for row in self._run(query, (after_seq, limit)).fetchall()]

    def signals(self, steps: Iterable[Step]) -> list[Signal]:
        """The signals that judge these steps, or their runs, sessions or trajectories, oldest first."""
        wanted = list(steps)
        names = {
            Target.STEP: {s.step_id for s in wanted},
            Target.RUN: {s.run_id for s in wanted},
            Target.SESSION: {s.session_id for s in wanted},
            Target.TRAJECTORY: {s.trajectory_id for s in wanted if s.trajectory_id},
        }
        query = (
            "SELECT seq, signal_id, session_id, body FROM signals"
            " WHERE target = ? AND target_id IN (SELECT value FROM json_each(?))"
        )
        rows: list[tuple[int, str, str, bytes]] = []
        for target, ids in names.items():
            rows += self._run(query, (target, msgspec.json.encode(sorted(ids)).decode())).fetchall()
        return [self._signal(signal_id, session_id, body) for _, signal_id, session_id, body in sorted(rows)]

    def sessions(self, limit: int, before_ms: int | None) -> list[SessionSummary]:
        """The sessions last used before `before_ms`, latest first."""
        query = (
            "SELECT session_id, summary, steps, trainable, last_ms FROM sessions"
            " WHERE last_ms < ? ORDER BY last_ms DESC, last_seq DESC LIMIT ?"
        )
        rows = self._run(query, (1 << 62 if before_ms is None else before_ms, limit)).fetchall()
        return [self._session(*row) for row in rows]

    def ids(self, step_id: str, length: int) -> list[int]:
        """The first `length` ids of a step's prompt and response."""

        def link(name: str) -> Link[int]:
            row = self._must(name)
            return Link(row.base_id, row.shared_tokens, lambda: own_ids(self._tokens(row)))

        return prefix(step_id, length, link=link, known=self._ids)

    def texts(self, step_id: str, length: int) -> list[bytes]:
        """The first `length` of a step's messages and its reply, as JSON texts."""

        def link(name: str) -> Link[bytes]:
            row = self._must(name)
            return Link(row.base_id, row.shared_messages, lambda: self._own_texts(row, self._talk(row)))

        return prefix(step_id, length, link=link, known=self._texts)

    def _join_step(self, row: Row) -> Step:
        start = self.ids(row.base_id, row.shared_tokens) if row.base_id else []
        return join_step(self._tokens(row), start)

    def _join_kept(self, row: Row) -> KeptStep:
        talk = self._talk(row)
        start = self.texts(row.base_id, row.shared_messages) if row.base_id else []
        texts = start + self._own_texts(row, talk)
        self._texts[row.step_id] = texts
        tools = self._value(self._part(row.session_id, talk.tools)) if talk.tools else []
        return join_kept(talk, self._join_step(row), messages=[self._value(text) for text in texts[:-1]], tools=tools)

    def _value(self, text: bytes) -> Any:
        # Steps of one session say the same again and again: each text is parsed once, and the value shared.
        found = self._values.get(text)
        if found is None:
            found = self._values[text] = from_json(text)
        return found

    def _own_texts(self, row: Row, talk: Talk) -> list[bytes]:
        texts = [self._part(row.session_id, part_id) if part_id else text for part_id, text in talk.messages]
        return [*texts, talk.reply]

    def _tokens(self, row: Row) -> Tokens:
        scope = self._scope(row.session_id)
        return decode_tokens(scope.unseal("steps", row.step_id, column="tokens", sealed=row.tokens))

    def _talk(self, row: Row) -> Talk:
        scope = self._scope(row.session_id)
        return decode_talk(scope.unseal("steps", row.step_id, column="talk", sealed=row.talk))

    def _part(self, session_id: str, part_id: str) -> bytes:
        found = self._parts.get((session_id, part_id))
        if found is None:
            query = "SELECT body FROM parts WHERE session_id = ? AND part_id = ?"
            row = self._run(query, (session_id, part_id)).fetchone()
            if row is None:
                raise PoolError(f"part {part_id} of session {session_id} is missing; run `clawloop-edge pool verify`")
            found = self._scope(session_id).unseal("parts", part_id, column="body", sealed=row[0])
            self._parts[session_id, part_id] = found
        return found

    def _change(self, seq: int, kind: str, record_id: str, session_id: str) -> Change:
        if kind == "step":
            step = self._join_step(self._must(record_id))
            self._ids[record_id] = step.token_ids
            return Change(seq=seq, step=step)
        query = "SELECT body FROM signals WHERE signal_id = ?"
        body: bytes = self._run(query, (record_id,)).fetchone()[0]
        return Change(seq=seq, signal=self._signal(record_id, session_id, body))

    def _signal(self, signal_id: str, session_id: str, body: bytes) -> Signal:
        plain = self._scope(session_id).unseal("signals", signal_id, column="body", sealed=body)
        return msgspec.msgpack.decode(plain, type=Signal)

    def _session(self, session_id: str, sealed: bytes, steps: int, trainable: int, last_ms: int) -> SessionSummary:
        found = read_summary(self._scope(session_id), session_id, sealed=sealed)
        return SessionSummary(
            session_id=session_id,
            app=found.app,
            title=found.title,
            steps=steps,
            trainable=trainable,
            first_ms=found.first_ms,
            last_ms=last_ms,
        )

    def _scope(self, session_id: str) -> Scope:
        name = session_scope(session_id)
        if name not in self._scopes:
            self._scopes[name] = self._keyring.find(self.database, name)
        return self._scopes[name]

    def _row(self, step_id: str) -> Row | None:
        found = self._run(f"{_STEP} WHERE step_id = ?", (step_id,)).fetchone()
        return _as_row(found) if found else None

    def _must(self, step_id: str) -> Row:
        row = self._row(step_id)
        if row is None:
            raise PoolError(f"step {step_id} is missing, and others build on it; run `clawloop-edge pool verify`")
        return row


def _as_row(columns: tuple[Any, ...]) -> Row:
    return Row(*columns)
