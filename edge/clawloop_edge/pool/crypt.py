"""The pool's keys below the key-encryption key (KEK), and what they seal. Format: docs/formats/pool.md.

    KEK ── HKDF ──► file key (SQLCipher)
     └── wraps ──► one data key a scope: a session, an outbox item, or "pool" for what belongs to no session;
                   and the index key, for blind look-ups

A scope is shredded by deleting its row of `keys`. Wrapped keys are read from the database at each use (unwrapping
takes 3 µs), so that a key destroyed by another process is not used again here.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_shared.envelope import derive_key, new_data_key, seal, unseal, unwrap_key, wrap_key

if TYPE_CHECKING:
    from sqlite_utils import Database

POOL_SCOPE = "pool"
"""scope of what belongs to no session"""
INDEX_SCOPE = "index"
KEK_VERSION = 1


def file_key(kek: bytes) -> bytes:
    """SQLCipher's raw key (32 bytes) for the file."""
    return derive_key(kek, "clawloop pool file v1")


def session_scope(session_id: str) -> str:
    """The name of a session's scope."""
    return f"session/{session_id}"


def _bind(*parts: str | int) -> bytes:
    # JSON, so that no choice of ids lets two places have the same bytes.
    return msgspec.json.encode(parts)


@dataclass(frozen=True)
class Scope:
    """One data key and the name that everything sealed with it is bound to."""

    pool_id: str
    name: str
    key: bytes

    def seal(self, table: str, record: str, *, column: str, plain: bytes) -> bytes:
        """`plain`, readable only as this column of this record of this table of this scope."""
        return seal(self.key, plain, aad=_bind("pool.v1", self.pool_id, table, self.name, record, column))

    def unseal(self, table: str, record: str, *, column: str, sealed: bytes) -> bytes:
        """What `seal` was given.

        Raises:
            StorageError: it was changed, or it was moved here from another place.
        """
        return unseal(self.key, sealed, aad=_bind("pool.v1", self.pool_id, table, self.name, record, column))


class Keyring:
    """Finds, makes and destroys the data keys of one pool."""

    def __init__(self, pool_id: str, kek: bytes) -> None:
        self.pool_id, self._kek = pool_id, kek

    def find(self, database: "Database", name: str) -> Scope:
        """The scope `name`.

        Raises:
            PoolError: it has no key: it never was, or was forgotten.
            StorageError: its key does not unwrap with this KEK.
        """
        found = self._look_up(database, name)
        if found is None:
            raise PoolError(f"{name} has no key in this pool; it was never kept, or was forgotten")
        return found

    def ensure(self, database: "Database", name: str) -> Scope:
        """The scope `name`, made if it is new. Needs a write transaction."""
        found = self._look_up(database, name)
        if found is not None:
            return found
        key = new_data_key()
        wrapped = wrap_key(self._kek, key, aad=self._aad(name, KEK_VERSION))
        database.conn.execute("INSERT INTO keys (scope, kek, wrapped) VALUES (?, ?, ?)", (name, KEK_VERSION, wrapped))
        return Scope(self.pool_id, name, key)

    def _look_up(self, database: "Database", name: str) -> Scope | None:
        row = database.conn.execute("SELECT kek, wrapped FROM keys WHERE scope = ?", (name,)).fetchone()
        if row is None:
            return None
        return Scope(self.pool_id, name, unwrap_key(self._kek, row[1], aad=self._aad(name, row[0])))

    def destroy(self, database: "Database", name: str) -> None:
        """Make all that was sealed in scope `name` unreadable. Needs a write transaction."""
        database.conn.execute("DELETE FROM keys WHERE scope = ?", (name,))

    def _aad(self, name: str, kek_version: int) -> bytes:
        return _bind("dek.v1", self.pool_id, name, kek_version)


def blind(index_key: bytes, purpose: str, *, value: bytes) -> bytes:
    """An HMAC-SHA256 (32 bytes) that stands for `value` in look-ups and tells nothing of it without the key."""
    name = purpose.encode()
    return hmac.digest(index_key, len(name).to_bytes(2, "big") + name + value, hashlib.sha256)
