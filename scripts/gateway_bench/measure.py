"""Loads one contender with one phase, and reads what that cost it: CPU from the kernel's own account, and memory."""

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from gateway_bench.client import Connection, Timing, WrongReplyError, make_body
from gateway_bench.contenders import Contender

ANSWER_TIMEOUT_S = 60.0
_MIB = 1 << 20
_NANOSECOND = 1e-9
_PROCESS_CPU_CLOCK = 2


@dataclass(frozen=True)
class Phase:
    """One kind of load: `count` calls a round, `at_once` of them in flight."""

    name: str
    count: int
    at_once: int = 1
    kib: int = 1
    stream: bool = False
    paced: bool = False


PHASES = (
    Phase("1 KiB prompt", 300),
    Phase("64 KiB prompt", 150, kib=64),
    Phase("16 at once", 1500, at_once=16),
    Phase("stream", 60, stream=True),
    Phase("16 streams at once", 160, at_once=16, stream=True),
    Phase("paced stream", 8, stream=True, paced=True),
)


@dataclass(frozen=True)
class Cpu:
    """Seconds that a process tree ran, and seconds that it could have run but had no core."""

    ran_s: float = 0.0
    waited_s: float = 0.0

    def since(self, before: "Cpu", *, calls: int) -> "Cpu":
        """What each of `calls` has used since then."""
        return Cpu((self.ran_s - before.ran_s) / calls, max(0.0, self.waited_s - before.waited_s) / calls)


@dataclass
class Batch:
    """What came of one phase of one round, or of several put together; `cpu` is a call's, one entry a round."""

    timings: list[Timing] = field(default_factory=list)
    errors: int = 0
    why: str = ""
    wall_s: float = 0.0
    cpu: list[Cpu] = field(default_factory=list)

    def add(self, other: "Batch") -> None:
        """Take in another round of the same phase."""
        self.timings += other.timings
        self.errors += other.errors
        self.why = self.why or other.why
        self.wall_s += other.wall_s
        self.cpu += other.cpu


def processes(pid: int) -> list[psutil.Process]:
    """A process and all its children."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_of(pid: int) -> Cpu:
    """What a process tree has used: on Linux by its CPU clock, which counts threads that have ended, too (clockid_t in
    include/linux/posix-timers.h), and by schedstat for the waiting of those that live; elsewhere as psutil knows it."""
    if not Path("/proc/self/schedstat").exists():
        return Cpu(sum(sum(process.cpu_times()[:2]) for process in processes(pid)))
    tree = [process.pid for process in processes(pid)]
    ran = sum(time.clock_gettime_ns((~each << 3) | _PROCESS_CPU_CLOCK) for each in tree)
    return Cpu(ran * _NANOSECOND, sum(map(_waited_ns, tree)) * _NANOSECOND)


def _waited_ns(pid: int) -> int:
    waited = 0
    for thread in os.scandir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # the thread has ended since
            waited += int(Path(thread.path, "schedstat").read_text().split()[1])
    return waited


def rss_mib(pid: int) -> float:
    """Resident memory of a process tree, in MiB."""
    return sum(int(process.memory_info().rss) for process in processes(pid)) / _MIB


async def load(contender: Contender, phase: Phase, *, limit_s: float) -> Batch:
    """Run one phase of one round, for `limit_s` seconds at most, and until what passed is kept."""
    before = cpu_of(contender.pid) if contender.pid else Cpu()
    batch, began = Batch(), time.perf_counter()
    body = make_body(kib=phase.kib, stream=phase.stream, paced=phase.paced)
    calls = iter(range(phase.count))

    async def worker() -> None:
        connection = Connection(contender.port, token=contender.token)
        for _ in calls:
            if time.perf_counter() - began > limit_s:
                break
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    batch.timings.append(await connection.ask(body, stream=phase.stream))
            except (OSError, EOFError, ValueError, KeyError, WrongReplyError) as error:
                batch.errors, batch.why = batch.errors + 1, batch.why or f"{type(error).__name__}: {error}"
                connection.close()
        connection.close()

    await asyncio.gather(*(worker() for _ in range(phase.at_once)))
    batch.wall_s = time.perf_counter() - began
    contender.answered += len(batch.timings)
    await contender.settle()
    if contender.pid and batch.timings:
        batch.cpu = [cpu_of(contender.pid).since(before, calls=len(batch.timings))]
    return batch


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are at most; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
