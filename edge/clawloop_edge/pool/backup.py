"""A copy of the pool in one file: a tar of what it is (`backup.json`), the database, and the keys if a passphrase seals
them (`keys.json`). Taken from one snapshot while an edge serves, and read back whole before it counts. `restore.py`
puts it into a home. Format: docs/formats/pool.md.
"""

import hashlib
import os
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.anchor import Point, point_of
from clawloop_edge.pool.crypt import kek_version
from clawloop_edge.pool.keys import DATABASE_NAME, KeyBundle
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.verify import Progress, count_pool
from clawloop_shared.database import encrypts, open_database, told
from clawloop_shared.envelope import derive_key
from clawloop_shared.errors import StorageError
from clawloop_shared.files import sync_folder

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

LOCK_NAME = "backup.lock"
MANIFEST_NAME, KEYS_NAME = "backup.json", "keys.json"
_PAGES_AT_ONCE = 512
_BLOCK_BYTES = 1 << 20
_SMALL_BYTES = 64 << 10
_MARGIN_BYTES = 16 << 20


class Manifest(msgspec.Struct, frozen=True, kw_only=True, tag_field="is", tag="clawloop-pool-backup.v1"):
    """What a backup holds. `key` and `kek` name the keys that open it; `sqlcipher`: it is encrypted as a whole."""

    end: Point
    key: str
    kek: int
    sqlcipher: bool
    sessions: int
    steps: int
    size_bytes: int
    sha256: str


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup as it is found: what it holds, and the sealed keys, if they are in it."""

    manifest: Manifest
    keys: bytes | None


def key_name(file_key: bytes) -> str:
    """A name for the keys of a pool, which tells nothing of them."""
    return derive_key(file_key, "clawloop pool key name v1")[:8].hex()


def back_up(pool: "Pool", path: Path, *, seal: Callable[[KeyBundle], bytes] | None, progress: Progress) -> Backup:
    """Write a backup of the pool as it is now to `path`, verified; `seal` gives the keys as they go with it.

    Raises:
        PoolError: there is a file already, or the copy does not verify.
        StorageError: the folder cannot be written, or has no room.
    """
    if path.exists():
        raise PoolError(f"{path} exists already; name another file")
    with FileLock.acquire(pool.folder / LOCK_NAME, wait=True), _drafts(path) as (copy, draft):
        _check_room(pool, path.parent)
        manifest, keys = _copy(pool, copy, progress=progress), pool.store.load()
        if manifest.kek not in keys.keks:
            raise PoolError("the key was rotated while the copy was made; make the backup again")
        sealed = seal(keys) if seal else None
        found = Backup(manifest=manifest, keys=sealed)
        _pack(found, copy, to=draft)
        copy.unlink()
        _publish(draft, path)
    return found


def read_backup(path: Path) -> Backup:
    """What the file at `path` says that it holds.

    Raises:
        PoolError: it is no backup of a pool.
        StorageError: it cannot be read.
    """
    with _opened(path) as archive:
        manifest = _member(archive, MANIFEST_NAME, path=path)
        _member_of(archive, DATABASE_NAME, path=path)
        keys = _member(archive, KEYS_NAME, path=path) if KEYS_NAME in archive.getnames() else None
    try:
        return Backup(manifest=msgspec.json.decode(manifest, type=Manifest), keys=keys)
    except msgspec.DecodeError as error:
        raise _no_backup(path, f"what it says of itself is damaged: {error}") from None


def unpack(path: Path, to: Path, *, manifest: Manifest, progress: Progress) -> None:
    """Write the database of the backup at `path` to `to` (0600), and compare its hash.

    Raises:
        PoolError: it is not what the backup says of it.
        StorageError: it cannot be read or written.
    """
    digest, done = hashlib.sha256(), 0
    try:
        handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with _opened(path) as archive, os.fdopen(handle, "wb") as file:
            for block in _blocks(_member_of(archive, DATABASE_NAME, path=path)):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress("reading the backup", done, manifest.size_bytes)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {to}: {error.strerror}; check free disk space and rights") from error
    if digest.hexdigest() != manifest.sha256:
        raise PoolError(f"{path} is damaged: its database is not the one that was put in; take another backup")


def _copy(pool: "Pool", copy: Path, *, progress: Progress) -> Manifest:
    """Copy one snapshot of the database, verify the copy, and say what it is."""
    copy.touch(mode=0o600)
    keys = pool.store.load()
    with pool.read() as source, closing(open_database(copy, keys.file_key, rows_sealed=True)) as target, told(copy):
        end, kek, counts = point_of(source), kek_version(source), count_pool(source)  # the snapshot begins here
        source.conn.backup(
            target.conn,
            pages=_PAGES_AT_ONCE,
            progress=lambda _, left, pages: progress("copying", pages - left, pages),
        )
        target.conn.execute("PRAGMA journal_mode = DELETE").fetchone()  # one file, with no log beside it
        problems = pool.check(target, progress=progress).problems
        if problems:
            raise PoolError(f"the copy does not verify: {problems[0]}; run `clawloop-edge pool verify`")
    return Manifest(
        end=end,
        key=key_name(keys.file_key),
        kek=kek,
        sqlcipher=encrypts(),
        sessions=counts["sessions"],
        steps=counts["steps"],
        size_bytes=copy.stat().st_size,
        sha256=_sha256(copy),
    )


def _pack(backup: Backup, copy: Path, *, to: Path) -> None:
    said = msgspec.json.format(msgspec.json.encode(backup.manifest), indent=1)
    with tarfile.open(to, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in ((MANIFEST_NAME, said), (KEYS_NAME, backup.keys)):
            if data is not None:
                archive.addfile(_entry(name, len(data), at_ms=backup.manifest.end.at_ms), BytesIO(data))
        with copy.open("rb") as file:
            entry = _entry(DATABASE_NAME, backup.manifest.size_bytes, at_ms=backup.manifest.end.at_ms)
            archive.addfile(entry, file)


def _entry(name: str, size_bytes: int, *, at_ms: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size_bytes, 0o600, at_ms // 1000
    return entry


@contextmanager
def _drafts(path: Path) -> Iterator[tuple[Path, Path]]:
    """Two names beside `path` for what is not finished; what is left of them, also by a dead process, is removed."""
    start = f".{path.name}."
    try:
        _remove(path.parent, start)
        name = secrets.token_hex(4)
        yield path.with_name(f"{start}{name}.db.part"), path.with_name(f"{start}{name}.tar.part")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; check free disk space and that the folder is yours"
        ) from error
    finally:
        _remove(path.parent, start)


def _remove(folder: Path, start: str) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(start) and ".part" in path.name:
            path.unlink(missing_ok=True)


def _check_room(pool: "Pool", folder: Path) -> None:
    """Raises StorageError: the copy and the archive of it do not both fit."""
    needed = 2 * pool.size_bytes() + _MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"a backup needs {needed >> 20} MiB in {folder} for a while, and {free >> 20} MiB are free")


def _publish(draft: Path, path: Path) -> None:
    draft.chmod(0o600)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.rename(path)
    sync_folder(path.parent)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise _no_backup(path, str(error)) from None
    except FileNotFoundError as error:
        raise StorageError(f"there is no file {path}; name the backup") from error


def _member_of(archive: tarfile.TarFile, name: str, *, path: Path) -> IO[bytes]:
    found = [entry for entry in archive.getmembers() if entry.name == name and entry.isreg()]
    file = archive.extractfile(found[0]) if len(found) == 1 else None
    if file is None:
        raise _no_backup(path, f"it has no {name}")
    return file


def _member(archive: tarfile.TarFile, name: str, *, path: Path) -> bytes:
    data = _member_of(archive, name, path=path).read(_SMALL_BYTES + 1)
    if len(data) > _SMALL_BYTES:
        raise _no_backup(path, f"its {name} is too large")
    return data


def _no_backup(path: Path, why: str) -> PoolError:
    return PoolError(
        f"{path} is no backup of a pool, or is damaged ({why}); name a file of `clawloop-edge pool backup`"
    )


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
