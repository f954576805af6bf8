"""What goes from the outbox, and of the owner's limits, with sessions that go. Format: docs/formats/outbox.md.

That something had left stays known: when, how much, at which level and with which hash; of which session it was does
not, once that was forgotten.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring
from clawloop_edge.pool.forgetting import Going
from clawloop_edge.pool.records import SessionSummary
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.items import Facts
from clawloop_edge.privacy.limits import Limits, Subject
from clawloop_edge.privacy.schema import ItemState, forget_learnable, free_learnable, item_scope, spare_release

if TYPE_CHECKING:
    from sqlite_utils import Database

_LEFT = (ItemState.SENT, ItemState.RECEIVED)
_IDS = "(SELECT value FROM json_each(?1))"
_RECORDS = (
    f"SELECT step_id FROM steps WHERE session_id IN {_IDS}"  # noqa: S608  # names of ours
    f" UNION ALL SELECT signal_id FROM signals WHERE session_id IN {_IDS}"
)
_ITEMS = f"""SELECT item_id, state, facts FROM outbox WHERE session_id IN {_IDS} UNION
    SELECT item_id, state, facts FROM outbox JOIN outbox_records USING (item_id)
    WHERE outbox.session_id = '' AND record_id IN ({_RECORDS}) UNION
    SELECT item_id, state, facts FROM outbox JOIN outbox_sessions AS o USING (item_id)
    WHERE o.session_id IN {_IDS}"""  # noqa: S608
"""also those from before items knew their session, and deltas that were learned from one of them"""


_NOT_KEPT = """SELECT coalesce(l.session_id, o.session_id) AS whose, o.item_id, o.facts
    FROM outbox AS o LEFT JOIN outbox_sessions AS l USING (item_id) WHERE o.state IN ('sent', 'received')
    AND whose != '' AND whose NOT IN (SELECT session_id FROM sessions) ORDER BY o.seq"""


class Left(msgspec.Struct, frozen=True):
    """What had left under one consent: the names that a server knows it by, and since when."""

    receipt_id: str
    names: list[str]
    since_ms: int


def goes_with(database: "Database", going: Going, *, pool: Pool) -> None:
    """Destroy the bytes of all items of these sessions, and if they are forgotten for good, whatever names them."""
    wanted = (_ids(going.session_ids),)
    items: list[tuple[str, str, bytes]] = database.conn.execute(_ITEMS, wanted).fetchall()
    for item_id, state, facts in items:
        spare_release(database, item_id)
        pool.keyring.destroy(database, item_scope(item_id))
        if not going.for_good:
            kept = state if state in _LEFT else ItemState.DROPPED
            database.conn.execute("UPDATE outbox SET body = NULL, state = ? WHERE item_id = ?", (kept, item_id))
            _forget_steps(database, item_id, wanted=wanted)
        elif state in _LEFT:
            _forget_names(database, item_id, wanted=wanted)
            _unname(database, pool.keyring, item_id=item_id, sealed=facts)
        else:
            _forget_names(database, item_id)
            database.conn.execute("DELETE FROM outbox WHERE item_id = ?", (item_id,))
        if state not in _LEFT:
            _release_others(database, item_id)
    forget_learnable(database, going.session_ids)
    if going.for_good:
        limits = Limits(pool)
        for session_id in going.session_ids:
            limits.remove(database, Subject.SESSION, name=session_id)


def _forget_names(database: "Database", item_id: str, *, wanted: tuple[str, ...] | None = None) -> None:
    """Delete whose an item was; of a delta that left, and was learned from others too, only what names those `wanted`:
    for the others its server may have to be asked to delete it as well."""
    run = database.conn.execute
    if wanted is not None:
        _forget_steps(database, item_id, wanted=wanted)
        run(f"DELETE FROM outbox_sessions WHERE session_id IN {_IDS} AND item_id = ?2", (*wanted, item_id))  # noqa: S608
        if run("SELECT 1 FROM outbox_sessions WHERE item_id = ?", (item_id,)).fetchone():
            return
    for table in ("outbox_records", "outbox_sessions"):
        run(f"DELETE FROM {table} WHERE item_id = ?", (item_id,))  # noqa: S608


def _forget_steps(database: "Database", item_id: str, *, wanted: tuple[str, ...]) -> None:
    """Delete which steps of these sessions a delta was learned from. (Of an item with steps, these stay: by their names
    its server is asked to delete them.)"""
    of_deltas = f"item_id = ?2 AND record_id IN ({_RECORDS}) AND sent_as = item_id"
    database.conn.execute(f"DELETE FROM outbox_records WHERE {of_deltas}", (*wanted, item_id))  # noqa: S608


def _release_others(database: "Database", item_id: str) -> None:
    """Let what else a delta was learned from be learned from again, since nothing of it left."""
    if database.conn.execute("SELECT 1 FROM learnable WHERE item_id = ? LIMIT 1", (item_id,)).fetchone():
        database.conn.execute("DELETE FROM outbox_records WHERE item_id = ?", (item_id,))
        free_learnable(database, item_id)


def what_left(database: "Database", keyring: Keyring, *, session_ids: Sequence[str] | None) -> list[Left]:
    """What of these sessions (None: of all that ever were) the device gave to the network, by consent."""
    of_deltas = f"SELECT item_id FROM outbox_sessions WHERE session_id IN {_IDS}"  # noqa: S608
    which = (
        f"(o.session_id IN {_IDS} OR o.session_id = '' AND r.record_id IN ({_RECORDS}) OR o.item_id IN ({of_deltas}))"
    )
    query = (
        "SELECT o.receipt_id, o.item_id, o.session_id, o.facts, iif(r.sent_as = '', r.record_id, r.sent_as)"  # noqa: S608
        " FROM outbox AS o JOIN outbox_records AS r USING (item_id)"
        f" WHERE o.state IN ('sent', 'received') AND (?2 OR {which}) ORDER BY o.seq"
    )
    names: dict[str, dict[str, None]] = {}
    since: dict[str, int] = {}
    parameters = (_ids(session_ids or ()), session_ids is None)
    for receipt_id, item_id, session_id, sealed, name in database.conn.execute(query, parameters):
        found = names.setdefault(receipt_id, {})
        found |= {item_id: None, name: None} if session_id else {name: None}
        if receipt_id not in since:
            since[receipt_id] = _facts(database, keyring, item_id=item_id, sealed=sealed).created_ms
    return [Left(receipt_id, list(found), since[receipt_id]) for receipt_id, found in names.items()]


def take_over_left(pool: Pool, other: Pool) -> None:
    """Know of what had left another pool, whose place this one takes, that it left: without the bytes. Waits."""
    columns = "item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size, facts"
    left = f"SELECT {columns} FROM outbox WHERE state IN ('sent', 'received') ORDER BY seq"  # noqa: S608  # names of ours
    names = "SELECT record_id, item_id, sent_as FROM outbox_records WHERE item_id = ?"
    whose = "SELECT session_id, item_id FROM outbox_sessions WHERE item_id = ?"
    with other.read() as database:
        found = [
            (
                row[:-1],
                _facts(database, other.keyring, item_id=row[0], sealed=row[-1]),
                database.conn.execute(names, row[:1]).fetchall(),
                database.conn.execute(whose, row[:1]).fetchall(),
            )
            for row in database.conn.execute(left).fetchall()
        ]

    def operation(database: "Database") -> None:
        for row, facts, records, sessions in found:
            _put_left(database, row, pool=pool, facts=facts, records=records)
            forgotten = pool.tombstones.forgotten_sessions(database, {session_id for session_id, _ in sessions})
            insert = "INSERT OR IGNORE INTO outbox_sessions (session_id, item_id) VALUES (?, ?)"
            database.conn.executemany(insert, [each for each in sessions if each[0] not in forgotten])

    pool.submit(operation).result()


def _put_left(
    database: "Database", row: tuple[Any, ...], *, pool: Pool, facts: Facts, records: Sequence[tuple[str, str, str]]
) -> None:
    item_id, session_id = row[:2]
    run, scope = database.conn.execute, pool.keyring.find(database, POOL_SCOPE)
    if pool.tombstones.forgot(database, session=session_id):
        return
    pool.keyring.destroy(database, item_scope(item_id))
    run("DELETE FROM outbox WHERE item_id = ?", (item_id,))
    sealed = scope.seal("outbox", item_id, column="facts", plain=msgspec.msgpack.encode(facts))
    insert = (
        "INSERT INTO outbox (item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size, facts)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    )
    run(insert, (*row, sealed))
    query = "INSERT OR REPLACE INTO outbox_records (record_id, item_id, sent_as) VALUES (?, ?, ?)"
    database.conn.executemany(query, records)


def left_sessions(database: "Database", keyring: Keyring) -> list[SessionSummary]:
    """Sessions that are not kept here any more because they were old, and of which something had left."""
    found: dict[str, SessionSummary] = {}
    for session_id, item_id, sealed in database.conn.execute(_NOT_KEPT):
        facts = _facts(database, keyring, item_id=item_id, sealed=sealed)
        earlier = found.get(session_id)
        found[session_id] = SessionSummary(
            session_id=session_id,
            app=facts.app,
            title="(not kept here any more)",
            steps=0,
            trainable=0,
            first_ms=earlier.first_ms if earlier else facts.created_ms,
            last_ms=facts.created_ms,
        )
    return list(found.values())


def _unname(database: "Database", keyring: Keyring, *, item_id: str, sealed: bytes) -> None:
    """Keep that an item left, and nothing of whom it was."""
    facts = msgspec.structs.replace(_facts(database, keyring, item_id=item_id, sealed=sealed), app="")
    scope = keyring.find(database, POOL_SCOPE)
    anew = scope.seal("outbox", item_id, column="facts", plain=msgspec.msgpack.encode(facts))
    update = "UPDATE outbox SET body = NULL, session_id = '', facts = ? WHERE item_id = ?"
    database.conn.execute(update, (anew, item_id))


def _facts(database: "Database", keyring: Keyring, *, item_id: str, sealed: bytes) -> Facts:
    scope = keyring.find(database, POOL_SCOPE)
    return msgspec.msgpack.decode(scope.unseal("outbox", item_id, column="facts", sealed=sealed), type=Facts)


def _ids(session_ids: Sequence[str]) -> str:
    return msgspec.json.encode(session_ids).decode()
