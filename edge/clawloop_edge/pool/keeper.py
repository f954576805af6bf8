"""Writing one step or signal into the tables. Runs inside the writer's transactions; knows no thread and no file."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import UnknownTarget
from clawloop_edge.pool.chain import ids_tail, texts_tail
from clawloop_edge.pool.codec import encode_talk, encode_tokens, to_json
from clawloop_edge.pool.crypt import Keyring, blind, session_scope
from clawloop_edge.pool.heads import append, chain_key_of
from clawloop_edge.pool.packing import ids_to_seal, pack_ids, wide_to_seal
from clawloop_edge.pool.parts import BLOCK_BYTES, SHARED_BYTES
from clawloop_edge.pool.pending import OpenSession, Pending, Place
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.rows import TALKS, Rows, dictionary_of, remember
from clawloop_edge.pool.tombstones import Tombstones
from clawloop_shared.envelope import Dictionary
from clawloop_shared.records import Signal, Step, Target

if TYPE_CHECKING:
    from sqlite_utils import Database

MAX_LINKS = 256
"""a step behind so many bases is stored whole: what reading one step may cost"""
TAG_BYTES = 16
"""of a look-up: two values among millions have the same by a chance of one in 2^80"""
_CACHED_STEPS = 32
_WHOLE = 1 << 62
_SMALL_BYTES = 2048
"""what is said in fewer bytes is compressed with a dictionary; more has enough in common with itself"""
_STANDING = frozenset({"system", "developer"})
"""roles of messages that an agent says the same in all of its sessions"""

TARGET_COLUMNS = {
    Target.STEP: "step_id",
    Target.RUN: "run_id",
    Target.SESSION: "session_id",
    Target.TRAJECTORY: "trajectory_id",
}


@dataclass(frozen=True)
class Lists:
    """A step's whole lists, as bases for the next step: ids of prompt and response; texts of messages and reply."""

    ids: bytes
    reply_at: int
    texts: list[bytes]


_NOTHING = Lists(b"", 0, [])


