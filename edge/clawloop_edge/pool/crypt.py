"""The pool's keys below the key-encryption key (KEK), and what they seal. Format: docs/formats/pool.md.

    KEK ── wraps ──► one data key a scope: a session, an outbox item, or "pool" for what belongs to no session;
                     and the index key, for blind look-ups

A scope is shredded by deleting its row of `keys`. Wrapped keys are read from the database at each use (unwrapping
takes 3 µs), so that a key destroyed by another process is not used again here. The KEK has a version, `pool.kek` says
which is in force; a keyring that meets a version which it does not know loads the keys again: another process rotated.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from clawloop_edge.errors import PoolError
from clawloop_shared.database import encrypts
from clawloop_shared.envelope import Dictionary, new_data_key, seal, unseal, unwrap_key, wrap_key

if TYPE_CHECKING:
    from sqlite_utils import Database

POOL_SCOPE = "pool"
"""scope of what belongs to no session"""
INDEX_SCOPE = "index"
"""scope of the key of blind look-ups"""
_KEKS_REMEMBERED = 2
"""versions of the KEK that a keyring knows at a time: that in force, and that of a snapshot from before a rotation"""

_BUCKET_BYTES = 512
"""where nothing encrypts the file as a whole, so that sizes show, sealed payloads are filled up to multiples of this"""


def encryption() -> str:
    """What encrypts a pool here, in words."""
    if encrypts():
        return "file (SQLCipher) and rows"
    return "rows (metadata visible): without the module sqlcipher3 the file itself is not encrypted"


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
    bucket_bytes: int = 0

    @cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(self.key)

    def seal(
        self, table: str, record: str, *, column: str, plain: bytes, dictionary: Dictionary | None = None
    ) -> bytes:
        """`plain`, readable only as this column of this record of this table of this scope."""
        aad = _bind("pool.v1", self.pool_id, table, self.name, record, column)
        return seal(self._cipher, plain, aad=aad, bucket_bytes=self.bucket_bytes, dictionary=dictionary)

    def unseal(
        self, table: str, record: str, *, column: str, sealed: bytes, dictionary: Dictionary | None = None
    ) -> bytes:
        """What `seal` was given.

        Raises:
            StorageError: it was changed, or it was moved here from another place.
        """
        aad = _bind("pool.v1", self.pool_id, table, self.name, record, column)
        return unseal(self._cipher, sealed, aad=aad, dictionary=dictionary)


class Keyring:
    """Finds, makes and destroys the data keys of one pool."""

    def __init__(
        self, pool_id: str, keks: Mapping[int, bytes], *, reload: Callable[[], Mapping[int, bytes]] | None = None
    ) -> None:
        """`keks` are the KEKs by version; `reload` gives them as they are now."""
        self.pool_id, self._keks = pool_id, dict(keks)
        self._reload = reload or (lambda: keks)
        self._bucket_bytes = 0 if encrypts() else _BUCKET_BYTES

    def find(self, database: "Database", name: str) -> Scope:
        """The scope `name`.

        Raises:
            PoolError: it has no key: it never was, or was forgotten. Or its KEK is not there.
            StorageError: its key does not unwrap with its KEK.
        """
        found = self._look_up(database, name)
        if found is None:
            raise PoolError(f"{name} has no key in this pool; it was never kept, or was forgotten")
        return found

    def ensure(self, database: "Database", name: str) -> Scope:
        """The scope `name`, made if it is new. Needs a write transaction."""
        found = self._look_up(database, name)
        if found is None:
            found = self.draft(name)
            self.adopt(database, found)
        return found

    def draft(self, name: str) -> Scope:
        """A scope `name` with a new key that is nowhere yet: to seal what is large before the transaction."""
        return self._scope(name, new_data_key())

    def adopt(self, database: "Database", scope: Scope) -> None:
        """Keep the key of a drafted scope in the place of any of that name. Needs a write transaction."""
        version = kek_version(database)
        insert = "INSERT OR REPLACE INTO keys (scope, kek, wrapped) VALUES (?, ?, ?)"
        database.conn.execute(insert, (scope.name, version, self.wrap(scope.name, scope.key, version=version)))

    def _scope(self, name: str, key: bytes) -> Scope:
        return Scope(self.pool_id, name, key, self._bucket_bytes)

    def _look_up(self, database: "Database", name: str) -> Scope | None:
        row = database.conn.execute("SELECT kek, wrapped FROM keys WHERE scope = ?", (name,)).fetchone()
        return None if row is None else self._scope(name, self.unwrap(name, row[1], version=row[0]))

    def destroy(self, database: "Database", name: str) -> None:
        """Make all that was sealed in scope `name` unreadable. Needs a write transaction."""
        database.conn.execute("DELETE FROM keys WHERE scope = ?", (name,))

    def wrap(self, name: str, key: bytes, *, version: int) -> bytes:
        """The data key of scope `name` under the KEK of a version."""
        return wrap_key(self._kek(version), key, aad=self._aad(name, version))

    def unwrap(self, name: str, wrapped: bytes, *, version: int) -> bytes:
        """What `wrap` was given."""
        return unwrap_key(self._kek(version), wrapped, aad=self._aad(name, version))

    def _kek(self, version: int) -> bytes:
        found = self._keks.get(version)
        if found is None:
            known = self._keks | dict(self._reload())
            self._keks = {number: known[number] for number in sorted(known)[-_KEKS_REMEMBERED:]}
            found = self._keks.get(version)
        if found is None:
            held = ", ".join(map(str, sorted(self._keks)))
            raise PoolError(
                f"this pool needs version {version} of its key, and there is version {held}; "
                + ("the key is an older copy: bring back the newer" if version > max(self._keks) else _OLDER_POOL)
            )
        return found

    def _aad(self, name: str, kek_version: int) -> bytes:
        return _bind("dek.v1", self.pool_id, name, kek_version)


_OLDER_POOL = "the pool is a copy from before the key was rotated, which nothing opens any more: bring back the newer"


def kek_version(database: "Database") -> int:
    """The version of the KEK that is in force: every data key is wrapped by it."""
    version: int = database.conn.execute("SELECT kek FROM pool").fetchone()[0]
    return version


def blind(index_key: bytes, purpose: str, *, value: bytes) -> bytes:
    """An HMAC-SHA256 (32 bytes) that stands for `value` in look-ups and tells nothing of it without the key."""
    name = purpose.encode()
    return hmac.digest(index_key, len(name).to_bytes(2, "big") + name + value, hashlib.sha256)
