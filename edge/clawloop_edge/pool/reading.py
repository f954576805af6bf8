"""Getting steps, signals and sessions back out of the tables, exactly. Runs on any connection; changes nothing.

One `Reading` is for one snapshot of the database and for one thread; it remembers what it has opened.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.pool.codec import Talk, facts_of, from_json, join_kept
from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.records import Change, Judged, KeptStep, SessionSummary, StepLine, StepLink, Turn
from clawloop_edge.pool.rows import STEPS, TALKS, Row, Rows
from clawloop_edge.pool.summary import read_summary
from clawloop_shared.records import Signal, Step, Target

if TYPE_CHECKING:
    from sqlite_utils import Database

_MAIN = "main"
_SIDE_STEPS = 200
_RUN_SESSIONS = 16
_JUDGED_STEPS = 64
_TARGETS = {
    Target.STEP: "step_id",
    Target.RUN: "run_id",
    Target.SESSION: "session_id",
    Target.TRAJECTORY: "trajectory_id",
}
_END = 1 << 62


class Reading:
    """Reads one snapshot."""

    def __init__(self, database: "Database", keyring: Keyring) -> None:
        self.database, self.keyring, self._rows = database, keyring, Rows(database, keyring)
        self._run = database.conn.execute
        self._values: dict[bytes, Any] = {}

    def step(self, step_id: str) -> Step | None:
        """A step's tokens and facts; None if it is not here."""
        row = self._row(step_id)
        return self._rows.step(row, self._rows.talk(row)) if row else None

    def kept(self, step_id: str) -> KeptStep | None:
        """A step with what was said; None if it is not here."""
        row = self._row(step_id)
        return self._join_kept(row) if row else None

    def session_steps(self, session_id: str) -> Iterator[KeptStep]:
        """All steps of a session in the order in which they were kept: one pass, each row opened once."""
        return map(self._join_kept, self._rows.select(f"{STEPS} WHERE session_id = ? ORDER BY seq", (session_id,)))

    def transcript(self, session_id: str) -> Iterator[Turn]:
        """What each step of a session adds to what was said in it, in order. Opens no tokens."""
        return map(self._turn, self._rows.select(f"{TALKS} WHERE session_id = ? ORDER BY seq", (session_id,)))

    def steps_page(self, limit: int, before_seq: int | None = None) -> list[StepLine]:
        """The steps kept before the change `before_seq`, latest first. Opens no tokens."""
        query = f"{TALKS} WHERE seq < ? ORDER BY seq DESC LIMIT ?"
        rows = self._rows.select(query, (_END if before_seq is None else before_seq, limit))
        return [self._line(row, self._rows.talk(row)) for row in rows]

    def lines_at(self, seqs: Sequence[int]) -> list[StepLine]:
        """The steps kept as these changes, latest first. Opens no tokens."""
        query = f"{TALKS} WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq DESC"  # noqa: S608  # names of ours
        rows = self._rows.select(query, (msgspec.json.encode(seqs).decode(),))
        return [self._line(row, self._rows.talk(row)) for row in rows]

    def session_lines(self, session_id: str) -> list[StepLine]:
        """The steps of a session in the order in which they were kept. Opens no tokens."""
        rows = self._rows.select(f"{TALKS} WHERE session_id = ? ORDER BY seq", (session_id,))
        return [self._line(row, self._rows.talk(row)) for row in rows]

    def rewarded_with(self, line: Step | StepLine, *, limit: int) -> list[StepLine]:
        """Up to `limit` steps, latest first, that may be rewarded together with this one: those of its trajectory, if
        its caller named one, else of its run in its session. Opens no tokens."""
        where, names = "run_id = ? AND session_id = ?", (line.run_id, line.session_id)
        if line.trajectory_id:
            where, names = "trajectory_id = ? AND ? = ''", (line.trajectory_id, "")
        rows = self._rows.select(f"{TALKS} WHERE {where} ORDER BY seq DESC LIMIT ?", (*names, limit))
        return [self._line(row, self._rows.talk(row)) for row in rows]

    @property
    def shared_parts(self) -> set[str]:
        """The shared parts that were read so far."""
        return self._rows.shared_parts

    def labels(self, session_id: str) -> Iterator[tuple[str, str, str]]:
        """Of each step of a session its kind, its app and why nothing may be learned from it."""
        for row in self._rows.select(f"{TALKS} WHERE session_id = ? ORDER BY seq", (session_id,)):
            line = self._line(row, self._rows.talk(row))
            yield line.kind, line.app, line.untrainable

    def last_main(self, session_id: str) -> KeptStep | None:
        """The latest main-line step of a session; one behind more than `_SIDE_STEPS` others is not looked for."""
        query = f"{TALKS} WHERE session_id = ? ORDER BY seq DESC LIMIT ?"
        for row in self._rows.select(query, (session_id, _SIDE_STEPS + 1)):
            if from_json(self._rows.talk(row).rest)["kind"] == _MAIN:
                return self._join_kept(self._rows.at(row.seq, STEPS))
        return None

    def run_steps(self, run_id: str) -> list[KeptStep]:
        """The latest step of a run in each of its sessions, latest first."""
        latest = "SELECT max(seq) FROM steps WHERE run_id = ? GROUP BY session_id ORDER BY max(seq) DESC LIMIT ?"
        query = f"{STEPS} WHERE seq IN ({latest}) ORDER BY seq DESC"
        return [self._join_kept(row) for row in self._rows.select(query, (run_id, _RUN_SESSIONS))]

    def changes(self, after_seq: int, limit: int) -> list[Change]:
        """Steps and signals kept after `after_seq`, oldest first. Deleted ones are passed by."""
        query = (
            "SELECT seq, kind, record_id, session_id FROM changes AS c WHERE seq > ? AND "
            "(kind = 'step' AND EXISTS (SELECT 1 FROM steps AS s WHERE s.seq = c.seq)"
            " OR kind = 'signal' AND EXISTS (SELECT 1 FROM signals AS s WHERE s.seq = c.seq)) ORDER BY seq LIMIT ?"
        )
        return [self._change(*row) for row in self._run(query, (after_seq, limit)).fetchall()]

    def turns(self, after_seq: int, limit: int) -> list[Turn]:
        """What each of up to `limit` steps kept after `after_seq` adds to its session, oldest first."""
        query = f"{TALKS} WHERE seq > ? ORDER BY seq LIMIT ?"
        return [self._turn(row) for row in self._rows.select(query, (after_seq, limit))]

    def links(self, after_seq: int, limit: int) -> list[StepLink]:
        """The places of up to `limit` steps kept after `after_seq`, oldest first. Opens no tokens."""
        query = f"{TALKS} WHERE seq > ? ORDER BY seq LIMIT ?"
        return [self._link(row) for row in self._rows.select(query, (after_seq, limit))]

    def link(self, step_id: str) -> StepLink | None:
        """The place of a step; None if it is not here."""
        found = self._rows.select(f"{TALKS} WHERE step_id = ?", (step_id,))
        return self._link(found[0]) if found else None

    def links_after(self, link: StepLink, *, limit: int) -> list[StepLink]:
        """The places of up to `limit` steps of the same session kept after this one, oldest first."""
        query = f"{TALKS} WHERE session_id = ? AND seq > ? ORDER BY seq LIMIT ?"
        return [self._link(row) for row in self._rows.select(query, (link.session_id, link.seq, limit))]

    def main_before(self, link: StepLink, *, within: int) -> StepLink | None:
        """The latest main-line step of a session before this one, if it is among the `within` steps before."""
        query = f"{TALKS} WHERE session_id = ? AND seq < ? ORDER BY seq DESC LIMIT ?"
        found = map(self._link, self._rows.select(query, (link.session_id, link.seq, within)))
        return next((each for each in found if each.kind == _MAIN), None)

    def may_learn(self, link: StepLink) -> bool:
        """Whether anything may be learned from the run of this step, or from its trajectory."""
        query = "SELECT 1 FROM steps WHERE run_id = ? AND session_id = ? AND trainable LIMIT 1"
        return self._run(query, (link.run_id, link.session_id)).fetchone() is not None

    def trajectory_step_ids(self, trajectory_id: str, *, limit: int) -> list[str]:
        """The last steps of a trajectory, latest first."""
        query = "SELECT step_id FROM steps WHERE trajectory_id = ? ORDER BY seq DESC LIMIT ?"
        return [row[0] for row in self._run(query, (trajectory_id, limit)).fetchall()]

    def signals(self, steps: Iterable[Step | StepLine]) -> list[Signal]:
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

    def session_signals(self, session_id: str) -> list[Signal]:
        """The signals on a session, its steps, runs and trajectories, oldest first."""
        query = "SELECT signal_id, session_id, body FROM signals WHERE session_id = ? ORDER BY seq"
        return [self._signal(*row) for row in self._run(query, (session_id,)).fetchall()]

    def signals_after(self, after_seq: int, limit: int) -> list[tuple[int, Signal]]:
        """The signals kept after `after_seq`, oldest first, each with its `seq`."""
        query = "SELECT seq, signal_id, session_id, body FROM signals WHERE seq > ? ORDER BY seq LIMIT ?"
        return [(seq, self._signal(*row)) for seq, *row in self._run(query, (after_seq, limit)).fetchall()]

    def judged(self, signal: Signal) -> Judged | None:
        """What a signal is about, by the latest `_JUDGED_STEPS` steps of it; None if it is gone. Opens no tokens."""
        query = f"{TALKS} WHERE {_TARGETS[signal.target]} = ? ORDER BY seq DESC LIMIT ?"
        rows = self._rows.select(query, (signal.target_id, _JUDGED_STEPS))
        if not rows:
            return None
        names = self._run(
            "SELECT trajectory_id, run_id, session_id FROM steps WHERE seq = ?", (rows[0].seq,)
        ).fetchone()
        return Judged(
            trajectory=names[0] or "/".join(names[1:]),
            steps=len(rows),
            response_tokens=sum(self._rows.talk(row).response_tokens for row in rows),
        )

    def sessions(self, limit: int, before_ms: int | None) -> list[SessionSummary]:
        """The sessions last used before `before_ms`, latest first."""
        query = (
            "SELECT session_id, summary, steps, trainable, last_ms FROM sessions"
            " WHERE last_ms < ? ORDER BY last_ms DESC, last_seq DESC LIMIT ?"
        )
        rows = self._run(query, (_END if before_ms is None else before_ms, limit)).fetchall()
        return [self._session(*row) for row in rows]

    def session(self, session_id: str) -> SessionSummary | None:
        """One session; None if it is not here."""
        query = "SELECT session_id, summary, steps, trainable, last_ms FROM sessions WHERE session_id = ?"
        row = self._run(query, (session_id,)).fetchone()
        return self._session(*row) if row else None

    def _join_kept(self, row: Row) -> KeptStep:
        talk = self._rows.talk(row)
        texts = self._rows.said(row, talk)
        tools = self._value(self._rows.part(row.session_id, talk.tools)) if talk.tools else []
        step = self._rows.step(row, talk)
        return join_kept(talk, step, messages=[self._value(text) for text in texts[:-1]], tools=tools)

    def _line(self, row: Row, talk: Talk) -> StepLine:
        facts, rest = talk.step, from_json(talk.rest)
        if facts is None:  # of the first layout
            tokens = self._rows.tokens(self._rows.at(row.seq, STEPS))
            facts = facts_of(tokens, talk)
        return StepLine(
            seq=row.seq,
            step_id=row.step_id,
            session_id=row.session_id,
            kind=rest["kind"],
            app=rest["app"],
            untrainable=facts.untrainable,
            at_ms=rest["started_ms"],
            policy_version=facts.policy.version,
            prompt_tokens=talk.prompt_tokens,
            response_tokens=talk.response_tokens,
            run_id=facts.run_id,
            parent_id=facts.parent_id,
            trajectory_id=facts.trajectory_id,
            group_id=facts.group_id,
            channel=facts.channel,
        )

    def _link(self, row: Row) -> StepLink:
        talk = self._rows.talk(row)
        step = talk.step
        if step is None:  # of the first layout
            whole = self._rows.at(row.seq, STEPS)
            step = facts_of(self._rows.tokens(whole), talk)
        return StepLink(
            seq=row.seq,
            step_id=row.step_id,
            session_id=row.session_id,
            run_id=step.run_id,
            trajectory_id=step.trajectory_id,
            parent_id=step.parent_id,
            kind=from_json(talk.rest)["kind"],
            trainable=step.trainable,
        )

    def _turn(self, row: Row) -> Turn:
        talk = self._rows.talk(row)
        return Turn(
            step=self._line(row, talk),
            messages=[self._value(text) for text in self._rows.own_texts(row, talk)],
            reply=from_json(talk.reply),
            text=from_json(talk.rest)["text"],
        )

    def _value(self, text: bytes) -> Any:
        # Steps of one session say the same again and again: each text is parsed once, and the value shared.
        found = self._values.get(text)
        if found is None:
            found = self._values[text] = from_json(text)
        return found

    def _change(self, seq: int, kind: str, record_id: str, session_id: str) -> Change:
        if kind == "step":
            row = self._rows.at(seq, STEPS)
            return Change(seq=seq, step=self._rows.step(row, self._rows.talk(row)))
        query = "SELECT body FROM signals WHERE signal_id = ?"
        body: bytes = self._run(query, (record_id,)).fetchone()[0]
        return Change(seq=seq, signal=self._signal(record_id, session_id, body))

    def _signal(self, signal_id: str, session_id: str, body: bytes) -> Signal:
        plain = self._rows.scope(session_id).unseal("signals", signal_id, column="body", sealed=body)
        return msgspec.msgpack.decode(plain, type=Signal)

    def _session(self, session_id: str, sealed: bytes, steps: int, trainable: int, last_ms: int) -> SessionSummary:
        found = read_summary(self._rows.scope(session_id), session_id, sealed=sealed)
        return SessionSummary(
            session_id=session_id,
            app=found.app,
            title=found.title,
            steps=steps,
            trainable=trainable,
            first_ms=found.first_ms,
            last_ms=last_ms,
        )

    def _row(self, step_id: str) -> Row | None:
        found = self._rows.select(f"{STEPS} WHERE step_id = ?", (step_id,))
        return found[0] if found else None
