"""One advisory lock file, so that two edges on one home are refused. Knows nothing of what it guards."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from clawloop_edge.errors import PoolError


class FileLock:
    """An exclusive `flock` on a file, held until `release` or the death of the process (kill -9 included)."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle

    @classmethod
    def acquire(cls, path: Path, *, wait: bool = False) -> "FileLock":
        """Take the lock, at once or (with `wait`) when its holder lets go.

        Raises:
            PoolError: another process holds it, or the file cannot be opened.
        """
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PoolError(f"cannot open the lock {path}: {error.strerror}; check that the folder is yours") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise PoolError(
                f"another edge (process {holder}) already runs on {path.parent}; stop it, or use another --home"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return cls(path, handle)

    def release(self) -> None:
        """Let go. The file stays: removing it would let two holders lock two different files."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def holder_of(path: Path) -> int:
    """The process id of who holds the lock on `path`; 0 if nobody does, or it cannot be read."""
    try:
        with path.open("rb") as file:
            holder = int(file.read(20))
            os.kill(holder, 0)  # a holder that died is told without a lock of ours, which could refuse a new holder
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder
    except (OSError, ValueError):
        return 0
    return 0
