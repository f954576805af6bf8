"""Writing one step or signal into the tables. Runs inside the writer's transactions; knows no thread and no file."""

from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import UnknownTarget
from clawloop_edge.pool.chain import shared_length
from clawloop_edge.pool.codec import encode_talk, encode_tokens, to_json
from clawloop_edge.pool.crypt import Keyring, Scope, blind, session_scope
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.summary import read_summary, seal_summary, summarise
from clawloop_edge.pool.tally import count_step, label_of
from clawloop_shared.records import Signal, Target

if TYPE_CHECKING:
    from sqlite_utils import Database

_CACHED_STEPS = 32
_WHOLE = 1 << 62

TARGET_COLUMNS = {
    Target.STEP: "step_id",
    Target.RUN: "run_id",
    Target.SESSION: "session_id",
    Target.TRAJECTORY: "trajectory_id",
}


class Lists(msgspec.Struct, frozen=True):
    """A step's whole lists, as bases for the next step: ids of prompt and response; texts of messages and reply."""

    ids: list[int]
    texts: list[bytes]


class Keeper:
    """Keeps steps and signals. Remembers the lists of the latest steps, so that a next one need not read them back."""

    def __init__(self, keyring: Keyring, index_key: bytes) -> None:
        self._keyring, self._index_key = keyring, index_key
        self._recent: OrderedDict[str, Lists] = OrderedDict()

    def forget_recent(self) -> None:
        """Drop what is remembered, because a transaction was undone."""
        self._recent.clear()

    def keep_step(self, database: "Database", kept: KeptStep, *, index: dict[str, bytes]) -> None:
        """Insert a step with its session, parts and look-ups; one that is there already stays as it is."""
        step = kept.step
        run = database.conn.execute
        if run("SELECT 1 FROM steps WHERE step_id = ?", (step.step_id,)).fetchone():
            return
        scope = self._keyring.ensure(database, session_scope(step.session_id))
        seq = next_seq(database, "step", step.step_id, session_id=step.session_id)
        base_id = self._choose_base(database, kept)
        self._count_session(database, kept, scope=scope, seq=seq)
        reply = to_json(kept.reply)
        lists = Lists(step.token_ids, [*(to_json(message) for message in kept.messages), reply])
        base = self._lists(database, base_id) if base_id else Lists([], [])
        ids_n = shared_length(base.ids, step.prompt_ids)
        texts_n = shared_length(base.texts, lists.texts[:-1])

        def part(text: bytes) -> str:
            return self._keep_part(database, text, session_id=step.session_id, scope=scope)

        talk = encode_talk(kept, lists.texts[texts_n:-1], reply=reply, part=part)
        sealed = (
            scope.seal("steps", step.step_id, column="tokens", plain=encode_tokens(step, ids_n)),
            scope.seal("steps", step.step_id, column="talk", plain=talk),
        )
        plain = (step.step_id, seq, step.session_id, step.run_id, step.trajectory_id, step.trainable)
        layout = (base_id, ids_n, texts_n, len(sealed[0]) + len(sealed[1]))
        run("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*plain, *layout, *sealed))
        for name, value in index.items():
            run("INSERT INTO lookups (tag, step_id) VALUES (?, ?)", (self.tag(name, value), step.step_id))
        count_step(database, self._keyring, index_key=self._index_key, label=label_of(kept))
        self._remember(step.step_id, lists)

    def keep_signal(self, database: "Database", signal: Signal) -> None:
        """Insert a signal beside what it judges.

        Raises:
            UnknownTarget: its target is not in this pool.
        """
        run = database.conn.execute
        if run("SELECT 1 FROM signals WHERE signal_id = ?", (signal.signal_id,)).fetchone():
            return
        column = TARGET_COLUMNS[signal.target]
        query = f"SELECT session_id FROM steps WHERE {column} = ? ORDER BY seq DESC LIMIT 1"  # noqa: S608
        row = run(query, (signal.target_id,)).fetchone() if signal.target_id else None
        if row is None:
            raise UnknownTarget(
                f"signal for unknown {signal.target} {signal.target_id!r}; name one that this edge served"
            )
        scope = self._keyring.find(database, session_scope(row[0]))
        seq = next_seq(database, "signal", signal.signal_id, session_id=row[0])
        body = scope.seal("signals", signal.signal_id, column="body", plain=msgspec.msgpack.encode(signal))
        run(
            "INSERT INTO signals (signal_id, seq, session_id, target, target_id, body) VALUES (?, ?, ?, ?, ?, ?)",
            (signal.signal_id, seq, row[0], signal.target, signal.target_id, body),
        )

    def tag(self, name: str, value: bytes) -> bytes:
        """The blind index of `value` under the look-up `name`."""
        return blind(self._index_key, f"lookup/{name}", value=value)

    def _choose_base(self, database: "Database", kept: KeptStep) -> str | None:
        """The step's parent if it is of the same session (one data key), else the session's latest step."""
        run = database.conn.execute
        step = kept.step
        query = "SELECT step_id FROM steps WHERE session_id = ? AND step_id = ?"
        row = run(query, (step.session_id, step.parent_id)).fetchone()
        if row is None:
            latest = "SELECT step_id FROM steps WHERE session_id = ? ORDER BY seq DESC LIMIT 1"
            row = run(latest, (step.session_id,)).fetchone()
        return row[0] if row else None

    def _lists(self, database: "Database", step_id: str) -> Lists:
        found = self._recent.get(step_id)
        if found is None:
            reading = Reading(database, self._keyring)
            found = Lists(reading.ids(step_id, _WHOLE), reading.texts(step_id, _WHOLE))
        self._remember(step_id, found)
        return found

    def _remember(self, step_id: str, lists: Lists) -> None:
        self._recent[step_id] = lists
        self._recent.move_to_end(step_id)
        while len(self._recent) > _CACHED_STEPS:
            self._recent.popitem(last=False)

    def _keep_part(self, database: "Database", text: bytes, *, session_id: str, scope: Scope) -> str:
        part_id = blind(self._index_key, f"part/{session_id}", value=text)[:16].hex()
        run = database.conn.execute
        if run("SELECT 1 FROM parts WHERE session_id = ? AND part_id = ?", (session_id, part_id)).fetchone() is None:
            body = scope.seal("parts", part_id, column="body", plain=text)
            insert = "INSERT INTO parts (session_id, part_id, size, body) VALUES (?, ?, ?, ?)"
            run(insert, (session_id, part_id, len(body), body))
        return part_id

    def _count_session(self, database: "Database", kept: KeptStep, *, scope: Scope, seq: int) -> None:
        session_id, at_ms = kept.step.session_id, max(kept.started_ms, kept.finished_ms)
        run = database.conn.execute
        row = run("SELECT summary FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
        old = read_summary(scope, session_id, sealed=row[0]) if row else None
        new = summarise(kept, old)
        if old is None:
            sealed = seal_summary(scope, session_id, summary=new)
            run("INSERT INTO sessions VALUES (?, 0, 0, 0, 0, ?)", (session_id, sealed))
        elif new != old:
            sealed = seal_summary(scope, session_id, summary=new)
            run("UPDATE sessions SET summary = ? WHERE session_id = ?", (sealed, session_id))
        run(
            "UPDATE sessions SET last_seq = ?, last_ms = max(last_ms, ?), steps = steps + 1, trainable = trainable + ?"
            " WHERE session_id = ?",
            (seq, at_ms, kept.step.trainable, session_id),
        )


def next_seq(database: "Database", kind: str, record_id: str, *, session_id: str) -> int:
    """Note a change and give its place in the order of all changes."""
    insert = "INSERT INTO changes (kind, record_id, session_id) VALUES (?, ?, ?)"
    cursor = database.conn.execute(insert, (kind, record_id, session_id))
    assert cursor.lastrowid is not None
    return cursor.lastrowid
