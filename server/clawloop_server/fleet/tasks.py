"""What each device is asked to learn at home, and which device answered what.

A task belongs to the released adapter and to the number of rounds of its cohort that took deltas: a new one of either
makes a new task, so that a device learns again after a round that was refused. While devices wait for a secure sum of a
task, others are asked for the same one: those of two tasks make no sum together. Answers are kept in memory alone:
after a restart a device is asked once more, and says the same. Knows no Flower and no socket; what a device does with
a task is its own affair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from clawloop_server.aggregate.seeds import task_seed
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.hub.devices import Device, Devices, DeviceState
from clawloop_server.release.records import AdapterRecord
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.vault.deltas import Deltas
from clawloop_shared.deltas import LearnReply, LearnTask, Method
from clawloop_shared.levels import Level
from clawloop_shared.lora import WEIGHTS_FILE

_log = logging.getLogger(__name__)

REFUSED_AGAIN_S = 3600.0
"""after a device refused a task, how long until it is asked the same again"""
ACCEPTED_AGAIN_S = 6 * 3600.0
"""after it took one and nothing came of it: it may have been switched off, or have lost what it had"""
_REFRESH_S = 1.0
"""how old what is known of adapters and rounds may be: every device is asked about again and again"""
_MAX_KEPT = 64
LOOK_AGAIN_S = 5.0
"""and how old may be that a device is to be asked nothing"""


class Beside(NamedTuple):
    """What all tasks of a cohort are about at one moment: its released adapter (None: the line as it is), and how many
    rounds of the cohort took deltas and ended."""

    adapter: AdapterRecord | None
    ended: int
    cohort: str = ""

    @property
    def version(self) -> int:
        """Of the adapter; 0 without one."""
        return self.adapter.version if self.adapter else 0


class _Answer(NamedTuple):
    task_id: str
    accepted: bool
    at_s: float


class _Quiet(NamedTuple):
    """Until when a device is to be asked nothing, unless there is other work."""

    cohort: str
    stem: str
    until_s: float


class HubTasks:
    """The `Tasks` of a real hub."""

    def __init__(
        self,
        *,
        registry: Registry,
        devices: Devices,
        deltas: Deltas,
        base: Base,
        federate: FederateSettings,
        train: TrainSettings,
        took: Callable[[str, LearnTask], None] = lambda device_id, task: None,
        gathering: Callable[[LearnTask, str], str] = lambda task, cohort: task.task_id,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`took`: hears which device will learn what; `gathering`: the id under which devices of a cohort wait for a
        sum of such a task already, else its own."""
        self._took, self._gathering = took, gathering
        self._kept: dict[str, tuple[float, str]] = {}
        self._registry, self._devices, self._deltas, self._base = registry, devices, deltas, base
        self._federate, self._train, self._clock = federate, train, clock
        self._answers: dict[str, _Answer] = {}
        self._asked: dict[str, LearnTask] = {}
        self._quiet: dict[str, _Quiet] = {}
        self._beside: dict[str, tuple[float, Beside]] = {}
        self._lock = threading.Lock()

    def due(self, device_id: str, *, adapter_version: int) -> LearnTask | None:
        """What that device should be asked to learn now; None: nothing, it has answered, or what it learned waits."""
        if not self._federate.learn_at_home:
            return None
        if self._is_quiet(device_id):
            return None
        device = self._devices.get(device_id)
        beside = self._now(device.cohort)
        if adapter_version != beside.version:
            return None
        task = self._task(device, beside)
        if task is None:
            self._quiet[device_id] = _Quiet(device.cohort, _stem(beside), self._clock() + LOOK_AGAIN_S)
            return None
        self._asked[device_id] = task
        return task

    def _is_quiet(self, device_id: str) -> bool:
        quiet = self._quiet.get(device_id)
        if quiet is None or self._clock() >= quiet.until_s:
            return False
        return quiet.stem == _stem(self._now(quiet.cohort))

    def _task(self, device: Device, beside: Beside) -> LearnTask | None:
        if not learns(device, line_id=self._base.line_id):
            return None
        task = task_for(Level(device.level), beside, base=self._base, federate=self._federate, train=self._train)
        if task.secure:
            task = msgspec.structs.replace(task, task_id=self._id_of(task, device.cohort))
        return None if self._has_answered(device, task) or self._has_sent(device, beside) else task

    def _id_of(self, task: LearnTask, cohort: str) -> str:
        with self._lock:
            at_s, found = self._kept.get(task.task_id, (float("-inf"), ""))
            if self._clock() - at_s >= _REFRESH_S:
                found = self._gathering(task, cohort)
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                self._kept[task.task_id] = self._clock(), found
            return found

    def answered(self, device_id: str, reply: LearnReply) -> None:
        """Keep whether it will. An answer to what it was not asked is passed over."""
        task = self._asked.get(device_id)
        if task is None or task.task_id != reply.task_id:
            return
        if reply.accepted:
            self._took(device_id, task)
        self._answers[device_id] = _Answer(reply.task_id, reply.accepted, self._clock())
        if reply.accepted:
            _log.info("device %s learns %s at home", device_id, reply.task_id)
        else:
            _log.info("device %s does not learn %s: %.300r", device_id, reply.task_id, reply.reason)

    def _now(self, cohort: str) -> Beside:
        with self._lock:
            found = self._beside.get(cohort)
            if found is None or self._clock() - found[0] >= _REFRESH_S:
                ended = self._registry.count_with_deltas(self._base.line_id, cohort=cohort)
                adapter = self._registry.current(self._base.line_id, cohort=cohort)
                found = self._beside[cohort] = self._clock(), Beside(adapter, ended, cohort)
            return found[1]

    def _has_answered(self, device: Device, task: LearnTask) -> bool:
        """Whether it would only say again what it said. One that sends its trajectories and refused a task most often
        has no session that it lets out as deltas alone, and would refuse the next one too."""
        answer = self._answers.get(device.device_id)
        if answer is None:
            return False
        refuses_all = not answer.accepted and Level(device.level).rank > Level.DELTAS.rank
        if answer.task_id != task.task_id and not refuses_all:
            return False
        again_s = ACCEPTED_AGAIN_S if answer.accepted else REFUSED_AGAIN_S
        return self._clock() - answer.at_s < again_s

    def _has_sent(self, device: Device, beside: Beside) -> bool:
        """Whether what it learned beside this adapter waits: until a round took it, more of the same is of no use."""
        waiting = self._deltas.waiting_of(device.device_id)
        return waiting is not None and waiting.base_version == beside.version


