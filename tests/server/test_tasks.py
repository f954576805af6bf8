"""Who is asked to learn what at home, and when again."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from clawloop_server.aggregate.secure_store import SecureSums
from clawloop_server.aggregate.seeds import task_seed
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.fleet.tasks import ACCEPTED_AGAIN_S, LOOK_AGAIN_S, REFUSED_AGAIN_S, HubTasks
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.release.records import Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.release.release import release_candidate
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask, Method
from clawloop_shared.levels import Level
from clawloop_shared.lora import CONFIG_FILE, LINEARS, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, Probe
from clawloop_shared.objective import LossSettings

from .made_deltas import make_delta, send_delta

AddDevice = Callable[..., str]
TRAIN = TrainSettings(lr=0.002, loss=LossSettings(kl_beta=0.25), reward_low=0.0)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(vault: Vault, home: Home) -> Registry:
    return Registry(vault.database, home.adapters)


@pytest.fixture
def open_tasks(vault: Vault, registry: Registry, base: Base, clock: Clock) -> Callable[..., HubTasks]:
    """The hub's tasks with these `[federate]` settings."""

    def make(
        took: Any = lambda device, task: None,
        gathering: Any = lambda task, cohort: task.task_id,
        **settings: Any,
    ) -> HubTasks:
        return HubTasks(
            registry=registry,
            devices=Devices(vault.database),
            deltas=vault.deltas,
            base=base,
            federate=FederateSettings(**settings),
            train=TRAIN,
            took=took,
            gathering=gathering,
            clock=clock,
        )

    return make


@pytest.fixture
def at(vault: Vault, add_device: AddDevice) -> Callable[..., str]:
    """A device at a level."""

    def make(level: str) -> str:
        device = add_device()
        Devices(vault.database).mark_seen(device, 0, level=level)
        return device

    return make


@pytest.fixture
def release(registry: Registry, keys: ServerKeys, base: Base, clock: Clock) -> Callable[..., int]:
    """Make and release an adapter; its version."""

    def make(cohort: str = "") -> int:
        round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1)
        candidate = Candidate(
            round_id=round_id,
            line=base.line,
            files={CONFIG_FILE: b"{}", WEIGHTS_FILE: f"weights of {round_id}".encode()},
            rank=4,
            alpha=12.0,
            target_modules=["q_proj", "v_proj"],
            probe=Probe(ids=[1], logprobs=[]),
            evaluation=Evaluation(suite="", episodes=0, reward=0.0, reward_before=0.0, standard_error=0.0),
            lineage_root="",
            cohort=cohort,
        )
        version = registry.record_candidate(candidate)
        registry.finish_round(round_id, RoundState.PASSED, version=version)
        release_candidate(registry, keys, version=version)
        clock.now_s += 2
        return version

    return make


def asked(tasks: HubTasks, device: str, *, version: int = 0) -> LearnTask:
    task = tasks.due(device, adapter_version=version)
    assert task is not None
    assert wire.decode(wire.encode(task), LearnTask) == task, "what a device would take"
    return task


def test_devices_that_let_deltas_out_are_asked_and_no_others(
    open_tasks: Callable[..., HubTasks], at: Any, vault: Vault, add_device: AddDevice
) -> None:
    tasks = open_tasks()
    for level in ("", "off", "metrics"):
        assert tasks.due(at(level) if level else add_device(), adapter_version=0) is None
    found = {level: at(level) for level in ("private-deltas", "deltas", "redacted", "full")}
    assert all(tasks.due(device, adapter_version=0) for device in found.values())
    assert open_tasks(learn_at_home=False).due(found["deltas"], adapter_version=0) is None
    Devices(vault.database).revoke(found["full"])
    assert tasks.due(found["full"], adapter_version=0) is None


def test_a_task_says_what_the_settings_say(open_tasks: Callable[..., HubTasks], at: Any, base: Base) -> None:
    task = asked(open_tasks(rank=3, alpha=5.0, updates=2, batch_trajectories=7, sigma=2.0, secure=False), at("deltas"))
    assert (task.method, task.rank, task.alpha, task.updates, task.batch_trajectories) == (Method.LORA, 3, 5.0, 2, 7)
    assert (task.line_id, task.base_version, task.weights_sha256) == (base.line_id, 0, "")
    assert (task.lr, task.loss, task.reward_low, task.reward_high) == (TRAIN.lr, TRAIN.loss, 0.0, 1.0)
    assert task.target_modules == LINEARS
    assert task.seed == task_seed(base.line_id, 0)
    assert (task.clip, task.sigma, task.secure) == (0.0, 0.0, False), "noise is for private levels"
    assert asked(open_tasks(lr=0.01), at("deltas")).lr == 0.01


def test_private_devices_never_learn_both_factors(open_tasks: Callable[..., HubTasks], at: Any) -> None:
    private, open_ = at("private-deltas"), at("deltas")
    task = asked(open_tasks(clip=2.0, sigma=0.5), private)
    assert (task.method, task.clip, task.sigma, task.secure) == (Method.FFA, 2.0, 0.5, False)
    secure = open_tasks(method="ffa", secure=True)
    assert (asked(secure, private).secure, asked(secure, open_).secure) == (True, False)
    assert asked(secure, open_).method is Method.FFA
    assert asked(secure, open_).seed == asked(secure, private).seed, "their sum needs one A"


