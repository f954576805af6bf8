"""In any order of steps, signals, marks, rounds and time: what is ready is ready exactly when it should be."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.ids import new_id
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Channel, Mark, Policy, Sampling, Signal, Step, StepBatch, Target, Trajectory
from clawloop_shared.signals import reward_of

SETTLE_S, TIMEOUT_S = 10, 100


def item(*records: Step | Signal | Mark) -> UploadItem:
    kinds: dict[type, list[Any]] = {Step: [], Signal: [], Mark: []}
    for record in records:
        kinds[type(record)].append(record)
    body = wire.encode(StepBatch(steps=kinds[Step], signals=kinds[Signal], marks=kinds[Mark]))
    return UploadItem(item_id=new_id(), receipt_id=new_id(), kind="steps", body=body)


@dataclass
class Unit:
    """A trajectory in the model."""

    device: int
    channel: Channel
    name: str
    group: str
    size: int
    steps: dict[str, Step] = field(default_factory=dict)
    consumed: bool = False

    @property
    def place(self) -> tuple[int, Channel, str]:
        return self.device, self.channel, self.group or f"alone {self.name}"


UNITS = {"a": ("known", 2), "b": ("known", 2), "c": ("known", 2), "d": ("open", 0), "e": ("open", 0), "f": ("", 0)}
"""each trajectory's group and its size; `known` gets one more than it is to have"""
DEVICE = st.sampled_from([0, 0, 0, 1])
NAME = st.sampled_from(sorted(UNITS))
SOURCES = ("user", "judge", "tool-outcome", "left-out")


