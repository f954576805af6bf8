"""Deltas in the outbox: what was learned from may still leave as one, and the transaction that puts it there.

An item that is a delta is of no session: `outbox_sessions` names those that it was learned from and `outbox_records`
their steps, so that whoever lowers, curates or forgets one of them finds it. Knows no learner. docs/formats/deltas.md.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring, Scope
from clawloop_edge.pool.curation import Curations
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import Allowance
from clawloop_edge.privacy.items import DeltaFacts, Facts
from clawloop_edge.privacy.ladder import Ladder
from clawloop_edge.privacy.schema import ItemState, item_scope
from clawloop_shared.deltas import DELTA_KIND
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database

USED = "used"
"""state in `learnable`: went into a delta"""
_STEPS = "SELECT step_id, seq, session_id, run_id FROM steps WHERE step_id IN (SELECT value FROM json_each(?))"


class _Names(msgspec.Struct, frozen=True):
    step_id: str
    run_id: str
    session_id: str


class Source(msgspec.Struct, frozen=True, array_like=True):
    """One row of `learnable`: a trajectory by its caller's name, or a run in a session."""

    trajectory_id: str
    run_id: str
    session_id: str


class SealedBody(msgspec.Struct, frozen=True):
    """The bytes of an item, compressed and sealed under a key that is nowhere yet; hash and size of what it was.

    A delta has up to 256 MiB, which takes seconds: so it is done before the transaction that keeps it, in which nothing
    else could be kept."""

    item_id: str
    scope: Scope
    body: bytes
    sha256: str
    size: int

    def keep_key(self, database: "Database", keyring: Keyring) -> None:
        """Make it readable, and whatever was sealed for that item before not any more. Needs a write transaction."""
        keyring.adopt(database, self.scope)


def seal_body(keyring: Keyring, item_id: str, plain: bytes) -> SealedBody:
    """The bytes of an item as they are kept. Takes a while for large ones: not for a transaction."""
    scope = keyring.draft(item_scope(item_id))
    return SealedBody(
        item_id, scope, scope.seal("outbox", item_id, column="body", plain=plain), sha256(plain), len(plain)
    )


class DeltaDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A delta that may become an item: its bytes, what is told of it, and what it was learned from. `entry_id` is the
    ledger's, of a noised one."""

    body: SealedBody
    level: Level
    facts: DeltaFacts
    step_ids: Sequence[str]
    sources: Sequence[Source]
    entry_id: str = ""


class Ladders:
    """What may leave of the sessions of one snapshot, each asked for once."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance, self._found = allowance, dict[str, Ladder]()

    def at(self, session_id: str, seq: int) -> Level:
        """The level of what was kept of a session as change `seq`."""
        if session_id not in self._found:
            # Apps are looked up in the session where any has a limit.
            self._found[session_id] = self._allowance.ladder(session_id, app="")
        return self._found[session_id].at(seq)


def check_sources(
    database: "Database", pool: Pool, allowance: Allowance, *, step_ids: Sequence[str], level: Level
) -> list[str]:
    """The sessions of these steps, if what was learned from them may leave at `level`.

    Raises:
        ConsentError: a step is not kept any more, its owner took it out of training, or its level is lower now.
    """
    rows = database.conn.execute(_STEPS, (msgspec.json.encode(step_ids).decode(),)).fetchall()
    if len(rows) < len(set(step_ids)) or not rows:
        raise ConsentError(f"{len(set(step_ids)) - len(rows)} of the steps that it learned from are not kept any more")
    ladders, curations = Ladders(allowance), Curations(database, pool.keyring)
    for step_id, seq, session_id, run_id in rows:
        if ladders.at(session_id, seq).rank < level.rank:
            raise ConsentError(f"the level of a session that it learned from is below {level} now")
        if curations.off(_Names(step_id, run_id, session_id)):
            raise ConsentError("a step that it learned from was taken out of training")
    return sorted({row[2] for row in rows})


def put_delta(
    database: "Database", pool: Pool, allowance: Allowance, *, draft: DeltaDraft, hold_ms: int, now_ms: int
) -> str:
    """Put a delta into the outbox and give the item's id. Needs a write transaction.

    Raises:
        ConsentError: it may not leave, whatever is waited for.
    """
    receipt = allowance.state.receipt
    if receipt is None:
        raise ConsentError("nobody has allowed anything to leave")
    sessions = check_sources(database, pool, allowance, step_ids=draft.step_ids, level=draft.level)
    run, keyring, item_id = database.conn.execute, pool.keyring, draft.body.item_id
    facts = Facts(sha256=draft.body.sha256, steps=0, signals=0, created_ms=now_ms, delta=draft.facts)
    scope = keyring.find(database, POOL_SCOPE)
    sealed = scope.seal("outbox", item_id, column="facts", plain=msgspec.msgpack.encode(facts))
    draft.body.keep_key(database, keyring)
    insert = (
        "INSERT INTO outbox (item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size,"
        " facts, body) VALUES (?, '', ?, ?, ?, ?, ?, 0, ?, ?, ?)"
    )
    plain = (item_id, draft.level, ItemState.QUEUED, DELTA_KIND, receipt.receipt_id, now_ms + hold_ms)
    run(insert, (*plain, draft.body.size, sealed, draft.body.body))
    _name(database, item_id, draft=draft, sessions=sessions)
    return item_id


def _name(database: "Database", item_id: str, *, draft: DeltaDraft, sessions: Sequence[str]) -> None:
    """Write down what an item was learned from. To its server all of that has one name: the item's."""
    many = database.conn.executemany
    records = "INSERT INTO outbox_records (record_id, item_id, sent_as) VALUES (?, ?, ?)"
    many(records, ((record, item_id, item_id) for record in (item_id, *dict.fromkeys(draft.step_ids))))
    many("INSERT INTO outbox_sessions (session_id, item_id) VALUES (?, ?)", ((each, item_id) for each in sessions))
    update = "UPDATE learnable SET state = ?, item_id = ? WHERE trajectory_id = ? AND run_id = ? AND session_id = ?"
    many(update, ((USED, item_id, each.trajectory_id, each.run_id, each.session_id) for each in draft.sources))
    if draft.entry_id:
        database.conn.execute("INSERT INTO outbox_releases VALUES (?, ?)", (item_id, draft.entry_id))