def test_phases_alternate_with_the_adapter_that_they_stand_on(
    open_tasks: Callable[..., HubTasks], at: Any, registry: Registry, release: Callable[..., int]
) -> None:
    tasks, device = open_tasks(method="rolora", rank=8), at("private-deltas")
    first = asked(tasks, device)
    assert (first.method, first.rank, first.target_modules) == (Method.ROLORA_B, 8, LINEARS)
    found = []
    for _ in range(2):
        version = release()
        task = asked(tasks, device, version=version)
        assert (task.rank, task.alpha, task.target_modules) == (4, 12.0, ("q_proj", "v_proj")), "those of the adapter"
        files = {entry.name: entry.sha256 for entry in registry.adapter(version).facts.files}
        assert (task.base_version, task.weights_sha256) == (version, files[WEIGHTS_FILE])
        found.append(task)
    assert [task.method for task in found] == [Method.ROLORA_A, Method.ROLORA_B]
    assert len({task.seed for task in (first, *found)}) == 3


def test_only_who_uses_the_released_adapter_is_asked(
    open_tasks: Callable[..., HubTasks], at: Any, release: Callable[..., int]
) -> None:
    tasks, device = open_tasks(), at("deltas")
    version = release()
    assert tasks.due(device, adapter_version=0) is None
    assert asked(tasks, device, version=version).base_version == version
    assert tasks.due(device, adapter_version=version + 1) is None


def test_a_device_is_asked_once_and_again_after_a_round_that_was_refused(
    open_tasks: Callable[..., HubTasks], at: Any, registry: Registry, vault: Vault, base: Base, clock: Clock
) -> None:
    tasks, device = open_tasks(), at("deltas")
    task = asked(tasks, device)
    assert asked(tasks, device) == task, "as long as it has not answered"
    tasks.answered(device, LearnReply(task_id="another", accepted=True))
    assert asked(tasks, device) == task
    tasks.answered(device, LearnReply(task_id=task.task_id, accepted=True))
    assert tasks.due(device, adapter_version=0) is None

    delta_id = send_delta(vault, device, make_delta(base.shape, base.line_id))
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=0, steps=0)
    clock.now_s += LOOK_AGAIN_S
    assert tasks.due(device, adapter_version=0) is None, "a round that runs changes nothing"
    vault.deltas.refuse(delta_id, "part of a round that was refused", round_id=round_id)
    registry.finish_round(round_id, RoundState.REFUSED, reason="worse")
    clock.now_s += 2
    again = asked(tasks, device)
    assert again.task_id != task.task_id
    assert msgspec.structs.replace(again, task_id=task.task_id) == task

    tasks.answered(device, LearnReply(task_id=again.task_id, accepted=True))
    clock.now_s += ACCEPTED_AGAIN_S - LOOK_AGAIN_S
    assert tasks.due(device, adapter_version=0) is None
    clock.now_s += LOOK_AGAIN_S
    assert asked(tasks, device) == again, "nothing came of it in so long"


def test_who_takes_a_task_is_told_of_once(open_tasks: Callable[..., HubTasks], at: Any) -> None:
    told: list[tuple[str, LearnTask]] = []
    tasks, device, other = open_tasks(lambda *one: told.append(one)), at("deltas"), at("deltas")
    task = asked(tasks, device)
    asked(tasks, other)
    tasks.answered(device, LearnReply(task_id=task.task_id, accepted=True))
    tasks.answered(other, LearnReply(task_id=task.task_id, accepted=False, reason="on battery"))
    tasks.answered("nobody", LearnReply(task_id=task.task_id, accepted=True))
    assert told == [(device, task)]


def test_who_refused_is_asked_again_after_an_hour(open_tasks: Callable[..., HubTasks], at: Any, clock: Clock) -> None:
    tasks, device = open_tasks(), at("redacted")
    task = asked(tasks, device)
    tasks.answered(device, LearnReply(task_id=task.task_id, accepted=False, reason="no session is limited to deltas"))
    clock.now_s += REFUSED_AGAIN_S - LOOK_AGAIN_S
    assert tasks.due(device, adapter_version=0) is None
    clock.now_s += LOOK_AGAIN_S
    assert asked(tasks, device) == task


@pytest.mark.parametrize(("level", "asked_again"), [("deltas", True), ("redacted", False), ("full", False)])
def test_after_a_release_who_sends_trajectories_and_refused_is_left_alone_for_the_hour(
    open_tasks: Callable[..., HubTasks],
    at: Any,
    release: Callable[..., int],
    clock: Clock,
    level: str,
    asked_again: bool,
) -> None:
    tasks, device = open_tasks(), at(level)
    tasks.answered(device, LearnReply(task_id=asked(tasks, device).task_id, accepted=False, reason="nothing to learn"))
    version = release()
    clock.now_s += LOOK_AGAIN_S
    assert (tasks.due(device, adapter_version=version) is not None) == asked_again
    clock.now_s += REFUSED_AGAIN_S
    assert asked(tasks, device, version=version)


