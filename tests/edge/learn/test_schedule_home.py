"""When a device learns: what is waited for, what interrupts it, and that it goes on where it was."""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from clawloop_edge.learn import choosing, power
from clawloop_edge.learn.job import MASKED
from clawloop_edge.learn.power import Power
from clawloop_edge.learn.runs import FOLDER
from clawloop_edge.privacy.counting import EntryState
from clawloop_edge.privacy.limits import Subject
from clawloop_shared.deltas import Method
from clawloop_shared.levels import Level
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Policy

from .learning_device import CANARY, LearningDevice, learn_task

WAIT_S = 20.0


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    found.set_level(Level.PRIVATE_DELTAS)
    yield found
    found.close()


def ledger_states(device: LearningDevice) -> list[str]:
    with device.pool.read() as database:
        return [row[0] for row in database.conn.execute("SELECT state FROM ledger ORDER BY seq")]


def call(device: LearningDevice) -> None:
    device.idle_s = 1.0


def pull_the_plug(device: LearningDevice) -> None:
    device.power = Power.BATTERY


def fill_the_disk(device: LearningDevice) -> None:
    device.free_bytes = 0


def pause(device: LearningDevice) -> None:
    device.consent.pause(device.now_ms + 1000)


@pytest.mark.parametrize(
    ("what", "word"), [(call, "idle"), (pull_the_plug, "power"), (fill_the_disk, "room"), (pause, "paused")]
)
def test_it_waits_and_says_what_for(device: LearningDevice, what: Callable[[LearningDevice], None], word: str) -> None:
    device.keep_many(2)
    assert device.desk.offered(learn_task()).accepted
    what(device)
    (missing,) = device.schedule.tick().missing or [""]
    assert word in missing
    assert device.learner.jobs == []
    assert ledger_states(device) == [], "nothing is counted before it begins"
    device.idle_s, device.power, device.free_bytes = 1e9, Power.MAINS, 1 << 40
    device.consent.resume()
    device.schedule.tick()
    assert len(device.outbox.list()) == 1


def test_it_says_how_many_trajectories_are_missing_and_that_there_is_no_task(device: LearningDevice) -> None:
    assert device.schedule.tick().state == "no task"
    device.desk.offered(learn_task())
    device.keep_many(1)
    status = device.schedule.tick()
    assert status.missing == ["1 of 2 judged trajectories that were not learned from before"]
    assert (status.state, status.trajectories, status.wanted) == ("waiting", 1, 2)
    assert device.desk.learning() == "waiting"


def test_its_owner_may_have_it_learn_at_once_but_not_while_somebody_calls(device: LearningDevice) -> None:
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.idle_s, device.power = 1.0, Power.BATTERY
    device.schedule.tick()
    assert device.learner.jobs == []
    device.runs.ask_now(device.now_ms)
    device.idle_s = 0.0
    device.schedule.tick()
    assert device.learner.jobs == []
    device.idle_s = 1.0
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    assert device.runs.asked_ms() == 0, "it was asked for once"


def test_a_call_interrupts_it_and_it_goes_on_from_where_it_was_with_one_release(device: LearningDevice) -> None:
    device.keep_many(2)
    device.desk.offered(learn_task())

    def wait(update: int) -> None:
        if update == 2 and len(device.learner.jobs) == 1:
            device.idle_s = 0.0

    device.learner.wait = wait
    status = device.schedule.tick()
    assert status.missing == ["it was interrupted, and goes on when nobody calls"]
    assert device.outbox.list() == []
    device.keep_many(5, start=10)
    device.idle_s = 1e9
    device.schedule.tick()
    assert device.learner.resumed == [b"", b"2"]
    first, second = device.learner.jobs
    assert first == second, "what is said meanwhile does not change what it learns from"
    assert len(device.outbox.list()) == 1
    assert ledger_states(device) == [EntryState.RESERVED]
    assert not list((device.pool.folder / FOLDER).glob("*.sealed"))


