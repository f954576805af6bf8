"""Putting a backup into a home: whole and verified, or not at all, also if the process dies in the middle.

The copy is unpacked, opened and verified in a folder of its own; what was forgotten since is forgotten in it again; its
keys are wrapped by a fresh one of this home's key store. Then, under the lock of the keys,

    1  the store gets the fresh key beside those it has, the anchor a second point
    2  one rename puts the copy in the pool's place
    3  the store lets go of the other keys, the anchor of the other point

and whichever of the two is the pool after a crash opens (`rotate.settle`). Knows nothing of what rooms keep in it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import AnchorError, PoolError
from clawloop_edge.pool import finishing
from clawloop_edge.pool.anchor import Anchor, Point, point_of
from clawloop_edge.pool.backup import Backup, Manifest, key_name, read_backup, unpack
from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.keys import DATABASE_NAME, KeyBundle, KeyStore, KnownKey, key_lock, open_keys
from clawloop_edge.pool.leftovers import BEFORE_NAME, DRAFT_NAME
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.passphrase import open_keys_of
from clawloop_edge.pool.rotate import rewrap
from clawloop_edge.pool.store import LOCK_NAME, Pool
from clawloop_edge.pool.verify import Progress
from clawloop_shared.database import encrypt_file, encrypts, engine, open_database, told, transaction
from clawloop_shared.envelope import KEY_BYTES
from clawloop_shared.errors import ClawloopError, KeyMissing, StorageError
from clawloop_shared.files import private_folder, sync_folder

if TYPE_CHECKING:
    from sqlite_utils import Database


class Rooms(msgspec.Struct, frozen=True):
    """What other rooms do with a pool that comes back: `adopt` their tables, so that these are verified and forgotten
    from too; `mend` what must not come back as it was."""

    adopt: Callable[[Pool], None]
    mend: Callable[[Pool, Pool | None, Manifest], None]
    """of the pool that comes, beside the one that was there, if that can be read, and what the backup says of itself"""


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the home now. `unread` says why the pool before could not be read, if there was one that could not:
    then nobody knows what was forgotten since the backup."""

    sessions: int
    steps: int
    forgotten_again: int
    unread: str


def restore(
    folder: Path,
    path: Path,
    *,
    store: KeyStore,
    passphrase: Callable[[], str],
    replace: bool,
    rooms: Rooms,
    progress: Progress,
) -> Restored:
    """Make the backup at `path` the pool in `folder`.

    Without `replace` the home must have no pool, or one in which nothing was ever kept. `passphrase` is asked for if
    the backup's own keys are needed.

    Raises:
        KeyMissing: neither the store nor the backup has the keys that open it.
        PoolError: an edge or another command uses the pool, or changed it meanwhile; there is one and `replace` is not
            given; or the backup is damaged. Then everything stays as it is.
        StorageError: the disk is full or cannot be written.
    """
    backup = read_backup(path)
    private_folder(folder)
    with FileLock.acquire(folder / LOCK_NAME), _draft_folder(folder) as draft:
        file = draft / DATABASE_NAME
        with _present(folder, store, replace=replace) as (present, unread):
            seen = _forgotten(present) if present is not None else None
            keys = KnownKey(_keys_of(backup, path, store=store, passphrase=passphrase))
            unpack(path, file, manifest=backup.manifest, progress=progress)
            if encrypts() and not backup.manifest.sqlcipher:
                encrypt_file(file, keys.load().file_key)
            with Pool.open(draft, keys) as pool:
                again = _mend(pool, present, manifest=backup.manifest, rooms=rooms, progress=progress)
                stats = pool.stats()
            known = open_keys(store, folder)
            target = _fresh(known, keys.load())
            point = _take_keys(file, keys.load(), target=target)
        with key_lock(folder):  # nobody opens the pool, or changes its key, meanwhile
            _clear_log(folder, known, damaged=bool(unread))
            _check_unchanged(folder, store, known=known, seen=seen)
            _put(folder, file, store=store, target=target, point=point)
    return Restored(sessions=stats.sessions, steps=stats.steps, forgotten_again=again, unread=unread)


