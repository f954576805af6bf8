"""Runs one command and lets nothing of it outlive the supervisor, on any Unix and even after the supervisor's kill -9.

It leads a process group of its own, in which the command and all its children run, and reads a pipe whose other end
the supervisor holds. When the pipe ends, or on SIGTERM, the group is asked to stop, and after a grace period killed.
(Linux alone would have PR_SET_PDEATHSIG; it does not reach grandchildren, and macOS has nothing like it.)

Run by path with `python -I -S`, so that it stays small: it must import nothing but the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def _stop_group(grace_s: float, done: threading.Event) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(0, signal.SIGTERM)
    if not done.wait(grace_s):
        os.killpg(0, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """`GRACE_SECONDS COMMAND...`; the exit code of the command, or 128 and its signal."""
    grace_s, command = float(arguments[0]), arguments[1:]
    stop, done = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def wait_for_supervisor() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    def wait_for_stop() -> None:
        stop.wait()
        _stop_group(grace_s, done)

    threading.Thread(target=wait_for_supervisor, daemon=True).start()
    threading.Thread(target=wait_for_stop, daemon=True).start()
    code = child.wait()
    done.set()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
