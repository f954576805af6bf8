"""What is learned from at home: judged, trainable, at a level that lets deltas out and nothing more, and only once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawloop_edge.pool.curation import Word, curate
from clawloop_edge.privacy.limits import Subject
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy, Target

from .learning_device import SERVED, LearningDevice, learn_task


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    yield found
    found.close()


def chosen_sessions(device: LearningDevice, level: Level = Level.DELTAS) -> set[str]:
    device.catch_up()
    return set(device.chooser.choose(level, at_most=100).session_ids)


def test_judged_steps_of_a_level_of_deltas_are_chosen_and_no_others(device: LearningDevice) -> None:
    device.keep("before", reward=1.0)
    device.set_level(Level.DELTAS)
    device.keep("good", reward=1.0)
    device.keep("unjudged", reward=None)
    device.keep("untrainable", untrainable="the engine stopped")
    device.keep("other line", policy=Policy("other", 3, SERVED.adapter_sha256))
    device.keep("too long", prompt_ids=list(range(90)))
    device.hold_out("held out", 0.5)
    assert chosen_sessions(device) == {"good"}
    assert device.chooser.ready() == {Level.DELTAS: 1}


@pytest.mark.parametrize("level", [Level.OFF, Level.METRICS, Level.REDACTED, Level.FULL])
def test_at_any_other_level_nothing_is_chosen(device: LearningDevice, level: Level) -> None:
    device.set_level(level)
    device.keep_many(3)
    for wanted in (Level.DELTAS, Level.PRIVATE_DELTAS):
        assert not chosen_sessions(device, wanted)


def test_a_later_signal_makes_an_earlier_step_learnable_and_one_look_costs_what_is_new(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    step = device.keep("s", reward=None)
    assert chosen_sessions(device) == set()
    device.judge(step, -1.0, target=Target.RUN)
    assert device.chooser.catch_up() == 2, "one change, and the one source that it touches"
    (trajectory,) = device.chooser.choose(Level.DELTAS, at_most=9).trajectories
    assert trajectory.reward == -1.0
    device.keep_many(5)
    device.catch_up()
    assert device.chooser.catch_up() == 0
    device.keep("late", reward=None)
    assert device.chooser.catch_up() == 2


def test_each_run_takes_sessions_of_one_level(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    device.consent.set_limit(Subject.APP, "secretive", level=Level.PRIVATE_DELTAS)
    device.consent.set_limit(Subject.SESSION, "hushed", level=Level.METRICS)
    device.keep("open")
    device.keep("hushed")
    device.keep("private", level_app="secretive")
    assert chosen_sessions(device) == {"open"}
    assert chosen_sessions(device, Level.PRIVATE_DELTAS) == {"private"}


def test_an_app_limited_to_deltas_is_learned_from_on_a_device_that_sends_steps(device: LearningDevice) -> None:
    device.set_level(Level.FULL)
    device.consent.set_limit(Subject.APP, "diary", level=Level.DELTAS)
    device.keep("open")
    device.keep("diary", level_app="diary")
    assert chosen_sessions(device) == {"diary"}
    assert device.outbox.fill() == 1
    assert device.desk.offered(learn_task()).accepted


def test_what_its_owner_takes_out_of_training_is_not_chosen_until_they_say_otherwise(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    step = device.keep("s")
    assert chosen_sessions(device) == {"s"}
    curate(device.pool, Target.RUN, step.run_id, word=Word(trainable=False)).result()
    assert chosen_sessions(device) == set()
    curate(device.pool, Target.RUN, step.run_id, word=Word(trainable=True)).result()
    assert chosen_sessions(device) == {"s"}


def test_a_limit_set_or_a_session_forgotten_after_the_look_counts(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    device.keep_many(3)
    assert chosen_sessions(device) == {"s0", "s1", "s2"}
    device.consent.set_limit(Subject.SESSION, "s0", level=Level.METRICS)
    device.forget("s1")
    assert set(device.chooser.choose(Level.DELTAS, at_most=9).session_ids) == {"s2"}
    with device.pool.read() as database:
        assert not database.conn.execute("SELECT 1 FROM learnable WHERE session_id = 's1'").fetchall()


def test_signals_kept_in_a_pause_teach_nothing(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    step = device.keep("s", reward=None)
    device.consent.pause(device.now_ms + 1000)
    device.judge(step, 1.0)
    device.now_ms += 2000
    device.consent.settle()
    assert chosen_sessions(device) == set()
    device.judge(step, -1.0)
    assert chosen_sessions(device) == {"s"}
    (trajectory,) = device.chooser.choose(Level.DELTAS, at_most=9).trajectories
    assert [signal.value for signal in trajectory.signals] == [-1.0]


def test_the_past_is_chosen_only_if_its_owner_includes_it(device: LearningDevice) -> None:
    device.keep_many(2)
    device.set_level(Level.DELTAS)
    assert chosen_sessions(device) == set()
    device.consent.set_level(Level.DELTAS, past_after=0)
    assert chosen_sessions(device) == {"s0", "s1"}


def test_what_was_in_an_item_is_not_learned_from_and_what_was_learned_from_goes_into_no_item(
    device: LearningDevice,
) -> None:
    device.set_level(Level.FULL)
    device.keep("sent")
    assert device.outbox.fill() == 1
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    device.learn()
    assert {item.kind for item in device.outbox.list() if item.has_bytes} == {"delta.v1"}
    assert chosen_sessions(device) == set()
    device.consent.set_level(Level.FULL, past_after=0)
    device.outbox.fill()
    sessions = {item.session_id for item in device.outbox.list() if item.has_bytes and item.kind == "steps.v1"}
    assert sessions <= {"sent"}


def test_what_is_held_out_is_not_even_in_the_index(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    device.hold_out("v1", 1.0)
    device.catch_up()
    with device.pool.read() as database:
        rows = database.conn.execute("SELECT trajectory_id, session_id FROM learnable").fetchall()
    assert len(rows) == 2
    assert "v1" not in {name for row in rows for name in row}


def test_steps_of_one_trajectory_are_rewarded_and_chosen_together(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    first = device.keep("s", reward=None, trajectory_id="t", created_ms=1)
    second = device.keep("s2", reward=0.5, trajectory_id="t", created_ms=2)
    device.catch_up()
    (trajectory,) = device.chooser.choose(Level.DELTAS, at_most=9).trajectories
    assert [step.step_id for step in trajectory.steps] == [first.step_id, second.step_id]
    assert trajectory.trajectory_id == "t"
    device.forget("s2")
    device.catch_up()
    assert device.chooser.choose(Level.DELTAS, at_most=9).trajectories == [], "the only word went with its session"