class Keeper:
    """Keeps steps and signals. Remembers the latest steps, so that a next one need not read them back."""

    def __init__(self, keyring: Keyring, index_key: bytes) -> None:
        self._keyring, self._index_key, self._chain_key = keyring, index_key, chain_key_of(index_key)
        self._lists: OrderedDict[int, Lists] = OrderedDict()
        self._dictionaries: OrderedDict[int, Dictionary] = OrderedDict()
        self._pending: Pending | None = None
        self.tombstones = Tombstones(index_key)

    def forget_recent(self) -> None:
        """Drop what is remembered, because a transaction was undone or sessions were taken out."""
        self._lists.clear()
        self._dictionaries.clear()
        self._pending = None

    def settle(self, _database: "Database") -> None:
        """Write what `keep_step` has begun: before the transaction ends, or anybody else reads or writes in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.settle()

    def keep_step(self, database: "Database", kept: KeptStep, *, index: dict[str, bytes]) -> None:
        """Insert a step with its parts and look-ups; one that is there already stays as it is. Needs `settle`.

        One that was forgotten, is of a forgotten session, or goes on from a forgotten step, is not kept.
        """
        step = kept.step
        pending = self._pending_in(database)
        if pending.has(step.step_id) or self._forgot(database, step):
            return
        session = pending.session(step.session_id)
        base = _base(session, step)
        on = self._lists_of(database, base.seq) if base else _NOTHING
        prompt, response = _packed(step.prompt_ids), _packed(step.response_ids)
        texts = [*map(to_json, kept.messages), to_json(kept.reply)]
        shared_ids, tokens = _tokens(session, step, on=on, prompt=prompt, response=response)
        shared_texts, talk = _talk(session, kept, on=on, texts=texts)
        seal, dictionary = session.scope.seal, None
        if base and len(talk) < _SMALL_BYTES:
            dictionary = self._dictionary(database, base.root)
        sealed = (
            seal("steps", step.step_id, column="tokens", plain=tokens),
            seal("steps", step.step_id, column="talk", plain=talk, dictionary=dictionary),
        )
        size = len(sealed[0]) + len(sealed[1])
        seq = pending.chain.append("step", step.step_id, session_id=step.session_id, sealed=sealed)
        names = (seq, step.step_id, step.session_id, step.run_id, step.trajectory_id, step.trainable)
        place = Place(seq, base.links + 1, base.root) if base else Place(seq, 0, seq)
        on_base = (base.seq if base else None, base.root if base else None, place.links)
        row = (*names, *on_base, shared_ids, shared_texts, size, sealed[1], sealed[0])
        pending.add(kept, row, tags=[self.lookup_tag(name, value) for name, value in index.items()])
        session.add(kept, place, size=size)
        texts[:shared_texts] = on.texts[:shared_texts]  # the same texts, once in memory
        ids = b"" if prompt is None or response is None else prompt + response
        remember(self._lists, seq, Lists(ids, len(step.prompt_ids), texts), most=_CACHED_STEPS)
        if base is None:
            remember(self._dictionaries, seq, dictionary_of(talk), most=_CACHED_STEPS)

    def keep_signal(self, database: "Database", signal: Signal) -> None:
        """Insert a signal beside what it judges.

        Raises:
            UnknownTarget: its target is not in this pool.
        """
        run = database.conn.execute
        if run("SELECT 1 FROM signals WHERE signal_id = ?", (signal.signal_id,)).fetchone():
            return
        if self.tombstones.forgot(database, signal=signal.signal_id):
            return
        column = TARGET_COLUMNS[signal.target]
        query = f"SELECT session_id FROM steps WHERE {column} = ? ORDER BY seq DESC LIMIT 1"  # noqa: S608
        row = run(query, (signal.target_id,)).fetchone() if signal.target_id else None
        if row is None:
            raise UnknownTarget(
                f"signal for unknown {signal.target} {signal.target_id!r}; name one that this edge served"
            )
        scope = self._keyring.find(database, session_scope(row[0]))
        body = scope.seal("signals", signal.signal_id, column="body", plain=msgspec.msgpack.encode(signal))
        names = {"kind": "signal", "record_id": signal.signal_id, "session_id": row[0]}
        seq = append(database, self._chain_key, **names, sealed=(body,))
        run(
            "INSERT INTO signals (seq, signal_id, session_id, target, target_id, body) VALUES (?, ?, ?, ?, ?, ?)",
            (seq, signal.signal_id, row[0], signal.target, signal.target_id, body),
        )

    def tag(self, name: str, value: bytes) -> bytes:
        """The blind index of `value` under the look-up `name`."""
        return blind(self._index_key, f"lookup/{name}", value=value)

    def lookup_tag(self, name: str, value: bytes) -> bytes:
        """What of it stands in `lookups`."""
        return self.tag(name, value)[:TAG_BYTES]

    def _pending_in(self, database: "Database") -> Pending:
        if self._pending is None:
            self._pending = Pending(database, self._keyring, index_key=self._index_key, chain_key=self._chain_key)
        return self._pending

    def _forgot(self, database: "Database", step: Step) -> bool:
        if not self._pending_in(database).any_forgotten:
            return False
        forgot = self.tombstones.forgot
        if forgot(database, step=step.step_id, session=step.session_id):
            return True
        return bool(step.parent_id) and forgot(database, step=step.parent_id)

    def _lists_of(self, database: "Database", seq: int) -> Lists:
        found = self._lists.get(seq)
        if found is None:
            rows = Rows(database, self._keyring)
            reply_at = rows.talk(rows.at(seq, TALKS)).prompt_tokens
            found = Lists(_packed(rows.ids(seq, _WHOLE)) or b"", reply_at, rows.texts(seq, _WHOLE))
            remember(self._lists, seq, found, most=_CACHED_STEPS)
        return found

    def _dictionary(self, database: "Database", seq: int) -> Dictionary:
        found = self._dictionaries.get(seq)
        if found is None:
            found = Rows(database, self._keyring).dictionary(seq)
            remember(self._dictionaries, seq, found, most=_CACHED_STEPS)
        return found


def _base(session: OpenSession, step: Step) -> Place | None:
    """The step's parent if it is of the same session (one data key), else the session's latest step.

    None: the step is stored whole, because it is the first, or the chain of bases is long enough.
    """
    found = session.place(step.parent_id)
    return found if found and found.links + 1 < MAX_LINKS else None


def _packed(ids: Sequence[int]) -> bytes | None:
    """The ids in bytes, to be compared; None if one is of no tokenizer: then nothing is shared."""
    try:
        return pack_ids(ids)
    except OverflowError:
        return None


def _tokens(
    session: OpenSession, step: Step, *, on: Lists, prompt: bytes | None, response: bytes | None
) -> tuple[int, bytes]:
    """How many ids the step shares with its base, and the column `tokens`."""
    if prompt is None or response is None:
        wide = wide_to_seal(step.prompt_ids), wide_to_seal(step.response_ids)
        return 0, encode_tokens(step, tail=wide[0], response=wide[1], copies=[], opening=[])
    said = ids_to_seal(response)
    if on is _NOTHING:
        opening = session.parts.opening(prompt)
        tail = ids_to_seal(prompt[len(opening) * BLOCK_BYTES :])
        return 0, encode_tokens(step, tail=tail, response=said, copies=[], opening=opening)
    found = ids_tail(on.ids, prompt, reply_at=on.reply_at)
    tail = ids_to_seal(found.own)
    return found.shared, encode_tokens(step, tail=tail, response=said, copies=found.copies, opening=[])


def _talk(session: OpenSession, kept: KeptStep, *, on: Lists, texts: list[bytes]) -> tuple[int, bytes]:
    """How many messages the step shares with its base, and the column `talk`."""
    tail = texts_tail(on.texts, texts[:-1])
    long = {text for text in tail.own if len(text) >= SHARED_BYTES}
    roles = ((message.get("role"), text) for message, text in zip(kept.messages, texts, strict=False))
    standing = {text for role, text in roles if role in _STANDING and text in long} if long else set()
    tools = session.parts.tools(to_json(kept.tools)) if kept.tools else ""
    talk = encode_talk(
        kept,
        tail,
        reply=texts[-1],
        tools=tools,
        part=lambda text: session.parts.message(text, standing=text in standing) if text in long else "",
    )
    return tail.shared, talk
