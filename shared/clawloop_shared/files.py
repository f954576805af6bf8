"""Files that are published once and never changed: written beside, synced, renamed, the folder synced.

Knows nothing of what is in them.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from clawloop_shared.errors import StorageError


def publish(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part.

    Raises:
        StorageError: the folder is missing or not writable.
    """
    publish_parts(path, [data], mode=mode)


def publish_parts(path: Path, parts: Iterable[bytes], *, mode: int = 0o644) -> None:
    """Like `publish`, part by part as they are made; what making them raises is raised, and the old file stays.

    Raises:
        StorageError: the folder is missing or not writable.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(draft)
        raise StorageError(
            f"cannot write {path}: {error.strerror}; check that the folder exists and is yours"
        ) from error
    except BaseException:
        _remove(draft)
        raise


def _remove(draft: Path) -> None:
    with contextlib.suppress(OSError):
        draft.unlink()


def publish_secret(path: Path, data: bytes) -> None:
    """Like `publish`, readable by its owner alone (0600)."""
    publish(path, data, mode=0o600)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def private_folder(folder: Path) -> Path:
    """Make `folder` (0700) if it is missing, and return it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()