@pytest.mark.parametrize("word", ["level", "limit", "forget", "adapter", "restart"])
def test_what_happens_between_two_halves_of_a_run_counts(device: LearningDevice, word: str) -> None:
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "idle_s", 0.0) if update == 1 else None
    device.schedule.tick()
    sealed = [path.read_bytes() for path in (device.pool.folder / FOLDER).glob("*.sealed")]
    assert len(sealed) == 2
    assert not any(bytes(CANARY) in each for each in sealed)
    if word == "level":
        device.set_level(Level.METRICS)
    elif word == "limit":
        device.consent.set_limit(Subject.SESSION, "s1", level=Level.METRICS)
    elif word == "forget":
        device.forget("s1")
    elif word == "adapter":
        device.served = Policy("line", 4, "cd" * 32)
    device.idle_s, device.learner.wait = 1e9, lambda _: None
    device.schedule.tick()
    made = len(device.outbox.list())
    assert made == (word == "restart")
    assert ledger_states(device) == [EntryState.RESERVED if made else EntryState.RETURNED]
    assert device.runs.run() is None
    assert device.pool.verify().ok


@pytest.mark.parametrize("word", ["level", "limit", "forget"])
def test_a_level_lowered_while_it_learns_ends_it_without_an_item(device: LearningDevice, word: str) -> None:
    device.keep_many(2)
    device.desk.offered(learn_task())

    def wait(update: int) -> None:
        if update == 2 and word == "level":
            device.set_level(Level.METRICS)
        elif update == 2 and word == "limit":
            device.consent.set_limit(Subject.SESSION, "s1", level=Level.METRICS)
        elif update == 2:
            device.forget("s1")

    device.learner.wait = wait
    device.schedule.tick()
    device.schedule.tick()
    assert [item for item in device.outbox.list() if item.has_bytes] == []
    assert ledger_states(device) == [EntryState.RETURNED]


def test_a_learner_that_fails_is_tried_again_and_then_ends_the_task_and_gives_its_release_back(
    device: LearningDevice,
) -> None:
    device.keep_many(2)
    device.learner.fails = "not enough memory"
    task = device.learn()
    assert device.schedule.status.missing == ["it failed: not enough memory"]
    assert ledger_states(device) == [EntryState.RESERVED]
    device.schedule.tick()
    device.schedule.tick()
    assert ledger_states(device) == [EntryState.RETURNED]
    assert device.runs.history()[-1].reason == "not enough memory"
    reply = device.desk.offered(task)
    assert (reply.accepted, reply.reason) == (False, "it was tried, and nothing could be learned")
    device.learner.fails = ""
    device.learn(learn_task())
    (missing,) = device.schedule.status.missing
    assert missing == "tasks in a row that came to nothing: 1; the next begins 1970-01-01 00:26 UTC"
    device.now_ms += 600_000
    device.schedule.tick()
    assert len(device.outbox.list()) == 1


