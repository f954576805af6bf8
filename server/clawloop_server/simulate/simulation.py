"""A simulation from beginning to end: a server is made, devices join, adapters are released, all is counted.

ramp      devices join, evenly spread
quiet     they poll and upload
releases  adapters go out at even distances
drain     no more items are made; all that were are to be acknowledged
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from clawloop_server.fleet.tls import ensure_tls
from clawloop_server.simulate.device import Habits
from clawloop_server.simulate.report import Report, check_deltas, check_items, part_costs, pick_ups, summed
from clawloop_server.simulate.stage import VOCABULARY, Part, Stage
from clawloop_server.simulate.worker import Orders, Result, Tally

_LOOK_S = 1.0
_JOIN_MORE_S = 60.0
_GREETING_S = 0.3
_QUIET_SHARE = 0.4
_LINE_BYTES = 256 << 20


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is simulated. `seconds` are measured, after `ramp_s` in which devices join; each device makes `items`
    items in that time."""

    devices: int
    processes: int = 2
    seconds: float = 180.0
    ramp_s: float = 60.0
    poll_s: float = 15.0
    heartbeat_s: float = 30.0
    keep_s: float = 5.0
    upload_every_s: float = 15.0
    releases: int = 1
    items: int = 2
    item_steps: int = 4
    step_tokens: int = 400
    adapter_bytes: int = 64 << 10
    deltas: float = 0.0
    """the share of the devices that is at level `deltas` and says that it learns; adapters are then real ones"""
    settings: dict[str, dict[str, object]] = {}
    """more for the server's config.toml, such as {"fleet": {...}}"""


