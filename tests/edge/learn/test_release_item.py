"""A delta in the outbox: what leaves is what was shown, it obeys every word of its owner, and the ledger counts it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load

from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.pool.curation import Word, curate
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.counting import EntryState
from clawloop_edge.privacy.forget import Forgetter, Wanted
from clawloop_edge.privacy.going import what_left
from clawloop_edge.privacy.items import OutboxItem
from clawloop_edge.privacy.ledger import sigma_for
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta, Method, delta_tensors
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Target

from .learning_device import SHAPE, LearningDevice, learn_task

MIB = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    yield found
    found.close()


def learned(device: LearningDevice, level: Level, *, count: int = 3) -> OutboxItem:
    """The item of what the device learned at a level from so many sessions."""
    device.set_level(level)
    device.keep_many(count)
    device.hold_out("held out", 0.25)
    device.learn()
    (item,) = device.outbox.list()
    return item


def read(item: UploadItem) -> LoraDelta:
    return wire.decode(item.body, LoraDelta)


def ledger_states(device: LearningDevice) -> list[str]:
    with device.pool.read() as database:
        return [row[0] for row in database.conn.execute("SELECT state FROM ledger ORDER BY seq")]


def test_the_bytes_given_out_are_the_bytes_shown(device: LearningDevice) -> None:
    item = learned(device, Level.DELTAS)
    shown = device.outbox.get(item.item_id)
    (given,), more = device.outbox.next_items(MIB)
    assert (given, more) == (shown, False)
    assert (given.kind, item.session_id, sha256(given.body)) == ("delta.v1", "", item.sha256)
    delta = read(given)
    delta_tensors(delta, SHAPE)
    assert (delta.level, delta.trajectories, delta.clip, delta.sigma) == (Level.DELTAS, 3, 0.0, 0.0)
    assert delta.reward == pytest.approx(1.0)
    assert 0.25 not in msgspec.to_builtins(delta).values(), "what is held out is tied to no item, so it tells nothing"
    assert item.sessions == ["s0", "s1", "s2"]
    assert item.delta is not None
    assert item.delta.parameters == sum(each.size for each in load(delta.weights).values())
    device.outbox.mark_sent([item.item_id])
    (entry,) = AuditLog(device.pool).entries()
    assert (entry.kind, entry.sha256, entry.size_bytes) == ("sent", item.sha256, len(given.body))
    assert ledger_states(device) == []
    assert device.pool.verify().ok


def test_a_noised_delta_tells_no_reward_and_is_counted_when_it_leaves(device: LearningDevice) -> None:
    item = learned(device, Level.PRIVATE_DELTAS)
    delta = read(device.outbox.get(item.item_id))
    assert (delta.reward, delta.clip) == (None, 1.0)
    assert delta.sigma == pytest.approx(sigma_for(8.0, rounds=50))
    assert ledger_states(device) == [EntryState.RESERVED]
    device.outbox.mark_sent([item.item_id])
    assert ledger_states(device) == [EntryState.RELEASED]
    device.outbox.mark_sent([item.item_id])
    assert ledger_states(device) == [EntryState.RELEASED]
    assert device.ledger.spent("line").releases == 1
    device.set_level(Level.OFF)
    assert ledger_states(device) == [EntryState.RELEASED], "what has left stays counted"


Word_ = Callable[[LearningDevice, OutboxItem], object]
TAKES_BACK: dict[str, Word_] = {
    "the level": lambda device, _: device.set_level(Level.METRICS),
    "a session's limit": lambda device, _: device.consent.set_limit(Subject.SESSION, "s1", level=Level.METRICS),
    "an app's limit": lambda device, _: device.consent.set_limit(Subject.APP, "agent", level=Level.OFF),
    "forgetting one session": lambda device, _: device.forget("s1"),
    "a word on a step": lambda device, _: curate(
        device.pool, Target.SESSION, "s2", word=Word(trainable=False)
    ).result(),
    "dropping it": lambda device, item: device.outbox.drop(item.item_id),
    "retention": lambda device, _: device.pool.submit(
        lambda database: device.pool.forgetting.let_go(database, ["s0"])
    ).result(),
}


@pytest.mark.parametrize("level", [Level.DELTAS, Level.PRIVATE_DELTAS])
@pytest.mark.parametrize("word", TAKES_BACK)
def test_each_word_of_its_owner_takes_a_delta_back_before_it_leaves(
    device: LearningDevice, level: Level, word: str
) -> None:
    item = learned(device, level)
    TAKES_BACK[word](device, item)
    assert device.outbox.next_items(MIB) == ([], False)
    with pytest.raises((ConsentError, PoolError)):
        device.outbox.mark_sent([item.item_id])
    assert not device.outbox.may_still_leave([item.item_id])
    with pytest.raises(PoolError):
        device.outbox.get(item.item_id)
    assert set(ledger_states(device)) <= {EntryState.RETURNED}, "nothing left, so nothing is counted"
    assert device.ledger.spent("line").releases == 0
    assert device.pool.verify().ok


@pytest.mark.parametrize("word", TAKES_BACK)
def test_what_was_taken_back_may_be_learned_from_again_but_not_what_its_owner_spoke_of(
    device: LearningDevice, word: str
) -> None:
    item = learned(device, Level.DELTAS)
    TAKES_BACK[word](device, item)
    device.consent.set_level(Level.DELTAS, past_after=0)
    device.catch_up()
    left = {
        "the level": {"s0", "s1", "s2"},
        "a session's limit": {"s0", "s2"},
        "an app's limit": set(),
        "forgetting one session": {"s0", "s2"},
        "a word on a step": {"s0", "s1"},
        "dropping it": set(),
        "retention": {"s1", "s2"},
    }
    assert set(device.chooser.choose(Level.DELTAS, at_most=9).session_ids) == left[word]


def test_a_pause_holds_a_delta_back_and_destroys_nothing(device: LearningDevice) -> None:
    item = learned(device, Level.DELTAS)
    device.consent.pause(device.now_ms + 1000)
    assert device.outbox.next_items(MIB) == ([], False)
    assert not device.outbox.may_still_leave([item.item_id])
    device.consent.resume()
    (given,), _ = device.outbox.next_items(MIB)
    assert given.item_id == item.item_id


def test_a_delta_is_held_and_may_be_approved(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path)
    device.outbox.hold_ms.update(dict.fromkeys(Level, 5_000))
    item = learned(device, Level.DELTAS)
    assert item.release_ms == device.now_ms + 5_000
    assert device.outbox.next_items(MIB) == ([], False)
    device.outbox.approve(item.item_id)
    assert len(device.outbox.next_items(MIB)[0]) == 1
    device.close()


def test_a_noised_delta_may_leave_at_any_level_above_and_a_plain_one_never_below(device: LearningDevice) -> None:
    private = learned(device, Level.PRIVATE_DELTAS)
    device.set_level(Level.FULL)
    assert [item.item_id for item in device.outbox.next_items(MIB)[0]] == [private.item_id]
    device.set_level(Level.DELTAS)
    device.keep_many(3, start=10)
    device.learn()
    plain = device.outbox.list()[-1]
    assert plain.level is Level.DELTAS
    device.set_level(Level.PRIVATE_DELTAS)
    assert [item.item_id for item in device.outbox.next_items(MIB)[0]] == [private.item_id]
    assert device.outbox.find(plain.item_id).state is ItemState.DROPPED


def test_forgetting_a_session_of_a_delta_that_left_names_that_item_to_its_server_and_nothing_else(
    device: LearningDevice,
) -> None:
    item = learned(device, Level.DELTAS)
    device.outbox.mark_sent([item.item_id])
    forgetter = Forgetter(device.pool, [], clock=device.clock)
    for number, session in enumerate(("s1", "s0"), start=1):
        with device.pool.read() as database:
            (left,) = what_left(database, device.pool.keyring, session_ids=[session])
        assert left.names == [item.item_id]
        forgetter.forget(forgetter.preview(Wanted(session_ids=[session])))
        assert len(forgetter.deletions.all()) == number
    assert device.outbox.find(item.item_id).sessions == ["s2"]
    assert not device.outbox.find(item.item_id).has_bytes
    assert device.pool.verify().ok


def test_a_step_tells_which_delta_learned_from_it(device: LearningDevice) -> None:
    item = learned(device, Level.DELTAS)
    step_ids = [step.step_id for each in device.learner.jobs[0].trajectories for step in each.steps]
    assert len(step_ids) == 3
    for step_id in step_ids:
        assert [each.item_id for each in Outbox.items_with(device.pool, step_id)] == [item.item_id]


def test_half_precision_is_used_where_it_is_harmless_and_nowhere_else(device: LearningDevice) -> None:
    device.learner.size = 0.01
    coarse = load(read(device.outbox.get(learned(device, Level.DELTAS).item_id)).weights)
    assert {str(each.dtype) for each in coarse.values()} == {"float16"}
    device.learner.size = 1e-6
    device.keep_many(3, start=20)
    device.learn()
    fine = load(read(device.outbox.get(device.outbox.list()[-1].item_id)).weights)
    assert {str(each.dtype) for each in fine.values()} == {"float32"}
    assert max(np.abs(each).max() for each in fine.values()) < 1e-5


@pytest.mark.parametrize("method", [Method.LORA, Method.FFA])
def test_a_lower_rank_of_its_own_keeps_the_scale(tmp_path: Path, method: Method) -> None:
    device = LearningDevice(tmp_path, max_rank=2)
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    task = learn_task(method=method, clip=0.0)
    if method is Method.LORA:
        device.learn(task)
        delta = read(device.outbox.get(device.outbox.list()[0].item_id))
        assert (delta.rank, delta.scale) == (2, task.alpha / task.rank)
        assert device.learner.jobs[0].task.alpha / device.learner.jobs[0].rank == task.alpha / task.rank
    else:
        assert "has no other" in device.desk.offered(task).reason
    device.close()


def test_the_budget_lasts_for_as_many_releases_as_it_is_spread_over_and_no_more(tmp_path: Path) -> None:
    device = LearningDevice(tmp_path, epsilon=4.0, rounds=3)
    device.set_level(Level.PRIVATE_DELTAS)
    for number in range(3):
        device.keep_many(2, start=10 * number)
        device.learn()
        device.outbox.mark_sent([device.outbox.list()[-1].item_id])
    spent = device.ledger.spent("line")
    assert spent.releases == 3
    assert spent.epsilon == pytest.approx(4.0, rel=1e-6)
    assert device.runs.history()[-1].epsilon == pytest.approx(4.0, rel=1e-6)
    reply = device.desk.offered(learn_task())
    assert not reply.accepted
    assert reply.reason == "no privacy is left to spend on it", "what was spent is its owner's to know"
    device.close()


def test_more_noise_than_the_budget_needs_is_added_where_the_task_asks_for_it_and_never_less(
    device: LearningDevice,
) -> None:
    assert device.releaser.noise_of(learn_task(sigma=100.0, clip=0.5)) == (100.0, 0.5)
    sigma, clip = device.releaser.noise_of(learn_task(sigma=0.1, clip=1e6))
    assert sigma == pytest.approx(sigma_for(8.0, rounds=50))
    assert clip == 100.0
    with pytest.raises(ConsentError, match="no clip"):
        device.releaser.noise_of(learn_task(clip=0.0))


def test_no_delta_is_made_of_fewer_than_the_owner_wants_also_if_the_learner_sets_some_aside(
    device: LearningDevice,
) -> None:
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    device.learner.set_aside = {"run-s0/s0": "too stale"}
    device.learn()
    assert device.outbox.list() == []
    assert ledger_states(device) == [EntryState.RETURNED]
    outcome = device.runs.history()[-1]
    assert (outcome.item_id, outcome.done) == ("", True)
    assert "min_trajectories" in outcome.reason


@pytest.mark.parametrize("level", [Level.OFF, Level.METRICS, Level.REDACTED, Level.FULL])
def test_at_other_levels_no_task_is_taken_on_and_nothing_is_made(device: LearningDevice, level: Level) -> None:
    device.set_level(level)
    device.keep_many(3)
    assert not device.desk.offered(learn_task()).accepted
    device.schedule.tick()
    assert (device.outbox.list(), device.learner.jobs) == ([], [])
    assert device.desk.learning() == ""
