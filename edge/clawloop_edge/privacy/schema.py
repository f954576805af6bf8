"""The tables of consent, outbox and audit, in the pool's database, and what several of the rooms do with them.

Each migration runs once; never change one that was released: add another. Format: docs/formats/outbox.md.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool import curation, heads
from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.heads import Chained
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import SealedColumn
from clawloop_edge.privacy.counting import commit_in, give_back_in

if TYPE_CHECKING:
    from sqlite_utils import Database

WAITING = "state IN ('queued', 'approved', 'sent') AND body IS NOT NULL"
"""of the outbox's rows: not with the server yet, and not taken back"""
CURSOR = "outbox.cursor"
"""state: the last change (8 bytes, big-endian) that the outbox has looked at"""

WORDS = "outbox.words"
"""state: the last word on learning that it has looked at, likewise; none: it looks at all of them"""


class ItemState(StrEnum):
    """How far an outbox item has come."""

    QUEUED = "queued"
    """made; leaves once its hold time is over"""
    APPROVED = "approved"
    """its owner let it go before that"""
    SENT = "sent"
    """its bytes were given to the network, maybe more than once"""
    RECEIVED = "received"
    """the server has it on disk"""
    DROPPED = "dropped"
    """its owner, or a lowered level, took it back before it left; its bytes are destroyed"""


