"""Small named values of the edge (membership, cursors, keys), each sealed. Works inside any transaction or snapshot."""

from typing import TYPE_CHECKING

from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring

if TYPE_CHECKING:
    from sqlite_utils import Database


def read_state(database: "Database", keyring: Keyring, *, name: str) -> bytes | None:
    """The value `name`, or None if it was never set."""
    row = database.conn.execute("SELECT body FROM state WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    return keyring.find(database, POOL_SCOPE).unseal("state", name, column="body", sealed=row[0])


def write_state(database: "Database", keyring: Keyring, *, name: str, value: bytes) -> None:
    """Set the value `name`. Needs a write transaction."""
    body = keyring.ensure(database, POOL_SCOPE).seal("state", name, column="body", plain=value)
    database.conn.execute("INSERT OR REPLACE INTO state (name, body) VALUES (?, ?)", (name, body))
