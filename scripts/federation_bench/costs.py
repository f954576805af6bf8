"""What one request, and one exchange of a question and its answer, costs each process of a server, in CPU.

One device asks one thing over and over; what the server spends while nobody asks is taken off. CPU time moves little
with other load on the machine, so that these figures can be multiplied: docs/scale.md does.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from clawloop_server.fleet.tls import ensure_tls
from clawloop_server.simulate.device import Device, Habits
from clawloop_server.simulate.node import Node, load_flwr
from clawloop_server.simulate.stage import VOCABULARY, Stage
from clawloop_shared.errors import ClawloopError

_IDLE_S = 10.0
_LONG_S = 3600.0
_GREETED_S = 240.0
_OURS = ("hub", "superlink", "bridge")


class Cost(msgspec.Struct, frozen=True):
    """CPU in ms of one of these, by process, over `count` of them."""

    name: str
    count: int
    ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        """Of all processes."""
        return sum(self.ms.values())


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """`idle_cores`: what each process uses while one device is there and says nothing."""

    idle_cores: dict[str, float]
    costs: list[Cost]


def measure(folder: Path, *, count: int) -> Costs:
    """Ask `count` times for each. Raises ClawloopError: the device was not greeted."""
    with _stage(folder / "quiet", upload_every_s=_LONG_S) as stage:
        found = asyncio.run(_Bench(stage, count, found=None).requests())
    with _stage(folder / "asked", upload_every_s=0.01) as stage:
        return asyncio.run(_Bench(stage, count, found=found).exchanges())


def _stage(folder: Path, *, upload_every_s: float) -> Stage:
    fleet: dict[str, object] = {"upload_every_s": upload_every_s, "status_every_s": _LONG_S, "exchanges_per_s": 1000.0}
    stage = Stage.make(folder, settings={"fleet": fleet})
    stage.start()
    return stage


class _Bench:
    def __init__(self, stage: Stage, count: int, *, found: Costs | None) -> None:
        self._stage, self._count, self._found = stage, count, found
        self._idle: dict[str, float] = found.idle_cores if found else {}

    async def requests(self) -> Costs:
        """What single requests cost."""
        device, node = self._device(poll_s=1.0)
        living = asyncio.create_task(device.live())
        try:
            await self._until(lambda: device.account.answered >= 2)  # how it is, and its first upload
            began, before = time.monotonic(), self._spent()
            await asyncio.sleep(_IDLE_S)
            self._idle = {k: (v - before[k]) / (time.monotonic() - began) for k, v in self._spent().items()}
            costs = [
                await self._of("a poll that finds nothing", node.receive),
                await self._of("a heartbeat", node.beat),
            ]
            await node.forget_connections()
            costs.append(await self._of("a poll on a connection of its own", node.receive))
        finally:
            device.stop()
            await living
        return Costs(idle_cores=self._idle, costs=costs)

    async def exchanges(self) -> Costs:
        """What a question and its answer cost, after the polls that found nothing are taken off."""
        assert self._found is not None
        device, _ = self._device(poll_s=0.02)
        living = asyncio.create_task(device.live())
        try:
            await self._until(lambda: device.account.answered >= 2)
            account, before, began = device.account, self._spent(), time.monotonic()
            polls, answered = account.polls, account.answered
            await self._until(lambda: account.answered >= answered + self._count)
            spent, seconds = self._spent(), time.monotonic() - began
        finally:
            device.stop()
            await living
        count = account.answered - answered
        empty, poll = account.polls - polls - count, self._found.costs[0]
        ms = {k: ((spent[k] - before[k] - self._idle[k] * seconds) * 1000 - empty * poll.ms[k]) / count for k in _OURS}
        return msgspec.structs.replace(self._found, costs=[*self._found.costs, Cost("an upload of nothing", count, ms)])

    def _device(self, *, poll_s: float) -> tuple[Device, Node]:
        stage = self._stage
        assert stage.running is not None
        tls = ssl.create_default_context(cadata=ensure_tls(stage.home.keys, []).ca.read_text())
        node = Node(stage.running.url, tls, flwr=load_flwr(), heartbeat_s=1800, keep_s=75)
        habits = Habits(
            poll_s=poll_s,
            heartbeat_s=1800,
            keep_s=75,
            items=0,
            item_every_s=1,
            item_steps=1,
            step_tokens=8,
            vocabulary=VOCABULARY,
        )
        (code,) = stage.invite(1)
        root = stage.keys.root_public
        return Device(node, code=code, root_key=root, line=stage.base.line, habits=habits), node

    async def _of(self, name: str, ask: Callable[[], Awaitable[object]]) -> Cost:
        began, before = time.monotonic(), self._spent()
        for _ in range(self._count):
            await ask()
        spent, seconds = self._spent(), time.monotonic() - began
        ms = {k: (spent[k] - before[k] - self._idle[k] * seconds) * 1000 / self._count for k in _OURS}
        return Cost(name, self._count, ms)

    def _spent(self) -> dict[str, float]:
        parts = self._stage.parts()
        return {name: parts[name].cpu_s if name in parts else 0.0 for name in (*_OURS, "superexec", "trainer")}

    async def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _GREETED_S
        while not condition():
            if time.monotonic() > deadline:
                raise ClawloopError(f"the device was not greeted in {_GREETED_S:.0f} s")
            await asyncio.sleep(0.1)
