"""Four devices, a level each, one server: what leaves each is what its level allows, read off the wire, and all end on
one adapter that is better than what they began with, though one is killed and one is asleep on the way.

The tests go on where the one before ended. Real edges, learning processes, SuperLink, trainer and gate.
"""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from clawloop_shared import wire
from clawloop_shared.deltas import DELTA_KIND, LearnReply, LoraDelta, Method
from clawloop_shared.errors import WireError
from clawloop_shared.levels import Level
from clawloop_shared.messages import AdapterReply, SecureReply, StatusReply, UploadItem, UploadReply, read_invitation
from clawloop_shared.records import StepBatch
from demoworld import world
from demoworld.stage import BIN, Part, free_ports, make_edge, make_server
from demoworld.user import Office

from .wiretap import Tap, tls_files

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
EDGE: Mapping[str, Mapping[str, object]] = {
    "privacy": {"hold_s": 0.0, "fill_every_s": 0.1, "epsilon": 100.0},
    "node": {"poll_s": 0.2},
    "learn": {"idle_s": 0.0, "check_every_s": 0.2, "min_trajectories": 16, "on_power": False},
}
EPISODES = 32
"""judged on each device before a round"""
ROUNDS = 6
"""at most, until the held-out reward has grown by `GAIN`"""
GAIN = 0.1
LEVELS = (Level.FULL, Level.REDACTED, Level.DELTAS, Level.PRIVATE_DELTAS)
STEPS = frozenset({Level.FULL, Level.REDACTED})
ANSWERS = (UploadReply, StatusReply, AdapterReply, LearnReply, SecureReply)


def server_settings(tasks: Path) -> Mapping[str, Mapping[str, object]]:
    return {
        "fleet": {"upload_every_s": 0.2},
        "reward": {"settle_s": 0.5},
        "gate": {"tasks": str(tasks), "max_format_drop": 0.15},
        "train": {"lr": 3e-3, "batch_trajectories": 16, "updates_per_round": 2, "loss": {"kl_beta": 0.05}},
        "federate": {
            "lr": 3e-3,
            "updates": 3,
            "batch_trajectories": 16,
            "buffer": 2,
            "max_wait_s": 600.0,
            "min_devices": 2,
            "clip": 0.05,
        },
    }


@dataclass(frozen=True)
class Device:
    """An edge at its level, and the tap on its line."""

    level: Level
    edge: Part
    tap: Tap

    @property
    def version(self) -> int:
        found: int = self.edge.get("/v1/status")["adapter_version"]
        return found


@dataclass(frozen=True)
class Stage:
    """All that runs."""

    server: Part
    devices: list[Device]

    def at(self, level: Level) -> Device:
        return next(device for device in self.devices if device.level is level)

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.get("/v1/status")
        return found

    @property
    def released(self) -> int:
        adapter = self.status["adapter"]
        return adapter["version"] if adapter else 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("levels")
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(task) + "\n" for task in world.gate_tasks()))
    server = make_server(folder, MODEL, settings=server_settings(tasks))
    parts, devices = [server], list[Device]()
    with ExitStack() as taps:
        try:
            server.start()
            for level in LEVELS:
                edge = make_edge(folder, MODEL, name=level, settings=EDGE)
                parts.append(edge)
                invitation = server.run("invite", "--json", expect_json=True)["invitation"]
                public = urlsplit(read_invitation(invitation).url).port
                assert public is not None
                (port,) = free_ports(1)
                tap = taps.enter_context(Tap(tls_files(server.home), port=port, server_port=public))
                edge.start()
                edge.run("join", tap.invitation(invitation), "--yes")
                edge.run("privacy", "set", level, "--yes")
                devices.append(Device(level, edge, tap))
            yield Stage(server, devices)
        finally:
            for part in reversed(parts):
                part.stop()


def until(condition: Callable[[], object], *, what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.5)


def play(devices: list[Device], episodes: int = EPISODES) -> None:
    """So many judged episodes on each, all at the same time."""

    async def at(device: Device) -> None:
        stop = asyncio.Event()
        edge = device.edge
        office = Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=time.monotonic_ns() % 100_000)
        async with office, asyncio.TaskGroup() as group:
            group.create_task(office.work(stop, concurrency=8))
            await office.played(episodes)
            stop.set()
        assert office.tally.failed == 0

    async def everywhere() -> None:
        async with asyncio.TaskGroup() as group:
            for device in devices:
                group.create_task(at(device))

    asyncio.run(everywhere())


def held_out(device: Device) -> float:
    async def measured() -> float:
        edge = device.edge
        async with Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=7) as office:
            return (await office.evaluate(per_pair=4)).reward

    return asyncio.run(measured())


def uploaded(device: Device) -> dict[str, UploadItem]:
    """The items that the device sent whole, as they were read off the wire. Anything else that left is an error."""
    found: dict[str, UploadItem] = {}
    for payload in device.tap.payloads():
        answer = _answer_in(payload)
        if isinstance(answer, UploadReply):
            found |= {item.item_id: item for item in answer.items}
    return found


