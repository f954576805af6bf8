"""A process of our own that answers one question at a time over a pipe: started on first use, low in the machine's
order, and gone when the pipe is. Frames are bytes with their length before them; nothing is ever unpickled.

Knows nothing of what is asked. `Child` is the parent's side; `connect` and `behave` are for the child.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

MAX_FRAME_BYTES = 256 << 20
_END_S = 1.0


class Child:
    """The parent's side. For one thread at a time, but for `kill` and `pid`."""

    def __init__(self, module: str, *, environment: Mapping[str, str] | None = None, silent: bool = False) -> None:
        """`module` is run as a program. `environment`: all that it gets, else that of this process; `silent`: what it
        writes to its standard output and errors is thrown away."""
        self._module, self._silent = module, silent
        self._environment = None if environment is None else dict(environment)
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether there is one to ask."""
        return self._connection is not None

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, in a session of its own.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._connection = Connection(ours.detach())
            command = [sys.executable, "-P", "-m", self._module, str(theirs.fileno())]
            out = subprocess.DEVNULL if self._silent else None
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def ask(self, data: bytes, *, within_s: float) -> bytes:
        """The answer to a question.

        Raises:
            EOFError, OSError: it is gone; as TimeoutError: it gave none in time, and was killed.
        """
        if self._connection is None:
            raise EOFError
        late = threading.Event()

        def give_up() -> None:  # by force, as it may have stopped within a frame
            late.set()
            self.kill()

        timer = threading.Timer(within_s, give_up)
        timer.start()
        try:
            self._connection.send_bytes(data)
            return self._connection.recv_bytes(MAX_FRAME_BYTES)
        except (EOFError, OSError) as error:
            if late.is_set():
                raise TimeoutError(f"no answer within {within_s:g} s") from error
            raise
        finally:
            timer.cancel()

    def send(self, data: bytes) -> None:
        """Tell it something. Raises EOFError, OSError: it is gone."""
        if self._connection is None:
            raise EOFError
        self._connection.send_bytes(data)

    def receive(self, most_bytes: int) -> bytes:
        """What it says next, however long that takes. Raises EOFError, OSError: it is gone."""
        if self._connection is None:
            raise EOFError
        return self._connection.recv_bytes(most_bytes)

    def kill(self) -> None:
        """End it and all that it has started, at once; who waits for its answer gets EOFError. From any thread."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a zombie's group is not ours
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self, within_s: float) -> int | None:
        """How it ended: its exit status, or minus the signal; None if it runs still."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.returncode

    def end(self) -> None:
        """Let it go: by closing the pipe, and by force if it does not heed that."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
        self._connection = self._process = None


# What follows is for the child.


def connect() -> Connection:
    """The pipe to the parent."""
    return Connection(int(sys.argv[1]))


def behave(memory_bytes: int = 0) -> None:
    """Have little claim to the CPU, a bounded address space (0: as it is), no core dump, and leave Ctrl-C to the
    parent."""
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not memory_bytes:
        return
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; there, look at `held_bytes` now and then
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def held_bytes() -> int:
    """What this process holds in memory; on macOS the most that it ever held. Linux counts the peak of the process that
    it was forked from (an edge with its model) as its own, so there it is what is held now."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