_TABLES = (
    "CREATE TABLE receipts (seq INTEGER PRIMARY KEY AUTOINCREMENT, receipt_id TEXT UNIQUE, body BLOB NOT NULL) STRICT",
    """CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, item_id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, kind TEXT NOT NULL,
        receipt_id TEXT NOT NULL, release_ms INTEGER NOT NULL, size INTEGER NOT NULL, facts BLOB NOT NULL, body BLOB
    ) STRICT""",
    "CREATE INDEX outbox_state ON outbox (state, seq)",
    """CREATE TABLE outbox_records (
        record_id TEXT NOT NULL, item_id TEXT NOT NULL, PRIMARY KEY (record_id, item_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE audit (seq INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL) STRICT",
)


def first_tables(database: "Database") -> None:
    """Receipts, outbox and audit log."""
    for statement in _TABLES:
        database.execute(statement)


_OUTBOX = (
    "ALTER TABLE outbox RENAME TO outbox_before",
    # The bytes come last: SQLite reads through a row's long column to the ones behind it.
    """CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, item_id TEXT NOT NULL UNIQUE, session_id TEXT NOT NULL,
        level TEXT NOT NULL, state TEXT NOT NULL, kind TEXT NOT NULL, receipt_id TEXT NOT NULL,
        release_ms INTEGER NOT NULL, received_ms INTEGER NOT NULL, size INTEGER NOT NULL, facts BLOB NOT NULL, body BLOB
    ) STRICT""",
    """INSERT INTO outbox
        SELECT seq, item_id, '', 'full', state, kind, receipt_id, release_ms, iif(state = 'received', release_ms, 0),
            size, facts, body FROM outbox_before""",
    "DROP TABLE outbox_before",
    "CREATE INDEX outbox_state ON outbox (state, release_ms, size, item_id)",
    "CREATE INDEX outbox_session ON outbox (session_id)",
    "CREATE INDEX outbox_old ON outbox (received_ms) WHERE body IS NOT NULL AND state = 'received'",
    "ALTER TABLE outbox_records ADD COLUMN sent_as TEXT NOT NULL DEFAULT ''",
    "CREATE INDEX outbox_records_item ON outbox_records (item_id)",
    "CREATE TABLE limits (limit_id TEXT PRIMARY KEY, body BLOB NOT NULL) STRICT",
)


def one_session_an_item(database: "Database") -> None:
    """Items of one session at one level, the names that records leave under, and limits.

    Items from before are of any sessions, so any limit concerns them.
    """
    for statement in _OUTBOX:
        database.execute(statement)


_DELTAS = (
    """CREATE TABLE outbox_sessions (
        session_id TEXT NOT NULL, item_id TEXT NOT NULL, PRIMARY KEY (session_id, item_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX outbox_sessions_item ON outbox_sessions (item_id)",
    "CREATE TABLE outbox_releases (item_id TEXT PRIMARY KEY, entry_id TEXT NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE learnable (
        trajectory_id TEXT NOT NULL, run_id TEXT NOT NULL, session_id TEXT NOT NULL, state TEXT NOT NULL,
        seq INTEGER NOT NULL, item_id TEXT NOT NULL DEFAULT '', PRIMARY KEY (trajectory_id, run_id, session_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX learnable_state ON learnable (state, seq)",
    "CREATE INDEX learnable_session ON learnable (session_id)",
    "CREATE INDEX learnable_item ON learnable (item_id) WHERE item_id != ''",
)


def deltas(database: "Database") -> None:
    """The sessions that a delta was learned from, the ledger's entry of a noised one, and what may be learned from."""
    for statement in _DELTAS:
        database.execute(statement)


SEALED = (
    SealedColumn("receipts", "body", "receipt_id"),
    SealedColumn("outbox", "facts", "item_id"),
    SealedColumn("outbox", "body", "item_id", "'outbox/' || item_id"),
    SealedColumn("audit", "body", "CAST(seq AS TEXT)"),
    SealedColumn("limits", "body", "limit_id"),
)
CHAINED = (
    Chained("receipt", "receipts", ("body",), "t.receipt_id = c.record_id"),
    Chained("audit", "audit", ("body",), "t.seq = CAST(c.record_id AS INTEGER)"),
)


def prepare(pool: Pool) -> None:
    """Have these tables in `pool`, and those of the words that the outbox obeys."""
    curation.prepare(pool)

    def into_the_chain(database: "Database") -> None:
        """Receipts and entries from before the pool had one chain of everything."""
        older = {
            "receipt": "SELECT receipt_id, body FROM receipts ORDER BY seq",
            "audit": "SELECT seq, body FROM audit",
        }
        for kind, query in older.items():
            for record_id, body in database.conn.execute(query).fetchall():
                chain(database, pool, kind=kind, record_id=str(record_id), body=body)

    migrations = (first_tables, one_session_an_item, into_the_chain, deltas)
    pool.adopt("privacy", migrations, sealed=SEALED, chained=CHAINED)


def chain(database: "Database", pool: Pool, *, kind: str, record_id: str, body: bytes) -> None:
    """Note a receipt or an audit entry in the pool's chain. Needs the transaction that keeps it."""
    heads.append(database, pool.chain_key, kind=kind, record_id=record_id, session_id="", sealed=(body,))


def item_scope(item_id: str) -> str:
    """The name of the scope that an item's bytes are sealed in: its own, so that dropping it destroys its key."""
    return f"outbox/{item_id}"


def read_cursor(database: "Database", keyring: Keyring) -> int:
    """The last change that the outbox has looked at."""
    found = read_state(database, keyring, name=CURSOR)
    return int.from_bytes(found, "big") if found else 0


def write_cursor(database: "Database", keyring: Keyring, *, seq: int) -> None:
    """Move the outbox to another change. Needs a write transaction."""
    write_state(database, keyring, name=CURSOR, value=seq.to_bytes(8, "big"))


def read_words(database: "Database", keyring: Keyring) -> int:
    """The change of the last word on learning that the outbox has looked at."""
    found = read_state(database, keyring, name=WORDS)
    return int.from_bytes(found, "big") if found else 0


def write_words(database: "Database", keyring: Keyring, *, seq: int) -> None:
    """Move the outbox to another word; 0: what may leave has changed, so all are to be looked at again. Needs a write
    transaction."""
    write_state(database, keyring, name=WORDS, value=seq.to_bytes(8, "big"))


def destroy_item(database: "Database", keyring: Keyring, *, item_id: str) -> None:
    """Destroy the bytes of an item that has not been received. One that was sent stays listed as sent."""
    spare_release(database, item_id)
    keyring.destroy(database, item_scope(item_id))
    database.conn.execute(
        "UPDATE outbox SET body = NULL, state = iif(state = ?, state, ?) WHERE item_id = ?",
        (ItemState.SENT, ItemState.DROPPED, item_id),
    )


def count_release(database: "Database", item_id: str) -> None:
    """Have the ledger count an item's release for good, in the transaction that lets it leave. Raises PoolError."""
    found = database.conn.execute("SELECT entry_id FROM outbox_releases WHERE item_id = ?", (item_id,)).fetchone()
    if found is not None:
        commit_in(database, found[0])


def spare_release(database: "Database", item_id: str) -> None:
    """Take the release of an item that never left, nor will, off the ledger's count."""
    query = (
        "SELECT entry_id FROM outbox_releases JOIN outbox USING (item_id)"
        " WHERE item_id = ? AND state IN ('queued', 'approved')"
    )
    for (entry_id,) in database.conn.execute(query, (item_id,)).fetchall():
        give_back_in(database, entry_id)


def free_learnable(database: "Database", item_id: str) -> None:
    """Let be learned from again what went into a delta of which nothing left."""
    database.conn.execute(
        "UPDATE learnable SET state = 'new', item_id = '' WHERE item_id = ?"
        " AND NOT EXISTS (SELECT 1 FROM outbox_records AS r WHERE r.item_id = learnable.item_id)",
        (item_id,),
    )


def forget_learnable(database: "Database", session_ids: Sequence[str]) -> None:
    """Forget what might have been learned from sessions that go; a trajectory that others are in is looked at again."""
    ids = (msgspec.json.encode(session_ids).decode(),)
    inside = "(SELECT value FROM json_each(?1))"
    named = f"trajectory_id IN (SELECT trajectory_id FROM steps WHERE session_id IN {inside} AND trajectory_id != '')"  # noqa: S608
    others = f"SELECT 1 FROM steps AS s WHERE s.trajectory_id = l.trajectory_id AND s.session_id NOT IN {inside}"  # noqa: S608
    run = database.conn.execute
    run(f"DELETE FROM learnable WHERE session_id IN {inside}", ids)  # noqa: S608
    run(f"DELETE FROM learnable AS l WHERE {named} AND NOT EXISTS ({others})", ids)  # noqa: S608


def take_back(database: "Database", keyring: Keyring, *, item_ids: Iterable[str]) -> int:
    """Destroy the bytes of items that may no longer leave; gives how many. What they held may be queued anew later,
    if its owner includes the past, unless some of it may have left already.
    """
    count = 0
    for item_id in item_ids:
        destroy_item(database, keyring, item_id=item_id)
        database.conn.execute(
            "DELETE FROM outbox_records WHERE item_id IN (SELECT item_id FROM outbox WHERE item_id = ? AND state = ?)",
            (item_id, ItemState.DROPPED),
        )
        free_learnable(database, item_id)
        count += 1
    if count:
        write_words(database, keyring, seq=0)  # marks among it go again as soon as they may
    return count


def purge_queue(database: "Database", keyring: Keyring) -> int:
    """Take back all items that the server has not acknowledged; gives how many."""
    waiting = database.conn.execute(f"SELECT item_id FROM outbox WHERE {WAITING}").fetchall()  # noqa: S608
    return take_back(database, keyring, item_ids=[row[0] for row in waiting])