@contextmanager
def _present(folder: Path, store: KeyStore, *, replace: bool) -> Iterator[tuple[Pool | None, str]]:
    """The pool that is there, if there is one and it can be read; else why not.

    Raises:
        KeyMissing: there is one, and its key is not.
        PoolError: there is one, something was kept in it, and it is not to be replaced.
    """
    database = folder / DATABASE_NAME
    if not database.exists() or not database.stat().st_size:
        yield None, ""
        return
    try:
        open_keys(store, folder)
    except KeyMissing as error:
        raise KeyMissing(f"{error}; if it is lost for good, move {database} out of the home, then restore") from error
    try:
        pool = Pool.open(folder, store)
    except ClawloopError as error:
        if not replace:
            raise PoolError(f"{error}; or, to put the backup in its place: give --replace") from error
        yield None, str(error)
        return
    with pool:
        if not replace and pool.stats().last_seq:
            kept = pool.stats()
            raise PoolError(
                f"{database} has {kept.steps} steps of {kept.sessions} sessions; to put the backup in its place: "
                "give --replace"
            )
        yield pool, ""


@contextmanager
def _draft_folder(folder: Path) -> Iterator[Path]:
    draft = folder / DRAFT_NAME
    shutil.rmtree(draft, ignore_errors=True)
    try:
        yield private_folder(draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _keys_of(backup: Backup, path: Path, *, store: KeyStore, passphrase: Callable[[], str]) -> KeyBundle:
    """The keys that open the backup: this home's, if they do, else its own, which a passphrase opens."""
    manifest, has = backup.manifest, "this home has none"
    try:
        known = store.load()
    except KeyMissing:
        known = None
    if known is not None:
        if key_name(known.file_key) == manifest.key and manifest.kek in known.keks:
            return known
        has = f"{store.name} is {key_name(known.file_key)}, version {max(known.keks)}"
    if backup.keys is None:
        raise KeyMissing(
            f"{path} opens with key {manifest.key}, version {manifest.kek}, alone, and {has}; "
            "what was made before a key was rotated opens only if its keys were sealed into it (--with-keys)"
        )
    found = open_keys_of(backup.keys, passphrase(), where=str(path))
    if manifest.kek not in found.keks:
        raise PoolError(f"{path} is damaged: the keys in it are not those of its database; take another backup")
    return found


def _mend(pool: Pool, present: Pool | None, *, manifest: Manifest, rooms: Rooms, progress: Progress) -> int:
    """Verify the pool that comes, and forget what was forgotten since; gives how many sessions that were.

    Raises:
        PoolError: it does not verify.
    """
    rooms.adopt(pool)
    problems = pool.verify(progress=progress).problems
    if problems:
        raise PoolError(f"the backup is damaged, and nothing was changed: {problems[0]}; take another backup")
    again = _forget_again(pool, present) if present is not None else 0
    rooms.mend(pool, present, manifest)
    return again


def _forget_again(pool: Pool, present: Pool) -> int:
    with pool.read() as database:
        here = [row[0] for row in database.conn.execute("SELECT session_id FROM sessions")]
    with present.read() as database:
        gone = present.tombstones.forgotten_sessions(database, here)
        tags = database.conn.execute("SELECT tag FROM tombstones").fetchall()
    if gone:
        pool.submit(lambda database: pool.forgetting.forget(database, gone)).result()
    if pool.chain_key == present.chain_key:  # the tags of both are made with one key
        insert = "INSERT OR IGNORE INTO tombstones (tag) VALUES (?)"
        pool.submit(lambda database: database.conn.executemany(insert, tags)).result()
    problems = finishing.finish(pool)
    if problems:
        raise PoolError(f"what was forgotten since the backup could not be forgotten again: {problems[0]}")
    return len(gone)


def _fresh(store: KeyBundle, backup: KeyBundle) -> KeyBundle:
    """The keys of this home, and a fresh one that is the newest."""
    version = max(*store.keks, *backup.keks) + 1
    return KeyBundle(store.file_key, {**store.keks, version: os.urandom(KEY_BYTES)})


def _take_keys(file: Path, keys: KeyBundle, *, target: KeyBundle) -> Point:
    """Have the newest of the `target` keys open the file, in place of its own `keys`; gives where its chain ends."""
    newest = max(target.keks)
    with closing(open_database(file, keys.file_key, rows_sealed=True)) as database, told(file):
        point = point_of(database)
        keyring = Keyring(point.pool_id, {**keys.keks, newest: target.keks[newest]})
        with transaction(database):
            rewrap(database, keyring, version=newest)
        database.conn.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, with no log beside it
        if encrypts() and keys.file_key != target.file_key:
            database.conn.execute(f"PRAGMA rekey = \"x'{target.file_key.hex()}'\"").fetchone()
    with file.open("rb") as written:
        os.fsync(written.fileno())
    return point


def _put(folder: Path, file: Path, *, store: KeyStore, target: KeyBundle, point: Point) -> None:
    """Put the file in the pool's place. Needs the locks of the pool and of the keys."""
    database, before = folder / DATABASE_NAME, folder / BEFORE_NAME
    store.replace(target)
    anchor = Anchor(store.anchor, target.file_key)
    anchor.write([*_points(anchor), point])
    before.unlink(missing_ok=True)
    if database.exists():
        os.link(database, before)
    os.replace(file, database)
    sync_folder(folder)
    try:
        Pool._open(folder, store, lock=None, accept=True)._close()
    except BaseException:
        if before.exists():
            os.replace(before, database)
        raise


def _forgotten(present: Pool) -> int:
    """How much the pool that is there has forgotten."""
    with present.read() as database:
        return _count_tombstones(database)


def _count_tombstones(database: "Database") -> int:
    count: int = database.conn.execute("SELECT count(*) FROM tombstones").fetchone()[0]
    return count


def _check_unchanged(folder: Path, store: KeyStore, *, known: KeyBundle, seen: int | None) -> None:
    """See that no other command forgot anything, or changed the key, while the backup was made ready: what was
    forgotten would come back, and a key of which the store knows would be lost. Needs the lock of the keys.

    Raises:
        PoolError: one did.
    """
    changed = store.load() != known
    if seen is not None and not changed:
        with closing(open_database(folder / DATABASE_NAME, known.file_key, rows_sealed=True)) as database:
            changed = _count_tombstones(database) != seen
    if changed:
        raise PoolError("another command forgot something or changed the key meanwhile; nothing was changed; try again")


def _points(anchor: Anchor) -> list[Point]:
    try:
        return anchor.read()[:1]
    except AnchorError:  # a damaged one refused the pool before, and goes with it
        return []


def _clear_log(folder: Path, keys: KeyBundle, *, damaged: bool) -> None:
    """Empty and remove the log of the pool that is there, so that it is not read into the one that comes. Of one that
    is `damaged`, so that it could not be opened before, it is kept aside.

    Raises:
        PoolError: somebody has the pool open.
        StorageError: the log cannot be emptied, although the pool is well: what it holds must not be lost.
    """
    database, log = folder / DATABASE_NAME, folder / f"{DATABASE_NAME}-wal"
    if database.exists():
        try:
            with closing(open_database(database, keys.file_key, rows_sealed=True)) as opened:
                opened.conn.execute("PRAGMA journal_mode = DELETE").fetchone()
        except (ClawloopError, engine().DatabaseError) as error:
            if isinstance(error, engine().OperationalError) and "locked" in str(error):
                raise PoolError(
                    f"another command has {database} open; wait for its end or stop it, then restore again"
                ) from error
            if not damaged:
                raise StorageError(f"the log of {database} cannot be emptied: {error}; is the disk full?") from error
    if log.exists():
        os.replace(log, folder / f"{BEFORE_NAME}-wal")
        (folder / f"{DATABASE_NAME}-shm").unlink(missing_ok=True)
