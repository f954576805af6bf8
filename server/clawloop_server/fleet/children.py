"""Keeping child processes alive: started in groups of their own, restarted when they die, gone when we are gone.

Knows nothing of what the children do. What they print goes to files, or what is on stdout line by line to who asks for
it. See `guard` for how no orphan is left.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clawloop_shared import guard

_log = logging.getLogger(__name__)

GRACE_S = 5.0
_FIRST_WAIT_S = 0.2
_MAX_LOG_BYTES = 10 << 20
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class ChildSpec:
    """What to run. `environment` is added to ours. `log` gets all output; where there is an `on_line`, that gets each
    line of stdout instead."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    grace_s: float = GRACE_S
    """how long it may take to stop by itself"""
    longest_wait_s: float = 5.0
    """each start that fails doubles the wait before the next one, up to this"""
    steady_s: float = 30.0
    """one that ran for so long did not fail to start"""
    on_line: Callable[[bytes], None] | None = None


@dataclass(frozen=True)
class ChildStatus:
    """How a child is. `pid` is that of its guard, which leads its process group; 0 if it is not running, and then
    `wait_s` is how long until it is started again."""

    name: str
    pid: int
    restarts: int
    started_ms: int
    last_exit: int | None
    wait_s: float
    log: Path


class Child:
    """One child that is kept running until `stop`."""

    def __init__(self, spec: ChildSpec, *, on_exit: Callable[[], None] = lambda: None) -> None:
        self.spec, self._on_exit = spec, on_exit
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._restarts, self._started_ms = 0, 0
        self._last_exit: int | None = None
        self._next_s = 0.0

    @property
    def status(self) -> ChildStatus:
        """How it is now."""
        pid = self._process.pid if self._process and self._process.returncode is None else 0
        wait_s = 0.0 if pid else max(0.0, self._next_s - time.monotonic())
        spec = self.spec
        return ChildStatus(spec.name, pid, self._restarts, self._started_ms, self._last_exit, wait_s, spec.log)

    async def start(self) -> None:
        """Run it, and again whenever it ends."""
        process = await self._spawn()
        self._task = asyncio.create_task(self._keep(process), name=f"keep {self.spec.name}")

    async def stop(self) -> None:
        """End it and everything that it started."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._process is not None:
            await _end(self._process, self.spec.grace_s)
        await self._heard_out()

    def kill(self) -> None:
        """End it without ceremony; it is started again."""
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            began = time.monotonic()
            self._last_exit = await process.wait()
            _kill_group(process.pid)
            await self._heard_out()
            self._on_exit()
            wait_s = _FIRST_WAIT_S if time.monotonic() - began > self.spec.steady_s else wait_s
            _log.warning("%s ended with %s; starting it again in %.1f s (see %s)", *self._told(wait_s))
            process, wait_s = await self._again(wait_s)

    async def _heard_out(self) -> None:
        """Hear to its end what the one that is gone has said; its end comes when nobody is left that could say more."""
        hearing, self._hearing = self._hearing, None
        if hearing is not None:
            await asyncio.wait({hearing}, timeout=self.spec.grace_s)
            hearing.cancel()

    async def _again(self, wait_s: float) -> tuple[asyncio.subprocess.Process, float]:
        """Start it after `wait_s`, however often the system refuses; and how long to wait if it fails again."""
        while True:
            self._next_s = time.monotonic() + wait_s
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self.spec.longest_wait_s)
            try:
                process = await self._spawn()
            except OSError as error:
                _log.error("%s cannot be started: %s; trying again in %.1f s", self.spec.name, error, wait_s)
                continue
            self._restarts += 1
            return process, wait_s

    def _told(self, wait_s: float) -> tuple[str, int | None, float, Path]:
        return self.spec.name, self._last_exit, wait_s, self.spec.log

    async def _spawn(self) -> asyncio.subprocess.Process:
        spec = self.spec
        _roll(spec.log)
        with spec.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(spec.grace_s), *spec.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if spec.on_line else output,
                stderr=output,
                env={**os.environ, **spec.environment},
                cwd=spec.folder,
                start_new_session=True,
                limit=_MAX_LINE_BYTES,
            )
        if spec.on_line is not None and self._process.stdout is not None:
            self._hearing = asyncio.create_task(_hear(self._process.stdout, spec.on_line), name=f"hear {spec.name}")
        self._started_ms = time.time_ns() // 1_000_000
        return self._process


class Supervisor:
    """Several children, started in order and stopped together."""

    def __init__(self, specs: Sequence[ChildSpec] = ()) -> None:
        self._children = [Child(spec) for spec in specs]

    async def start(self) -> None:
        """Start every child; if one cannot be started, none is left."""
        try:
            for child in self._children:
                await child.start()
        except OSError:
            await self.stop()
            raise

    async def add(self, spec: ChildSpec, *, on_exit: Callable[[], None] = lambda: None) -> None:
        """Start one more; `on_exit` is called each time it ends by itself."""
        child = Child(spec, on_exit=on_exit)
        await child.start()
        self._children.append(child)

    def restart(self, name: str) -> None:
        """End the child of that name and start it again."""
        for child in self._children:
            if child.spec.name == name:
                child.kill()

    async def stop(self) -> None:
        """End every child and everything that they started."""
        await asyncio.gather(*(child.stop() for child in self._children))

    @property
    def status(self) -> list[ChildStatus]:
        """How each child is."""
        return [child.status for child in self._children]


async def _hear(stream: asyncio.StreamReader, on_line: Callable[[bytes], None]) -> None:
    """Pass on line by line until the stream ends; a line that is too long for anything of ours is dropped."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        on_line(line)


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace_s + 2):
                await process.wait()
        except TimeoutError:
            _log.warning("process group %d does not stop; killing it", process.pid)
    _kill_group(process.pid)
    await process.wait()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _roll(log: Path) -> None:
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_name(log.name + ".1"))
