"""How a release moves on in the ledger: the one place that says so, for whoever begins, sends or drops what is noised.

    reserved ── commit_in ──► released     (stays)
        └────── give_back_in ► returned    (stays)

Inside write transactions alone, so that it counts exactly when what it counts happens. docs/formats/outbox.md.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

from clawloop_edge.errors import PoolError

if TYPE_CHECKING:
    from sqlite_utils import Database


class EntryState(StrEnum):
    """Whether a release counts."""

    RESERVED = "reserved"
    """may have left; counts"""
    RELEASED = "released"
    """has left; counts"""
    RETURNED = "returned"
    """never left, as whoever reserved it said; does not count"""


def commit_in(database: "Database", entry_id: str) -> None:
    """Count a release for good: it is about to leave. Once more changes nothing.

    Raises:
        PoolError: the ledger does not count it, so it may not leave.
    """
    update = "UPDATE ledger SET state = ? WHERE entry_id = ? AND state != ?"
    facts = (EntryState.RELEASED, entry_id, EntryState.RETURNED)
    if database.conn.execute(update, facts).rowcount != 1:
        raise PoolError(f"release {entry_id} is not counted by the ledger, so it may not leave")


def give_back_in(database: "Database", entry_id: str) -> bool:
    """Take a release off the count that has not left nor ever will; False if it stays counted, for it may have."""
    update = "UPDATE ledger SET state = ? WHERE entry_id = ? AND state = ?"
    facts = (EntryState.RETURNED, entry_id, EntryState.RESERVED)
    return bool(database.conn.execute(update, facts).rowcount)
