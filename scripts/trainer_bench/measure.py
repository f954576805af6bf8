"""Times of contenders that take turns, and the most memory that one used."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from trainer_bench.flops import synchronize

_KIB, GIB = 1 << 10, 1 << 30
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Times:
    """Seconds of each round: on the clock, and of the CPU in all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The least wall time: others on the machine can but make it longer."""
        return min(self.wall)

    @property
    def middle(self) -> float:
        """The median wall time."""
        return median(self.wall)


def in_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device | None = None
) -> dict[str, Times]:
    """Run each once unmeasured, then `rounds` times in turns, each round in the other order."""
    device = device or torch.device("cpu")
    for run in contenders.values():
        run()
    found = {name: Times() for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            gc.collect()
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            synchronize(device)
            found[name].wall.append(time.perf_counter() - wall)
            found[name].cpu.append(time.process_time() - cpu)
    return found


@dataclass(frozen=True)
class Peak:
    """GiB: what was there before, and the most over it."""

    base: float
    over: float


def peak_of(run: Callable[[], object], *, device: torch.device | None = None) -> Peak:
    """The most memory during `run`: of a CUDA device as torch's allocator counts it, else of this process, resident."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return Peak(base / GIB, (torch.cuda.max_memory_allocated(device) - base) / GIB)
    with suppress(OSError):  # elsewhere than on Linux the peak is of the whole process, so what came before counts, too
        _RESET.write_text("5")
    base = _resident("VmRSS")
    run()
    return Peak(base / GIB, (_resident("VmHWM") - base) / GIB)


def _resident(entry: str) -> int:
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * _KIB


def available_gib() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * _KIB / GIB
