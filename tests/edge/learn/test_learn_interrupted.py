"""Everything that comes before and after learning gives way to a call, and leaves nothing behind."""

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawloop_edge.learn import choosing, desk, runs
from clawloop_edge.learn.going import Quiet
from clawloop_edge.learn.job import Interrupted, Job
from clawloop_edge.learn.release import BEHIND
from clawloop_edge.learn.runs import FOLDER, Run
from clawloop_edge.privacy.counting import EntryState
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared.deltas import Method, task_rules
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Trajectory

from .learning_device import SERVED, LearningDevice, learn_task

LEVEL = Level.PRIVATE_DELTAS


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    found.set_level(LEVEL)
    yield found
    found.close()


class CountedDown:
    """Yes, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self) -> bool:
        self.times -= 1
        return self.times >= 0


def begun(device: LearningDevice) -> Run:
    """A run that was interrupted after its first update."""
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "idle_s", 0.0) if update == 1 else None
    device.schedule.tick()
    device.idle_s, device.learner.wait = 1e9, lambda _: None
    run = device.runs.run()
    assert run is not None
    return run


def ledger_states(device: LearningDevice) -> list[str]:
    with device.pool.read() as database:
        return [row[0] for row in database.conn.execute("SELECT state FROM ledger ORDER BY seq")]


def test_choosing_stops_when_it_is_told_to(device: LearningDevice) -> None:
    device.keep_many(6)
    device.catch_up()
    go_on = CountedDown(3)
    with pytest.raises(Interrupted):
        device.chooser.choose(LEVEL, at_most=6, go_on=go_on)
    assert go_on.times == -1, "it is asked before each one"
    assert len(device.chooser.choose(LEVEL, at_most=6, go_on=CountedDown(6)).trajectories) == 6


def test_a_call_while_it_chooses_is_heard_and_nothing_was_begun(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.keep_many(3)
    device.desk.offered(learn_task())
    read = choosing._Looker.read

    def called(self: choosing._Looker, found: choosing.Found) -> list[Trajectory]:
        device.idle_s = 0.0
        return read(self, found)

    monkeypatch.setattr(choosing._Looker, "read", called)
    assert device.schedule.tick().missing == ["it was interrupted, and goes on when nobody calls"]
    assert (device.runs.run(), device.learner.jobs, ledger_states(device)) == (None, [], [])
    monkeypatch.setattr(choosing._Looker, "read", read)
    device.idle_s = 1e9
    device.schedule.tick()
    assert len(device.outbox.list()) == 1


def test_a_task_of_many_trajectories_does_not_read_the_whole_pool(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.keep_many(9)
    monkeypatch.setattr(choosing, "MAX_TRAJECTORIES", 3)
    task = device.learn(learn_task(batch_trajectories=1 << 16, updates=1 << 16))
    (job,) = device.learner.jobs
    assert len(job.trajectories) == 3
    assert device.runs.history()[-1].task_id == task.task_id
    device.catch_up()
    read = list[str]()

    def refuses(one: Trajectory, *_: object) -> bool:
        read.append(one.trajectory_id)
        return False

    monkeypatch.setattr(choosing, "_fits", refuses)
    chosen = device.chooser.choose(LEVEL, at_most=1)
    assert len(read) == len(chosen.useless) == choosing.MAX_LOOKED, "the rest is looked at another time"


def test_reading_what_a_run_learns_from_stops_and_the_run_stays(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(device)
    with pytest.raises(Interrupted):
        device.runs.read_trajectories(run, go_on=lambda: False)
    with pytest.raises(Interrupted):
        device.runs.read_state(run, go_on=lambda: False)
    monkeypatch.setattr(Quiet, "__call__", lambda _: False)
    assert device.schedule.tick().missing == ["it was interrupted, and goes on when nobody calls"]
    assert (device.runs.run(), len(device.learner.jobs)) == (run, 1)
    monkeypatch.undo()
    device.schedule.tick()
    assert device.learner.resumed == [b"", b"1"]
    assert len(device.outbox.list()) == 1


def test_a_large_state_is_sealed_part_by_part_and_read_again(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = begun(device), bytes(range(256)) * (1 << 16)  # 16 MiB
    monkeypatch.setattr(runs, "_PART_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        device.runs.keep_state(run, state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20, "a few parts of it, never a second copy"
    assert device.runs.read_state(run) == state
    device.runs.keep_state(run, b"")
    assert device.runs.read_state(run) == b""


def test_a_state_for_which_there_is_no_room_is_not_written_and_the_run_goes_on(device: LearningDevice) -> None:
    device.keep_many(2)
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "free_bytes", 0)
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    assert not (device.pool.folder / FOLDER / "state.sealed").exists()


def test_what_a_killed_process_left_half_written_is_removed(device: LearningDevice) -> None:
    begun(device)
    drafts = [device.pool.folder / FOLDER / name for name in (".state.sealed.0a1b2c3d", ".job.sealed.00000000")]
    for draft in drafts:
        draft.write_bytes(b"half")
    device.schedule.tick()
    assert len(device.outbox.list()) == 1
    assert list((device.pool.folder / FOLDER).iterdir()) == []


def test_a_write_that_breaks_leaves_what_was_there_and_no_draft(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(device)
    monkeypatch.setattr(runs, "_count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        device.runs.keep_state(run, b"more")
    monkeypatch.undo()
    assert device.runs.read_state(run) == b"1"
    assert {path.name for path in (device.pool.folder / FOLDER).iterdir()} == {"job.sealed", "state.sealed"}


def test_the_list_is_let_go_once_the_learner_has_it(device: LearningDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[int]()

    def learn(job: Job, **_: object) -> None:
        del job
        gc.collect()
        found.append(sum(isinstance(each, Trajectory) for each in gc.get_objects()))

    gc.collect()
    before = sum(isinstance(each, Trajectory) for each in gc.get_objects())
    monkeypatch.setattr(device.learner, "learn", learn)
    device.keep_many(4)
    device.learn()
    assert found == [before]


def test_that_its_owner_asked_for_it_is_done_once(device: LearningDevice) -> None:
    begun(device)
    device.runs.ask_now(device.now_ms)
    device.schedule.tick()
    assert device.runs.asked_ms() == 0, "a run that goes on has heard it"
    device.keep_many(2, start=10)
    device.learner.hopeless = "nothing to tell good from bad"
    device.learner.wait = lambda _: None
    device.runs.ask_now(device.now_ms)
    device.learn(learn_task())
    device.learner.hopeless = ""
    assert device.runs.asked_ms() == 0


def test_what_waits_for_a_sum_that_never_came_comes_back(device: LearningDevice) -> None:
    device.desk._sums = True
    device.keep_many(2)
    device.learn(learn_task(secure=True))
    assert [item.state for item in device.outbox.list()] == [ItemState.QUEUED]
    device.served = Policy("line", SERVED.version + BEHIND, "cd" * 32)
    device.schedule.tick()
    assert [item.state for item in device.outbox.list()] == [ItemState.QUEUED], "a server takes it still"
    assert ledger_states(device) == [EntryState.RESERVED]
    device.served = Policy("line", SERVED.version + BEHIND + 1, "cd" * 32)
    device.schedule.tick()
    assert [item.state for item in device.outbox.list()] == [ItemState.DROPPED]
    assert ledger_states(device) == [EntryState.RETURNED]
    device.catch_up()
    assert len(device.chooser.choose(LEVEL, at_most=9).trajectories) == 2


def test_what_goes_out_plainly_is_not_taken_back(device: LearningDevice) -> None:
    device.keep_many(2)
    device.learn(learn_task())
    device.served = Policy("line", SERVED.version + 99, "cd" * 32)
    device.schedule.tick()
    assert [item.state for item in device.outbox.list()] == [ItemState.QUEUED]


def test_a_delta_that_could_never_leave_is_refused_before_it_is_learned(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.desk._sums = True
    for name, value, words in (
        ("MAX_BODY_BYTES", 5_000, "over this device's 5000"),
        ("MAX_VALUES", 100, "one message of a secure sum 100"),
        ("MAX_SIGMA", 0.5, "a secure sum takes 0.5"),
    ):
        with monkeypatch.context() as small:
            small.setattr(desk, name, value)
            reply = device.desk.offered(learn_task(secure=True, sigma=2.0))
            assert not reply.accepted
            assert words in reply.reason
    assert device.desk.offered(learn_task(secure=True, sigma=2.0)).accepted


def test_the_size_that_is_refused_by_is_about_the_size_that_leaves(
    device: LearningDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.keep_many(2)
    device.learn()
    (item,) = device.outbox.list()
    monkeypatch.setattr(desk, "MAX_BODY_BYTES", item.size_bytes - 1)
    assert "over this device's" in device.desk.offered(learn_task()).reason
    monkeypatch.setattr(desk, "MAX_BODY_BYTES", item.size_bytes * 3)
    assert device.desk.offered(learn_task()).accepted


def test_a_share_of_an_update_that_tells_too_much_is_refused(tmp_path: Path) -> None:
    from clawloop_shared.objective import LossSettings

    device = LearningDevice(tmp_path, min_trajectories=8)
    device.set_level(Level.DELTAS)
    assert (
        "is over this device's 0.25"
        in device.desk.offered(learn_task(loss=LossSettings(max_trajectory_share=0.5))).reason
    )
    assert "is below this device's 8" in device.desk.offered(learn_task(batch_trajectories=7)).reason
    assert device.desk.offered(learn_task(batch_trajectories=8)).accepted
    device.close()


def test_a_server_that_trains_by_rules_that_hold_asks_for_what_holds() -> None:
    assert all(task_rules(learn_task(method=Method.LORA, clip=0.0)).values())


def test_stopping_is_heard_as_a_call_is(device: LearningDevice) -> None:
    stopping = threading.Event()
    quiet = Quiet(device.schedule._place, stopping)
    assert quiet()
    stopping.set()
    assert not quiet()
