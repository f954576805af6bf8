"""Folders of files that a person asked for: private, written whole or not at all, and never over what is there.

Knows nothing of what is in them.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.files import sync_folder

SPARE_BYTES = 1 << 20
"""of room, besides the files: their names, and what the folder itself takes"""


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextmanager
def new_folder(
    out: Path, *, needs_bytes: int, free_bytes: Callable[[Path], int] = _free_bytes
) -> Iterator[tuple[Path, Path]]:
    """A draft (0700) to fill with files, and the folder that it becomes once the block ends; if the block raises,
    nothing is left. `out` may be there if it is empty; `needs_bytes` is the room that the files take at most.

    Raises:
        ConfigError: `out` is no folder, or not an empty one, or the one that it should be in is not there.
        StorageError: there is not that much room, or it cannot be written.
    """
    target = out.resolve()
    _check_vacant(target)
    free = free_bytes(target.parent)
    if free < needs_bytes + SPARE_BYTES:
        raise StorageError(
            f"{target} would take {needs_bytes:,} bytes, and {free:,} are free there; make room, or name another disk"
        )
    draft = target.parent / f".{target.name}.draft-{secrets.token_hex(4)}"
    try:
        draft.mkdir(mode=0o700)
        yield draft, target
        _settle(draft)
        draft.rename(target)  # over an empty folder, never over a file: POSIX
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}; nothing of it is left") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_vacant(target: Path) -> None:
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder, so {target.name} cannot be made in it; make it first")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a new folder")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty, and nothing is written over; name a new or an empty folder")


def _settle(draft: Path) -> None:
    """Make the files durable, and their owner's alone."""
    for path in draft.iterdir():
        path.chmod(0o600)
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(draft)
