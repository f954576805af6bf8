"""The tables of consent, outbox and audit, in the pool's database, and what several of the rooms do with them.

Each migration runs once; never change one that was released: add another. Format: docs/formats/outbox.md.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import SealedColumn

if TYPE_CHECKING:
    from sqlite_utils import Database

CURSOR = "outbox.cursor"
"""state: the last change (8 bytes, big-endian) that the outbox has looked at"""


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


SEALED = (
    SealedColumn("receipts", "body", "receipt_id"),
    SealedColumn("outbox", "facts", "item_id"),
    SealedColumn("outbox", "body", "item_id", "'outbox/' || item_id"),
    SealedColumn("audit", "body", "CAST(seq AS TEXT)"),
)


def prepare(pool: Pool) -> None:
    """Have these tables in `pool`."""
    pool.adopt("privacy", (first_tables,), sealed=SEALED)


def item_scope(item_id: str) -> str:
    """The name of the scope that an item's bytes are sealed in: its own, so that dropping it destroys its key."""
    return f"outbox/{item_id}"


def destroy_item(database: "Database", keyring: Keyring, *, item_id: str) -> None:
    """Destroy the bytes of an item that has not been received. One that was sent stays listed as sent."""
    keyring.destroy(database, item_scope(item_id))
    database.conn.execute(
        "UPDATE outbox SET body = NULL, state = iif(state = ?, state, ?) WHERE item_id = ?",
        (ItemState.SENT, ItemState.DROPPED, item_id),
    )


def purge_queue(database: "Database", keyring: Keyring) -> int:
    """Destroy the bytes of all items that the server has not acknowledged; gives how many."""
    query = "SELECT item_id FROM outbox WHERE body IS NOT NULL AND state != ?"
    waiting = [row[0] for row in database.conn.execute(query, (ItemState.RECEIVED,)).fetchall()]
    for item_id in waiting:
        destroy_item(database, keyring, item_id=item_id)
    return len(waiting)
