"""One agent as a process group of its own: bounded time, memory and output, and nothing left of it afterwards.

Knows no edge and no reward. A child that makes a session of its own leaves the group; no portable way ends such a one.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from clawloop_edge.rollout.journal import Ending
from clawloop_shared.errors import ConfigError

_HEAD_BYTES = _TAIL_BYTES = 64 << 10
_PIPE_S = 1.0
"""how long what was printed may take to come through once its writers are dead"""
_HANDLES_EACH, _HANDLES_MORE = 8, 128
_LIMITED = 'ulimit -v "$0" && exec "$@"'


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent may take. `memory_bytes` is its address space (RLIMIT_AS), 0: no limit; `grace_s` is what it gets
    between SIGTERM and SIGKILL."""

    timeout_s: float = 600.0
    memory_bytes: int = 0
    grace_s: float = 5.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent ended, and the last line that it printed on stdout."""

    ending: Ending
    detail: str
    seconds: float
    last_line: bytes = b""


class Excerpt(asyncio.Protocol):
    """The beginning and the end of what a pipe says."""

    def __init__(self) -> None:
        self.head, self.tail, self.total = b"", b"", 0
        self.closed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Take some more."""
        self.total += len(data)
        room = _HEAD_BYTES - len(self.head)
        self.head += data[:room]
        self.tail = (self.tail + data[room:])[-_TAIL_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self.closed.set()

    @property
    def text(self) -> bytes:
        """What is left, with a word on what is missing."""
        missing = self.total - len(self.head) - len(self.tail)
        gap = f"\n[... {missing} bytes left out ...]\n".encode() if missing else b""
        return self.head + gap + self.tail

    @property
    def last_line(self) -> bytes:
        """The last line that is not empty."""
        return (self.head + self.tail).rstrip().rpartition(b"\n")[2]


async def run_agent(
    command: Sequence[str], *, environment: Mapping[str, str], task: Path, log: Path, limits: Limits
) -> Outcome:
    """Run an agent to its end, with `task` on its stdin; what it printed is in `log` afterwards.

    When it is cancelled, the agent is ended first.
    """
    began = time.monotonic()
    out, err = Excerpt(), Excerpt()
    started = await _start(_limited(command, limits.memory_bytes), environment, task=task, excerpts=(out, err))
    if isinstance(started, str):
        return Outcome(ending=Ending.NOT_STARTED, detail=started, seconds=0.0)
    process, transports = started
    try:
        timed_out = await _wait(process, limits.timeout_s)
    finally:
        await _end_group(process, limits.grace_s)
        await _close(transports, (out, err))
        _write_log(log, out, err)
    ending, detail = _how(process.returncode or 0)
    if timed_out:
        ending, detail = Ending.TIMEOUT, f"after {limits.timeout_s:g} s"
    return Outcome(ending=ending, detail=detail, seconds=time.monotonic() - began, last_line=out.last_line)


def _how(code: int) -> tuple[Ending, str]:
    if code < 0:
        return Ending.SIGNAL, signal.strsignal(-code) or str(-code)
    return (Ending.EXIT_CODE, str(code)) if code else (Ending.FINISHED, "")


def allow_files(agents: int) -> None:
    """Have room for the pipes and connections of so many agents.

    Raises:
        ConfigError: the system allows too few open files.
    """
    wanted = _HANDLES_MORE + _HANDLES_EACH * agents
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(f"{agents} agents need {wanted} open files, {hard} are allowed; lower --parallel")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def check_memory_limit(memory_bytes: int) -> None:
    """Return if an address space can be limited so here.

    Raises:
        ConfigError: it cannot (macOS does not).
    """
    if not memory_bytes:
        return
    command = _limited(["true"], memory_bytes)
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    if await process.wait():
        raise ConfigError(f"an address space of {memory_bytes} bytes cannot be set here; leave --memory out")


def _limited(command: Sequence[str], memory_bytes: int) -> list[str]:
    # By a shell and not between fork and exec, where nothing may run beside other threads.
    if not memory_bytes:
        return list(command)
    return ["/bin/sh", "-c", _LIMITED, str(memory_bytes >> 10), *command]


async def _start(
    command: Sequence[str], environment: Mapping[str, str], *, task: Path, excerpts: Sequence[Excerpt]
) -> tuple[asyncio.subprocess.Process, list[asyncio.ReadTransport]] | str:
    """The process, and the pipes from its stdout and stderr; or why there is none."""
    pipes = [await _listen(excerpt) for excerpt in excerpts]
    (_, out), (_, err) = pipes
    try:
        with task.open("rb") as stdin:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=stdin, stdout=out, stderr=err, env=dict(environment), start_new_session=True
            )
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    finally:
        os.close(out)
        os.close(err)  # a pipe that no process has now is closed by its reader
    return process, [transport for transport, _ in pipes]


async def _listen(excerpt: Excerpt) -> tuple[asyncio.ReadTransport, int]:
    """A pipe that is read into `excerpt`: its transport, and the handle to write to.

    Not asyncio's own pipes: with these, waiting for a process is waiting for all that hold its pipes, in some versions.
    """
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: excerpt, os.fdopen(reading, "rb", 0))
    return transport, writing


async def _wait(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    """Whether it took too long."""
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return True
    return False


async def _end_group(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """End an agent and what it started; on return none of its group runs."""
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            pass
    _signal(process.pid, signal.SIGKILL)
    await process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # all gone; macOS says the latter where only dead ones are left
        return


async def _close(transports: Sequence[asyncio.ReadTransport], excerpts: Sequence[Excerpt]) -> None:
    try:
        async with asyncio.timeout(_PIPE_S):
            for excerpt in excerpts:
                await excerpt.closed.wait()
    except TimeoutError:  # a child that left the group still holds it
        for transport in transports:
            transport.close()


def _write_log(path: Path, out: Excerpt, err: Excerpt) -> None:
    data = b"--- stdout\n" + out.text + b"\n--- stderr\n" + err.text
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