def test_what_can_never_be_learned_is_tried_once_and_tasks_that_fail_are_begun_less_and_less_often(
    device: LearningDevice,
) -> None:
    device.keep_many(2)
    device.learner.hopeless, waits = "nothing to tell good from bad", list[int]()
    for _ in range(10):
        device.learn(learn_task())
        assert device.runs.run() is None
        before, jobs = device.now_ms, len(device.learner.jobs)
        device.desk.offered(learn_task())
        while device.schedule.tick().missing and len(device.learner.jobs) == jobs:
            device.now_ms += 300_000
        waits.append((device.now_ms - before) // 60_000)
    assert waits[:3] == [10, 20, 40]
    assert waits[-1] == 24 * 60
    assert len(device.learner.jobs) == 11, "each was tried once"
    device.learner.hopeless = ""
    device.runs.ask_now(device.now_ms)
    device.learn(learn_task())
    assert len(device.outbox.list()) == 1, "its owner's word counts for more"


def test_what_a_tasks_masks_left_out_is_learned_from_another_time(device: LearningDevice) -> None:
    device.keep_many(2)
    device.catch_up()
    names = [one.trajectory_id for one in device.chooser.choose(Level.PRIVATE_DELTAS, at_most=9).trajectories]
    device.learner.set_aside = {names[0]: MASKED}
    device.learn()
    assert device.outbox.list() == []
    assert ledger_states(device) == [EntryState.RETURNED]
    outcome = device.runs.history()[-1]
    assert outcome.reason.startswith("learned from 1 trajectories, and [learn] min_trajectories is 2; set aside: ")
    assert MASKED in outcome.reason
    device.catch_up()
    assert device.chooser.ready() == {Level.PRIVATE_DELTAS: 2}, "it is as good as it was"


def test_a_task_is_kept_over_a_restart_and_learned_once(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path)
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    task = learn_task()
    assert device.desk.offered(task).accepted
    device.close()
    device = LearningDevice(tmp_path)
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    again = device.desk.offered(task)
    assert (again.accepted, again.reason) == (True, "it was learned already")
    device.keep_many(2, start=10)
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    device.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another line": ({"line_id": "other"}, "another model line"),
    "another adapter": ({"base_version": 2}, "begins from adapter 2"),
    "other weights": ({"weights_sha256": "cd" * 32}, "other weights"),
    "both factors": ({"method": Method.LORA}, "no sense with method lora"),
    "no clip": ({"clip": 0.0}, "no clip"),
    "a rank that cannot be lowered": ({"rank": 64}, "over this device's 32"),
    "a layer that is not there": ({"target_modules": ("router",)}, "no linear layers"),
    "a loss that makes no sense": ({"loss": LossSettings(kl_beta=-1.0)}, "its loss"),
    "rewards that cannot be told apart": ({"reward_low": 0.5, "reward_high": 0.5}, "reward_low 0.5 is not below"),
    "rewards upside down": ({"reward_low": 0.5, "reward_high": -0.5}, "is not below reward_high"),
    "no number": ({"lr": math.nan}, "lr is nan"),
    "updates of one trajectory": ({"batch_trajectories": 1}, "batch_trajectories 1 is below this device's 2"),
    "a secure sum": ({"secure": True}, "no part in secure sums"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_task_that_does_not_fit_is_refused_with_its_reason(device: LearningDevice, case: str) -> None:
    fields, reason = REFUSED[case]
    reply = device.desk.offered(learn_task(**fields))
    assert not reply.accepted
    assert reason in reply.reason
    assert device.runs.task() is None


def test_the_server_is_not_obeyed_beyond_the_devices_own_limits(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path, max_updates=2, max_rank=2)
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    device.learn(learn_task(method=Method.LORA, updates=900, rank=64))
    (job,) = device.learner.jobs
    assert (job.task.updates, job.rank, job.max_updates) == (2, 2, 2)
    device.close()


def test_the_newest_task_is_kept_and_switched_off_is_off(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path, enabled=False)
    device.set_level(Level.DELTAS)
    assert "switched off" in device.desk.offered(learn_task()).reason
    assert device.schedule.tick().missing == ["[learn] enabled is false"]
    device.close()
    device = LearningDevice(tmp_path)
    first, second = learn_task(), learn_task()
    assert device.desk.offered(first).accepted
    assert device.desk.offered(second).accepted
    assert device.runs.task() == second
    device.close()


def test_the_thread_learns_when_it_is_poked_and_ends_soon(device: LearningDevice) -> None:
    began, go = threading.Event(), threading.Event()

    def wait(update: int) -> None:
        began.set()
        assert go.wait(WAIT_S)

    device.learner.wait = wait
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.schedule.start()
    device.schedule.poke()
    assert began.wait(WAIT_S)
    assert device.schedule.status.state == "learning"
    go.set()
    assert device.done.wait(WAIT_S)
    assert device.schedule.stop()
    assert len(device.outbox.list()) == 1


def test_power_is_told_as_far_as_the_system_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Battery:
        power_plugged: bool | None = True

    for plugged, said in ((True, Power.MAINS), (False, Power.BATTERY), (None, Power.UNKNOWN)):
        Battery.power_plugged = plugged
        monkeypatch.setattr(psutil, "sensors_battery", Battery, raising=False)
        assert power.power() is said
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert power.power() is Power.MAINS
    monkeypatch.delattr(psutil, "sensors_battery")
    assert power.power() is Power.UNKNOWN


def test_what_one_server_asked_for_is_not_done_for_another(device: LearningDevice) -> None:
    device.keep_many(2)
    device.runs.belong_to(b"one")
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "idle_s", 0.0) if update == 1 else None
    device.schedule.tick()
    device.runs.belong_to(b"one")
    assert device.runs.run() is not None
    device.runs.belong_to(b"another")
    assert (device.runs.run(), device.runs.task()) == (None, None)
    assert ledger_states(device) == [EntryState.RETURNED]


def test_what_is_learned_from_at_once_is_bounded_but_for_the_least_number(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.keep_many(6)
    device.catch_up()
    monkeypatch.setattr(choosing, "MAX_TOKENS", 30)
    level = Level.PRIVATE_DELTAS
    assert len(device.chooser.choose(level, at_most=9).trajectories) == 3
    assert len(device.chooser.choose(level, at_most=9, at_least=5).trajectories) == 5
    assert len(device.chooser.choose(level, at_most=2, at_least=5).trajectories) == 2
