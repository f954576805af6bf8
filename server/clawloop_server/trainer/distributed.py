"""The world of several processes that train one adapter: torch.distributed, and FSDP2 for the base and the adapter.

Each decoder layer, and what is left of the model below one root (embedding, last norm, head), is held in parts, one a
process, and is whole only while it computes. FSDP takes the mean of the processes' gradients, so the engine multiplies
each loss by their number. Tensors go over the group of the model's device (nccl, or gloo on the CPU); whatever else is
told goes as length-prefixed bytes of msgspec over gloo. No pickle.

A process that dies must not leave the others waiting: each beats once a second with all others on a group of its own,
and ends when a beat fails (`Pulse`). Knows no engine, command or home.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from clawloop_server.trainer.launch import LOST, Seat
from clawloop_server.trainer.packing import PackedRow
from clawloop_server.trainer.scorer import bare
from clawloop_server.trainer.world import Root
from clawloop_shared.errors import ConfigError
from clawloop_shared.whole_step import Sums

JOIN_S = 600.0
"""how long the first process waits for the last one at the start"""
COLLECTIVE_S = 1800.0
"""how long one process may compute while another waits for it"""
PULSE_S = 120.0
"""after how long without a beat a machine is taken for dead; a process whose machine lives is missed at once"""
BEAT_S = 1.0
_FOREVER = timedelta(days=365)

log = logging.getLogger("clawloop.trainer")


class Processes:
    """All processes of a trainer, seen from one of them. All call its methods at once, in the same order."""

    def __init__(self, seat: Seat) -> None:
        """Wait for the others, and join them."""
        self.rank, self.size, self.seat = seat.rank, seat.size, seat
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=_store(seat),
            rank=seat.rank,
            world_size=seat.size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        # Whoever waits for the next command may wait for days: until there is enough to learn from.
        self._commands = dist.new_group(backend="gloo", timeout=_FOREVER)
        self.pulse_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PULSE_S))

    def close(self) -> None:
        """Leave; all have stopped."""
        dist.destroy_process_group()

    # what the engine asks of a world

    def place(self, root: Root, device: torch.device) -> None:
        """This process's part of each layer, and of what is left below the root.

        Raises:
            ConfigError: a device that processes cannot share a model on.
        """
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f'[train] processes: several cannot train on {device.type}; set device = "cpu" or processes = 1'
            )
        mesh = init_device_mesh(device.type, (self.size,))
        for layer in bare(root.model).get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(root, mesh=mesh)

    def share(self, rows: Sequence[PackedRow]) -> list[PackedRow | None]:
        """Every so many-th row by size, so that those which are computed at the same time take as long."""
        ordered = sorted(rows, key=lambda row: len(row.token_ids_T), reverse=True)
        mine: list[PackedRow | None] = list(ordered[self.rank :: self.size])
        return mine + [None] * (-(-len(rows) // self.size) - len(mine))

    def total(self, sums: Sums) -> Sums:
        """The sums of all, added in the order of their ranks, so that each gets the same."""
        parts = [msgspec.msgpack.decode(data, type=Sums) for data in self.exchange(msgspec.msgpack.encode(sums))]
        return sum(parts[1:], start=parts[0])

    def union(self, numbers: Sequence[int]) -> list[int]:
        """What any has found, sorted, each once."""
        found = self.exchange(msgspec.msgpack.encode(list(numbers)))
        return sorted({number for data in found for number in msgspec.msgpack.decode(data, type=list[int])})

    def together(self, found: dict[int, list[float]]) -> dict[int, list[float]]:
        """What all have found, by its number."""
        merged: dict[int, list[float]] = {}
        for data in self.exchange(msgspec.msgpack.encode(found)):
            merged |= msgspec.msgpack.decode(data, type=dict[int, list[float]])
        return merged

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which each holds a part."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, like: Tensor, value: Tensor) -> Tensor:
        """This process's part of a value that each has whole. Nothing is sent."""
        value = value.to(like.device)
        if not isinstance(like, DTensor):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def agree(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process."""
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, number: int) -> int:
        """The smallest number that any has."""
        found = torch.tensor([number])
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return int(found)

    # what leader and followers say to each other

    def exchange(self, data: bytes) -> list[bytes]:
        """What each gives, by rank."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = int(max(sizes))
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        if longest:
            dist.all_gather(padded, _as_tensor(data + bytes(longest - len(data))))
        return [part[: int(size)].numpy().tobytes() for part, size in zip(padded, sizes, strict=True)]

    def tell(self, data: bytes) -> None:
        """Say this to all others, who `hear` it; by the first process alone."""
        dist.broadcast(torch.tensor([len(data)]), src=0, group=self._commands)
        dist.broadcast(_as_tensor(data), src=0, group=self._commands)

    def hear(self) -> bytes:
        """What the first process tells next, however long that takes."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._commands)
        data = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self._commands)
        return data.numpy().tobytes()


class Pulse:
    """Ends this process soon after any other has ended, whatever it is waiting for."""

    def __init__(self, world: Processes, *, lost: Callable[[], None]) -> None:
        """`lost` is called, from a thread, once: when another process or our parent is gone."""
        self._world, self._lost, self._parent = world, lost, os.getppid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin to beat; all processes must."""
        self._thread.start()

    def stop(self) -> None:
        """Wait until all processes want to stop, and let none be missed from then on."""
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while os.getppid() == self._parent:
            self._stop.wait(BEAT_S)
            stopping = torch.tensor([int(self._stop.is_set())])
            try:
                dist.all_reduce(stopping, group=self._world.pulse_group)
            except RuntimeError:  # gloo: a connection was closed, or nothing came for PULSE_S
                break
            if int(stopping) == self._world.size:
                return
        self._lost()


def end_with_the_others(seat: Seat) -> None:
    """End this process at once; it has nothing that could be lost. Our own launcher says which one was the first."""
    if seat.listener is None:
        log.error("rank %d of this trainer ends: another of its processes has ended", seat.rank)
    os._exit(LOST)


def _store(seat: Seat) -> Store:
    """Where the processes find each other. torchrun's environment names it; that of our own launcher is a socket on the
    loopback interface (torch would listen on all of them)."""
    timeout = timedelta(seconds=JOIN_S)
    if seat.listener is None:
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        seat.size,
        seat.rank == 0,
        timeout,
        master_listen_fd=seat.listener if seat.rank == 0 else None,
    )


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