def test_what_waits_of_a_device_is_not_learned_again(
    open_tasks: Callable[..., HubTasks], at: Any, vault: Vault, base: Base, clock: Clock
) -> None:
    tasks, device = open_tasks(), at("deltas")
    delta_id = send_delta(vault, device, make_delta(base.shape, base.line_id))
    assert tasks.due(device, adapter_version=0) is None
    vault.deltas.refuse(delta_id, "part of a round that was refused")
    clock.now_s += LOOK_AGAIN_S
    assert asked(tasks, device)


def test_a_change_of_level_makes_another_task(
    open_tasks: Callable[..., HubTasks], at: Any, vault: Vault, clock: Clock
) -> None:
    tasks, device = open_tasks(), at("deltas")
    open_task = asked(tasks, device)
    tasks.answered(device, LearnReply(task_id=open_task.task_id, accepted=True))
    assert tasks.due(device, adapter_version=0) is None
    Devices(vault.database).mark_seen(device, 0, level=Level.PRIVATE_DELTAS)
    clock.now_s += LOOK_AGAIN_S
    private = asked(tasks, device)
    assert private.task_id != open_task.task_id
    assert (private.method, private.clip) == (Method.FFA, 1.0)


def test_a_cohort_learns_beside_its_own_adapter(
    open_tasks: Callable[..., HubTasks], at: Any, vault: Vault, release: Callable[..., int]
) -> None:
    tasks, one, other = open_tasks(), at("deltas"), at("deltas")
    with vault.database.write():
        vault.database.run("UPDATE devices SET cohort = 'c' WHERE device_id = ?", [other])
    shared = release()
    assert asked(tasks, other, version=shared).base_version == shared, "as long as it has none of its own"
    own = release(cohort="c")
    assert tasks.due(other, adapter_version=shared) is None
    assert asked(tasks, other, version=own).base_version == own
    assert asked(tasks, one, version=shared).base_version == shared


@pytest.mark.parametrize("cohort", ["", "other"])
def test_rounds_that_took_no_deltas_and_those_of_other_cohorts_make_no_other_task(
    open_tasks: Callable[..., HubTasks],
    at: Any,
    registry: Registry,
    vault: Vault,
    base: Base,
    clock: Clock,
    cohort: str,
) -> None:
    tasks, device, another = open_tasks(), at("deltas"), at("deltas")
    task = asked(tasks, device)
    for took in (False, True):
        round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1, cohort=cohort)
        if took:
            delta_id = send_delta(vault, another, make_delta(base.shape, base.line_id))
            vault.deltas.refuse(delta_id, "worse", round_id=round_id)
        registry.finish_round(round_id, RoundState.REFUSED, reason="worse")
        clock.now_s += 2
        assert (asked(tasks, device).task_id == task.task_id) is (not took or cohort == "other")


def test_while_a_sum_gathers_a_round_makes_no_other_task_for_those_that_may_join_it(
    open_tasks: Callable[..., HubTasks],
    at: Any,
    registry: Registry,
    vault: Vault,
    keys: ServerKeys,
    base: Base,
    clock: Clock,
) -> None:
    sums = SecureSums(
        vault.database,
        settings=FederateSettings(),
        shape_of=lambda line_id: base.shape,
        keep=SumDeltas(vault.database, DeviceSeals(vault.database, keys.master)),
    )
    settings: dict[str, Any] = {"method": "ffa", "secure": True, "gathering": sums.gathering}
    tasks = open_tasks(sums.expect, **settings)
    one, two, open_ = at("private-deltas"), at("private-deltas"), at("deltas")
    task = asked(tasks, one)
    tasks.answered(one, LearnReply(task_id=task.task_id, accepted=True))
    round_id = registry.start_round(base.line_id, base_version=0, trajectories=1, steps=1)
    delta_id = send_delta(vault, open_, make_delta(base.shape, base.line_id))
    vault.deltas.refuse(delta_id, "worse", round_id=round_id)
    registry.finish_round(round_id, RoundState.REFUSED, reason="worse")
    clock.now_s += LOOK_AGAIN_S
    assert asked(tasks, two) == task
    assert tasks.due(one, adapter_version=0) is None, "it waits for that sum"
    assert asked(open_tasks(rank=3, **settings), two).task_id != task.task_id, "of other settings no sum can be made"
    with vault.database.write() as database:
        sql = "INSERT INTO secure_sums (sum_id, task_id, line_id, status, phase, reason, began_ms)"
        database.run(f"{sql} VALUES ('s', ?, ?, 'done', 'unmask', '', 1)", [task.task_id, base.line_id])
        database.run("INSERT INTO secure_members (sum_id, device_id) VALUES ('s', 'third')")
    clock.now_s += LOOK_AGAIN_S
    again = asked(tasks, one)
    assert again.task_id != task.task_id, "who was in its sum comes into no other one of that task"