def learns(device: Device, *, line_id: str) -> bool:
    """Whether that device may be asked: it is in, of this line, and lets deltas out. One that lets out more may have
    sessions that it lets out as deltas alone; it refuses if it has none."""
    joined = device.state is DeviceState.JOINED and device.line_id == line_id
    return joined and device.level in set(Level) and Level(device.level).rank >= Level.PRIVATE_DELTAS.rank


def method_for(level: Level, beside: Beside, settings: FederateSettings) -> Method:
    """Which factors a device of that level learns. Noise on both factors would not be noise on their product."""
    if settings.method == "rolora":
        return Method.ROLORA_A if beside.version % 2 else Method.ROLORA_B
    if settings.method == "ffa" or level is Level.PRIVATE_DELTAS:
        return Method.FFA
    return Method.LORA


def task_for(
    level: Level, beside: Beside, *, base: Base, federate: FederateSettings, train: TrainSettings
) -> LearnTask:
    """The task of a device of that level."""
    private, adapter = level is Level.PRIVATE_DELTAS, beside.adapter
    method = method_for(level, beside, federate)
    facts = adapter.facts if adapter else None
    of_adapter = facts if method in (Method.ROLORA_A, Method.ROLORA_B) else None  # whose other factor is taken
    targets = of_adapter.target_modules if of_adapter else base.shape.targets(train.target_modules)
    hashes = {entry.name: entry.sha256 for entry in facts.files} if facts else {}
    return LearnTask(
        task_id=f"{_stem(beside)}{method}{'.private' if private else ''}",
        line_id=base.line_id,
        base_version=beside.version,
        weights_sha256=hashes.get(WEIGHTS_FILE, ""),
        method=method,
        rank=of_adapter.rank if of_adapter else federate.rank,
        alpha=of_adapter.alpha if of_adapter else federate.alpha,
        target_modules=tuple(targets),
        seed=task_seed(base.line_id, beside.version),
        lr=federate.lr or train.lr,
        updates=federate.updates,
        batch_trajectories=federate.batch_trajectories,
        loss=train.loss,
        reward_low=train.reward_low,
        reward_high=train.reward_high,
        clip=federate.clip if private else 0.0,
        sigma=federate.sigma if private else 0.0,
        secure=private and federate.secure,
    )


def _stem(beside: Beside) -> str:
    """What the names of all tasks of a cohort at one moment begin with; those of two cohorts make no sum together."""
    cohort = f"{beside.cohort}." if beside.cohort else ""
    return f"v{beside.version}.r{beside.ended}.{cohort}"