class Machine(RuleBasedStateMachine):
    """The real vault beside a model that remembers all that came and looks through all of it each time."""

    template: Path
    master: bytes
    line: str
    devices: list[str]
    scratch: Iterator[int]

    @initialize()
    def start(self) -> None:
        folder = self.template.with_name(f"run{next(self.scratch)}")
        shutil.copytree(self.template, folder)
        self.settings = RewardSettings(settle_s=SETTLE_S, group_timeout_s=TIMEOUT_S, weights={"left-out": 0.0})
        self.vault = Vault.open(Home(folder), self.master, settings=self.settings)
        self.vault.database.run("PRAGMA synchronous = OFF")
        self.now_ms, self.ids = 1_000_000, count()
        self.units: dict[tuple[int, Channel, str], Unit] = {}
        self.signals: list[tuple[int, Signal]] = []
        self.marks: list[tuple[int, Mark]] = []
        self.sent: list[tuple[int, Step | Signal | Mark]] = []
        self.news_ms: dict[tuple[int, Channel, str], int] = {}
        self.rounds = count()

    def teardown(self) -> None:
        if hasattr(self, "vault"):
            self.vault.close()

    def come(self, device: int, *records: Step | Signal | Mark) -> None:
        """Send records in one item, and let the model know."""
        self.vault.receive(self.devices[device], [item(*records)], now_ms=self.now_ms)
        for record in records:
            if (device, record) not in self.sent:
                self.sent.append((device, record))
                self.learn(device, record)

    def learn(self, device: int, record: Step | Signal | Mark) -> None:
        mine = [unit for unit in self.units.values() if unit.device == device]
        if isinstance(record, Step):
            name = record.trajectory_id.removeprefix("trajectory ")
            new = Unit(device, record.channel, name, record.group_id, record.group_size)
            mine = [self.units.setdefault((device, record.channel, name), new)]
            mine[0].steps[record.step_id] = record
        elif isinstance(record, Signal):
            self.signals.append((device, record))
            mine = [unit for unit in mine if self.judges(record, unit)]
        else:
            self.marks.append((device, record))
            is_latest = self.latest_mark(device, record.step_id) is record
            mine = [unit for unit in mine if is_latest and record.step_id in unit.steps]
        for unit in mine:
            if unit.steps and not unit.consumed:
                self.news_ms[unit.place] = self.now_ms

    def a_step(self, name: str, *, channel: Channel = Channel.TRAIN, number: int = 0) -> Step:
        group, size = UNITS[name]
        return Step(
            step_id=f"{name}{number}{channel}",
            session_id="session",
            run_id=f"run {name}",
            prompt_ids=[1],
            response_ids=[2],
            response_logprobs=[-0.5],
            policy=Policy(self.line),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=number + 1,
            trajectory_id=f"trajectory {name}",
            group_id=group,
            group_size=size,
            channel=channel,
        )

    def a_signal(self, target: Target, name: str, *, source: str, value: float, at: int) -> Signal:
        names = {Target.STEP: f"{name}0train", Target.SESSION: "session"}
        return Signal(
            signal_id=f"signal {next(self.ids)}",
            target=target,
            target_id=names.get(target, f"{target} {name}"),
            source=source,
            value=value,
            weight=0.5,
            created_ms=at,
        )

    @rule(
        device=DEVICE,
        channel=st.sampled_from([Channel.TRAIN, Channel.TRAIN, Channel.VAL]),
        name=NAME,
        number=st.integers(0, 1),
    )
    def step_comes(self, device: int, channel: Channel, name: str, number: int) -> None:
        self.come(device, self.a_step(name, channel=channel, number=number))

    @rule(device=DEVICE, names=st.sets(NAME, min_size=2), silent=NAME, value=st.floats(-1, 1))
    def much_comes(self, device: int, names: set[str], silent: str, value: float) -> None:
        steps = [self.a_step(name) for name in sorted(names)]
        said = [
            self.a_signal(Target.TRAJECTORY, name, source="user", value=value, at=1)
            for name in sorted(names - {silent})
        ]
        self.come(device, *steps, *said)

    @rule(
        device=DEVICE,
        about=st.sampled_from(Target),
        name=NAME,
        source=st.sampled_from(SOURCES),
        value=st.floats(-1, 1),
        at=st.integers(1, 3),
    )
    def signal_comes(self, device: int, about: Target, name: str, source: str, value: float, at: int) -> None:
        self.come(device, self.a_signal(about, name, source=source, value=value, at=at))

    @rule(
        device=DEVICE,
        name=st.sampled_from("aff"),
        number=st.sampled_from([0, 0, 1]),
        trainable=st.sampled_from([False, False, True]),
        at=st.integers(1, 3),
    )
    def mark_comes(self, device: int, name: str, number: int, trainable: bool, at: int) -> None:
        mark_id, step_id = f"mark {next(self.ids):05}", f"{name}{number}train"
        self.come(device, Mark(mark_id=mark_id, step_id=step_id, trainable=trainable, created_ms=at))

    @rule(data=st.data())
    def something_comes_again(self, data: st.DataObject) -> None:
        if self.sent:
            self.come(*data.draw(st.sampled_from(self.sent)))

    @rule(seconds=st.sampled_from([SETTLE_S - 0.001, SETTLE_S, SETTLE_S, TIMEOUT_S - 0.001, TIMEOUT_S]))
    def time_passes(self, seconds: float) -> None:
        self.now_ms += round(seconds * 1000)

    @rule(limit=st.integers(1, 5))
    def a_round_runs(self, limit: int) -> None:
        taken = self.vault.ready(self.line, limit, now_ms=self.now_ms)
        chosen = [self.unit_of(t) for t in taken]
        ready = self.expected(Channel.TRAIN)
        groups = {unit.place for unit in chosen}
        assert bool(chosen) == bool(ready)
        assert sorted(u.name + str(u.device) for u in chosen) == sorted(
            u.name + str(u.device) for u in ready if u.place in groups
        ), "whole groups alone"
        assert len(chosen) <= limit or len(groups) == 1
        round_id = f"round {next(self.rounds)}"
        self.vault.consume(round_id, taken)
        assert self.vault.lineage(round_id) == [t.trajectory_id for t in taken]
        for unit in chosen:
            assert not unit.consumed
            unit.consumed = True

    @invariant()
    def ready_is_what_should_be(self) -> None:
        if not hasattr(self, "vault"):
            return
        for channel in Channel:
            ready = self.expected(channel)
            found = self.vault.ready(self.line, 99, channel, now_ms=self.now_ms)
            assert self.vault.count_ready(self.line, channel, now_ms=self.now_ms) == len(found)
            assert {t.channel for t in found} <= {channel}
            got = {(u.device, u.name): t for t in found for u in [self.unit_of(t)]}
            assert len(got) == len(found)
            assert got.keys() == {(unit.device, unit.name) for unit in ready}
            for unit in ready:
                mine = got[unit.device, unit.name]
                reward = reward_of(self.said_of(unit), self.settings)
                assert reward is not None
                assert (mine.reward, mine.weight) == (reward.value, reward.weight)
                assert {s.step_id for s in mine.steps} == set(self.live(unit))

    # the model

    def judges(self, said: Signal, unit: Unit) -> bool:
        if said.target is Target.STEP:
            return said.target_id in unit.steps
        return said.target_id in ("session", f"run {unit.name}", f"trajectory {unit.name}")

    def said_of(self, unit: Unit) -> list[Signal]:
        return [said for device, said in self.signals if device == unit.device and self.judges(said, unit)]

    def latest_mark(self, device: int, step_id: str) -> Mark | None:
        found = [said for at, said in self.marks if at == device and said.step_id == step_id]
        return max(found, key=lambda said: (said.created_ms, said.mark_id), default=None)

    def live(self, unit: Unit) -> list[str]:
        latest = {step_id: self.latest_mark(unit.device, step_id) for step_id in unit.steps}
        return [step_id for step_id, said in latest.items() if said is None or said.trainable]

    def expected(self, channel: Channel) -> list[Unit]:
        units = [unit for unit in self.units.values() if unit.channel is channel and unit.steps]
        return [unit for unit in units if self.is_judged(unit) and self.goes(unit, units)]

    def is_judged(self, unit: Unit) -> bool:
        heard = any(said.source != "left-out" for said in self.said_of(unit))
        return not unit.consumed and bool(self.live(unit)) and heard

    def goes(self, unit: Unit, units: list[Unit]) -> bool:
        group = [other for other in units if other.place == unit.place]
        quiet_ms = self.now_ms - self.news_ms[unit.place]
        if quiet_ms >= TIMEOUT_S * 1000:
            return True
        awaited = [other for other in group if not other.consumed and self.live(other) and not self.is_judged(other)]
        whole = len(group) - len(awaited) >= unit.size if unit.size else not awaited
        return whole and quiet_ms >= SETTLE_S * 1000

    def unit_of(self, found: Trajectory) -> Unit:
        device = next(n for n in (0, 1) if found.trajectory_id in self.owned(n))
        return self.units[device, found.channel, found.steps[0].trajectory_id.removeprefix("trajectory ")]

    def owned(self, device: int) -> set[str]:
        sql = "SELECT trajectory_id FROM trajectories WHERE device_id = ?"
        return {row[0] for row in self.vault.database.rows(sql, [self.devices[device]])}


def test_in_any_order_of_steps_signals_marks_rounds_and_time_the_right_ones_are_ready_with_the_right_reward(
    vault: Vault, home: Home, keys: ServerKeys, base: Base, add_device: Callable[[], str]
) -> None:
    Machine.devices = [add_device(), add_device()]
    Machine.line, Machine.master, Machine.template = base.line_id, keys.master, home.folder
    Machine.scratch = count()
    strict = Vault.open(home, keys.master, settings=RewardSettings(weights={"left-out": 0.0}))
    strict.obey_settings()
    strict.close()
    vault.close()
    few = settings(max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Machine, settings=few)
