"""Changing the key-encryption key: every data key is wrapped anew in one transaction, and the old key is destroyed.

    1  the store gets the new key beside the old one
    2  one transaction wraps all keys anew and says so (`pool.kek`)
    3  the store lets go of the old key

A process that dies between leaves two keys in the store; the next that opens the pool does what was left to do. So
what an earlier copy of the database holds opens with nothing that is there today, and forgetting is final.
"""

import os
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.crypt import Keyring, kek_version
from clawloop_edge.pool.keys import KeyBundle, key_lock
from clawloop_shared.envelope import KEY_BYTES

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

_AT_ONCE = 1000


class Rotated(msgspec.Struct, frozen=True, kw_only=True):
    """The version of the key that is in force now, and how many data keys it wraps."""

    version: int
    keys: int


def rotate(pool: "Pool") -> Rotated:
    """Change the pool's key, also while an edge serves: it takes up the new one by itself.

    Raises:
        PoolError: the key store cannot be read or written; then the old key stays in force, or the next opening of the
            pool finishes the rotation.
        StorageError: the database cannot be written; the next opening of the pool finishes the rotation.
    """
    with key_lock(pool.folder):
        settle(pool, pool.store.load())  # what an earlier rotation may have left
        keys = pool.store.load()
        wider = KeyBundle(keys.file_key, {**keys.keks, max(keys.keks) + 1: os.urandom(KEY_BYTES)})
        pool.store.replace(wider)
        return settle(pool, wider)


def settle(pool: "Pool", keys: KeyBundle) -> Rotated:
    """Bring the newest of the store's keys into force, and let go of the others. Needs the lock of the keys."""
    newest = max(keys.keks)
    with pool.read() as database:
        done = Rotated(version=kek_version(database), keys=_count(database))
    if done.version in keys.keks and done.version < newest:
        done = pool.submit(lambda database: rewrap(database, pool.keyring, version=newest)).result()
    if done.version == newest and len(keys.keks) > 1:
        pool.store.replace(KeyBundle(keys.file_key, {newest: keys.keks[newest]}))
    return done


def rewrap(database: "Database", keyring: Keyring, *, version: int) -> Rotated:
    """Wrap all data keys by the key of this version. Needs a write transaction."""
    run = database.conn.execute
    after, count = "", 0
    query = "SELECT scope, kek, wrapped FROM keys WHERE scope > ? ORDER BY scope LIMIT ?"
    while rows := run(query, (after, _AT_ONCE)).fetchall():
        anew = [
            (version, keyring.wrap(scope, keyring.unwrap(scope, wrapped, version=kek), version=version), scope)
            for scope, kek, wrapped in rows
        ]
        database.conn.executemany("UPDATE keys SET kek = ?, wrapped = ? WHERE scope = ?", anew)
        after, count = rows[-1][0], count + len(rows)
    run("UPDATE pool SET kek = ?", (version,))
    return Rotated(version=version, keys=count)


def _count(database: "Database") -> int:
    count: int = database.conn.execute("SELECT count(*) FROM keys").fetchone()[0]
    return count
