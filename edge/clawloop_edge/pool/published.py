"""A file of its owner's own: readable by them alone, there as a whole or not at all, and never over another unasked."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from clawloop_edge.errors import PoolError
from clawloop_shared.errors import StorageError
from clawloop_shared.files import sync_folder


@contextmanager
def published(path: Path, *, replace: bool) -> Iterator[BufferedRandom]:
    """A file (0600) that is written beside `path`, and gets its name once the block has ended well.

    Raises:
        PoolError: there is one of that name, and `replace` was not said.
        StorageError: it cannot be written.
    """
    if not replace and path.exists():
        raise _there(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            draft.replace(path)
        else:
            os.link(draft, path)  # unlike a rename, a link never replaces what came meanwhile
        sync_folder(path.parent)
    except FileExistsError as error:
        raise _there(path) from error
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; check that its folder is yours") from error
    finally:
        draft.unlink(missing_ok=True)


def _there(path: Path) -> PoolError:
    return PoolError(f"{path} is there already; give --force to replace it, or another name")