def simulate(plan: Plan, *, folder: Path | None, say: Callable[[str], None]) -> Report:
    """Run it in `folder`, which stays, or in one that is removed.

    Raises:
        HomeError: the folder is not one of a simulation.
        FleetError: the server does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="clawloop-simulation-") as scratch:
        fleet = {"upload_every_s": plan.upload_every_s, **plan.settings.get("fleet", {})}
        with Stage.make(folder or Path(scratch), settings={**plan.settings, "fleet": fleet}) as stage:
            say("starting the server")
            stage.start()
            return asyncio.run(_Simulation(plan, stage, say).run())


class _Crowd:
    """The processes of the devices."""

    def __init__(self) -> None:
        self._processes: list[asyncio.subprocess.Process] = []
        self._tallies: dict[int, Tally] = {}
        self._results: list[asyncio.Task[Result]] = []

    async def start(self, orders: list[Orders]) -> None:
        """One process for each."""
        for number, each in enumerate(orders):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "clawloop_server.simulate.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES,
            )
            self._processes.append(process)
            self._results.append(asyncio.create_task(self._hear(number, process)))
            self._tell(process, msgspec.json.encode(each))

    def tell(self, command: bytes) -> None:
        """Give all the same command."""
        for process in self._processes:
            self._tell(process, command)

    def count(self, name: str) -> int:
        """One number of the tallies, summed."""
        return sum(getattr(tally, name) for tally in self._tallies.values())

    def at_version(self, version: int) -> int:
        """How many devices have that adapter or a later one."""
        versions: Counter[int] = Counter()
        for tally in self._tallies.values():
            versions.update(tally.versions)
        return sum(count for found, count in versions.items() if found >= version)

    async def results(self) -> list[Result]:
        """What came of it; all end."""
        self.tell(b"stop")
        return list(await asyncio.gather(*self._results))

    async def kill(self) -> None:
        """End those that are left."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        await asyncio.gather(*self._results, return_exceptions=True)

    async def _hear(self, number: int, process: asyncio.subprocess.Process) -> Result:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            told = msgspec.json.decode(line, type=Tally | Result)
            if isinstance(told, Result):
                return told
            self._tallies[number] = told
        raise RuntimeError(f"process {number} of the devices ended with {await process.wait()}, without a result")

    def _tell(self, process: asyncio.subprocess.Process, line: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(line + b"\n")


class _Simulation:
    def __init__(self, plan: Plan, stage: Stage, say: Callable[[str], None]) -> None:
        self._plan, self._stage, self._say = plan, stage, say
        self._crowd = _Crowd()
        self._most_mib: dict[str, float] = {}

    async def run(self) -> Report:
        plan, stage, crowd = self._plan, self._stage, self._crowd
        watching = asyncio.create_task(self._watch())
        try:
            began = time.monotonic()
            await crowd.start(self._orders())
            longest_s = plan.ramp_s + _JOIN_MORE_S + 2 * plan.poll_s + plan.devices * _GREETING_S
            await self._until(lambda: crowd.count("greeted") == plan.devices, longest_s)
            ramp_s = time.monotonic() - began
            self._say(f"{crowd.count('greeted')} of {plan.devices} devices were greeted after {ramp_s:.0f} s")
            async with self._measured() as measured:
                released = await self._release(measured)
            self._say("waiting until every item is acknowledged")
            crowd.tell(b"rest")
            await self._until(lambda: crowd.count("drained") == plan.devices, self._drain_s())
            connections = await asyncio.to_thread(stage.connections)
            results = await crowd.results()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await crowd.kill()
        return self._report(results, measured, released=released, ramp_s=ramp_s, connections=connections)

    def _orders(self) -> list[Orders]:
        plan, stage = self._plan, self._stage
        codes = stage.invite(plan.devices)
        habits = Habits(
            poll_s=plan.poll_s,
            heartbeat_s=plan.heartbeat_s,
            keep_s=plan.keep_s,
            items=plan.items,
            item_every_s=(plan.ramp_s + plan.seconds) / max(1, plan.items),
            item_steps=plan.item_steps,
            step_tokens=plan.step_tokens,
            vocabulary=VOCABULARY,
        )
        assert stage.running is not None
        return [
            Orders(
                url=stage.running.url,
                ca_pem=ensure_tls(stage.home.keys, []).ca.read_text(),
                root_key=stage.keys.root_public,
                codes=codes[number :: plan.processes],
                line=stage.base.line,
                habits=habits,
                ramp_s=plan.ramp_s,
                shape=stage.base.shape,
                deltas=plan.deltas,
            )
            for number in range(plan.processes)
        ]

    @contextlib.asynccontextmanager
    async def _measured(self) -> AsyncIterator[_Measured]:
        measured = _Measured(await asyncio.to_thread(self._stage.parts), self._crowd.count("polls"))
        measured.calls = self._crowd.count("calls")
        yield measured
        measured.end(await asyncio.to_thread(self._stage.parts))
        measured.polls = self._crowd.count("polls") - measured.polls
        measured.calls = self._crowd.count("calls") - measured.calls

    async def _release(self, measured: _Measured) -> dict[int, int]:
        """Release at even distances after the quiet time; when each version was released."""
        plan, released = self._plan, dict[int, int]()
        quiet_s = plan.seconds * (_QUIET_SHARE if plan.releases else 1.0)
        await asyncio.sleep(quiet_s)
        measured.quiet(await asyncio.to_thread(self._stage.parts))
        for _ in range(plan.releases):
            version = await asyncio.to_thread(self._stage.put_candidate, plan.adapter_bytes, real=plan.deltas > 0)
            began = time.monotonic()
            await self._until(lambda version=version: self._stage.released_ms(version) > 0, 60.0)  # type: ignore[misc]
            released[version] = self._stage.released_ms(version)
            await asyncio.sleep(max(0.0, (plan.seconds - quiet_s) / plan.releases - (time.monotonic() - began)))
            self._say(f"adapter {version} is on {self._crowd.at_version(version)} of {plan.devices} devices")
        return released

    def _drain_s(self) -> float:
        """Two uploads of each device, at the pace that the server allows itself."""
        return 60.0 + 4 * (self._plan.poll_s + self._plan.upload_every_s) + self._plan.devices * 0.3

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  it is other processes' doing
            await asyncio.sleep(0.2)

    async def _watch(self) -> None:
        while True:
            for name, part in (await asyncio.to_thread(self._stage.parts)).items():
                self._most_mib[name] = max(self._most_mib.get(name, 0.0), part.rss_mib)
            await asyncio.sleep(_LOOK_S)

    def _report(
        self, results: list[Result], measured: _Measured, *, released: dict[int, int], ramp_s: float, connections: int
    ) -> Report:
        plan, stage = self._plan, self._stage
        accounts = [account for result in results for account in result.accounts]
        costs = part_costs(
            measured.begin,
            measured.at_quiet,
            measured.at_end,
            most_mib=self._most_mib,
            devices=plan.devices,
            quiet_s=measured.quiet_s,
            seconds=measured.seconds,
        )
        return Report(
            devices=plan.devices,
            processes=plan.processes,
            poll_s=plan.poll_s,
            heartbeat_s=plan.heartbeat_s,
            upload_every_s=plan.upload_every_s,
            seconds=measured.seconds,
            ramp_s=ramp_s,
            active=sum(account.active for account in accounts),
            connections=connections,
            polls_per_s=measured.polls / measured.seconds,
            calls_per_s=measured.calls / measured.seconds,
            calls=summed(account.calls for account in accounts),
            errors=summed(account.errors for account in accounts),
            refused=sorted({reason for account in accounts for reason in account.refused}),
            faults=[fault for result in results for fault in result.faults],
            parts=costs,
            server_cpu_s_per_device_hour=sum(cost.cpu_s_per_device_hour for cost in costs),
            quiet_cpu_s_per_device_hour=sum(cost.quiet_cpu_s_per_device_hour for cost in costs),
            simulator_cores=sum(result.cpu_s for result in results) / (ramp_s + measured.seconds),
            pick_ups=pick_ups(accounts, released, poll_s=plan.poll_s),
            items=check_items(stage.vault, stage.keys.master, accounts, steps=plan.item_steps),
            deltas=check_deltas(stage.vault, stage.keys.master, accounts),
            load_average=os.getloadavg()[0],
        )


class _Measured:
    """What was read at the beginning, at the end of the quiet time, and at the end."""

    def __init__(self, parts: dict[str, Part], polls: int) -> None:
        self.begin, self._began = parts, time.monotonic()
        self.at_quiet: dict[str, Part] = {}
        self.at_end: dict[str, Part] = {}
        self.polls, self.calls = polls, 0
        self.quiet_s = self.seconds = 0.0

    def quiet(self, parts: dict[str, Part]) -> None:
        """The quiet time is over."""
        self.at_quiet, self.quiet_s = parts, time.monotonic() - self._began

    def end(self, parts: dict[str, Part]) -> None:
        """All of it is over."""
        self.at_end, self.seconds = parts, time.monotonic() - self._began
