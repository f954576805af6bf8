"""Several trainer processes on this machine, each with the seat that torchrun would give it in its environment.

Why not torchrun itself: its store listens on all interfaces, it starts its processes in sessions of their own, where
what ends a server's children does not reach them, and it tells of a failure in a page. Our processes meet on the
loopback interface, stay in our process group, and one that ends ends all others within a second. torchrun works, too:
it is for several machines (docs/training.md). Knows no torch, so that this process costs nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from clawloop_server.errors import TrainerError
from clawloop_shared.errors import ConfigError

LISTENER = "CLAWLOOP_TRAINER_LISTENER"
"""environment: the file descriptor of the store's socket in the first process"""
LOST = 75
"""exit code of a process that ended because another had"""
_POLL_S = 0.1
_GRACE_S = 4.0
"""less than what the server gives us before it kills our group"""
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Seat:
    """This process among those of the trainer, as torchrun says it in the environment. `node` counts machines."""

    rank: int
    size: int
    local_rank: int
    node: int
    listener: int | None = None
    """the open socket of the store, if our own launcher made it"""


def find_seat(environment: Mapping[str, str]) -> Seat | None:
    """The seat that torchrun or launch.py gave this process; None if it is alone.

    Raises:
        ConfigError: half of a seat, or one that is no number.
    """
    if "MASTER_ADDR" not in environment:
        return None  # SLURM and MPI count processes by these names too, and gave us no place to meet
    size = _whole(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1
    if size < 2:
        return None
    try:
        rank, local = (_whole(environment, name) for name in ("RANK", "LOCAL_RANK"))
    except KeyError as error:
        raise ConfigError(f"WORLD_SIZE is {size}, but {error} is not set; start by torchrun") from error
    if not 0 <= rank < size or not 0 <= local < size:
        raise ConfigError(f"RANK {rank} and LOCAL_RANK {local} are not in 0..{size - 1}; start by torchrun")
    node = _whole(environment, "GROUP_RANK") if "GROUP_RANK" in environment else 0
    return Seat(rank, size, local, node, _whole(environment, LISTENER) if environment.get(LISTENER) else None)


def _whole(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise ConfigError(
            f"{name} is {environment[name]!r:.50}, not a number; unset it, or start by torchrun"
        ) from error


def launch(count: int, command: Sequence[str]) -> int:
    """Run `command` as `count` processes until all end; the exit code. What fails is one line on stderr.

    All end when one fails or cannot be started, on SIGTERM, and when our parent ends.

    Raises:
        TrainerError: one cannot be started.
    """
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for rank in range(count):
                processes.append(_start(rank, count, command, listener=listener))
        return _watch(processes, stopping)
    finally:
        _kill(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(rank: int, count: int, command: Sequence[str], *, listener: socket.socket) -> subprocess.Popen[bytes]:
    address, port = listener.getsockname()
    seat = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        LISTENER: listener.fileno(),
    }
    sockets = {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
    try:
        return subprocess.Popen(
            command,
            env=os.environ | sockets | {name: str(value) for name, value in seat.items()},
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else sys.stderr.fileno(),
            pass_fds=(listener.fileno(),) if rank == 0 else (),
        )
    except OSError as error:
        raise TrainerError(
            f"process {rank} of {count} could not be started: {error}; free memory, or set [train] processes lower"
        ) from error


def _watch(processes: Sequence[subprocess.Popen[bytes]], stopping: Sequence[int]) -> int:
    parent = os.getppid()
    while os.getppid() == parent and not stopping:
        codes = [process.poll() for process in processes]
        if any(codes):
            return _failed(processes)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_S)
    processes[0].terminate()  # the others own nothing that could be lost
    try:
        processes[0].wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        print(f"trainer: process 0 did not stop within {_GRACE_S:g} s and is killed", file=sys.stderr)
    return 0


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """End all; the exit code of the one that failed first. One that could not speak for itself is told of."""
    codes = {rank: process.poll() for rank, process in enumerate(processes)}
    first = {rank: code for rank, code in codes.items() if code and code != LOST}
    _kill(processes)
    if not first and codes[0] == 0:
        return 0  # the first was told to stop, and the others missed it
    if not first:
        print(f"trainer: its {len(processes)} processes lost each other, so all end", file=sys.stderr)
    for rank, code in first.items():
        if code < 0:
            name, pid = signal.Signals(-code).name, processes[rank].pid
            print(
                f"trainer: process {rank} of {len(processes)} (pid {pid}) was ended by {name}, so all end;"
                " started again, training goes on from the last checkpoint",
                file=sys.stderr,
            )
    return max((code for code in first.values() if code > 0), default=1)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