def _answer_in(payload: bytes) -> object:
    for kind in ANSWERS:
        try:
            return wire.decode(payload, kind)
        except WireError:
            continue
    raise AssertionError(f"{len(payload)} bytes left that are no answer of ours")


def deltas_of(device: Device) -> list[LoraDelta]:
    items = uploaded(device).values()
    return [wire.decode(item.body, LoraDelta) for item in items if item.kind == DELTA_KIND]


def received(device: Device) -> list[str]:
    """The deltas that the server has of the device, as its owner sees it."""
    items = device.edge.run("outbox", "list", "--json", expect_json=True)
    return [item["item_id"] for item in items if item["kind"] == DELTA_KIND and item["state"] == "received"]


def settled(stage: Stage) -> None:
    """Everybody has what the server released, which has nothing more to do."""
    until(lambda: stage.released >= 1, what="an adapter")
    until(
        lambda: not stage.status["rounds"]["running"] and {d.version for d in stage.devices} == {stage.released},
        what="all on the released adapter",
    )


def test_each_lets_out_what_its_level_allows_and_all_learn_from_all(stage: Stage) -> None:
    play(stage.devices)
    for level in (Level.DELTAS, Level.PRIVATE_DELTAS):
        until(lambda: received(stage.at(level)), what=f"a delta of {level}")  # noqa: B023 it is asked at once
    settled(stage)
    for device in stage.devices:
        items = uploaded(device)
        assert items, device.level
        kinds = {type(_record_in(item)) for item in items.values()}
        assert kinds == ({StepBatch} if device.level in STEPS else {LoraDelta}), device.level
        for item in list(items.values())[:8]:
            assert item.body == preview(device.edge, item.item_id), "what left is what the outbox shows"
        device.edge.run("audit", "verify")
    plain, noised = deltas_of(stage.at(Level.DELTAS)), deltas_of(stage.at(Level.PRIVATE_DELTAS))
    assert {(d.level, d.method, d.sigma) for d in plain} == {(Level.DELTAS, Method.LORA, 0.0)}
    assert {(d.level, d.method) for d in noised} == {(Level.PRIVATE_DELTAS, Method.FFA)}
    assert all(d.sigma > 0 and d.clip > 0 and d.reward is None for d in noised)
    redacted = [step for item in uploaded(stage.at(Level.REDACTED)).values() for step in _steps_in(item)]
    assert redacted
    assert {step.session_id.split("-")[0] for step in redacted} == {"session"}, "names of sessions are pseudonyms"


def test_one_is_killed_and_one_sleeps_through_a_round_and_both_catch_up(stage: Stage) -> None:
    asleep, killed = stage.at(Level.REDACTED), stage.at(Level.DELTAS)
    before = stage.released
    asleep.edge.stop()
    awake = [device for device in stage.devices if device is not asleep]
    play(awake)
    killed.edge.kill()
    killed.edge.start()
    until(lambda: stage.released > before, what="an adapter without the one that sleeps")
    asleep.edge.start()
    settled(stage)
    assert killed.version == asleep.version == stage.released
    for device in (asleep, killed):
        assert device.edge.run("pool", "verify", "--json", expect_json=True)["problems"] == []
        device.edge.run("audit", "verify")


def test_all_end_on_the_same_adapter_which_is_better(stage: Stage) -> None:
    device = stage.at(Level.PRIVATE_DELTAS)
    device.edge.run("adapters", "use", "0")
    until(lambda: device.version == 0, what="the model without an adapter")
    first = held_out(device)
    device.edge.run("adapters", "use", str(stage.released))
    settled(stage)
    reward = held_out(device)
    for _ in range(ROUNDS):
        if reward >= first + GAIN:
            break
        before = stage.released
        play(stage.devices)
        until(lambda: stage.released > before, what="another adapter")  # noqa: B023 it is asked at once
        settled(stage)
        reward = held_out(device)
    assert reward >= first + GAIN
    assert len({_current(d) for d in stage.devices}) == 1

    states = stage.status["deltas"]["states"]
    assert states.get("joined", 0) >= 1, states
    told = set[str]()
    for found in stage.server.run("rounds", "list", "--json", expect_json=True):
        explained = stage.server.run("rounds", "explain", found["round_id"], "--json", expect_json=True)
        told |= {delta["device_id"] for delta in explained["deltas"]}
        if len(told) == 2:
            break
    assert len(told) == 2, "both devices that learn at home were heard"


def _record_in(item: UploadItem) -> object:
    return wire.decode(item.body, LoraDelta if item.kind == DELTA_KIND else StepBatch)


def _steps_in(item: UploadItem) -> list[Any]:
    return list(wire.decode(item.body, StepBatch).steps)


def _current(device: Device) -> tuple[int, str]:
    """The version that it uses, and the round that made it."""
    listed = device.edge.run("adapters", "list", "--json", expect_json=True)
    return next((one["version"], one["round_id"]) for one in listed if one["current"])


def preview(edge: Part, item_id: str) -> bytes:
    command = [str(BIN / edge.command), "outbox", "show", item_id, "--raw"]
    return subprocess.run(command, env=edge._environment(), check=True, capture_output=True, timeout=60).stdout
