"""Consent to learning at home: nobody agreed to it before there was any, and a backup brings no budget back."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.learn.runs import drop_run
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.privacy.consent import device_key
from clawloop_edge.privacy.counting import EntryState, give_back_in
from clawloop_edge.privacy.ladder import Ladder, Rung
from clawloop_edge.privacy.limits import Limits, Subject
from clawloop_edge.privacy.policy import POLICY_VERSION, TEXTS, as_meant
from clawloop_edge.privacy.receipts import Receipt, ReceiptChain
from clawloop_edge.privacy.waiting import waiting_sessions
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

from .learning_device import LearningDevice, learn_task


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    yield found
    found.close()


def append(device: LearningDevice, receipt: Receipt) -> None:
    chain, private = ReceiptChain(device.pool), device_key(device.pool)
    device.pool.submit(lambda database: chain.append(database, receipt, private=private)).result()


@pytest.mark.parametrize("level", [Level.METRICS, Level.REDACTED, Level.FULL])
def test_a_consent_of_the_version_before_still_holds_where_the_text_is_the_same(
    device: LearningDevice, level: Level
) -> None:
    before = sha256(f"2\n{TEXTS[level]}".encode())
    receipt = device.consent.set_level(level)
    assert receipt.policy_sha256 == before
    append(device, msgspec.structs.replace(receipt, receipt_id="older", policy_version=2))
    assert device.consent.level() is level


@pytest.mark.parametrize("level", [Level.PRIVATE_DELTAS, Level.DELTAS])
def test_a_consent_to_deltas_from_before_there_were_any_is_asked_for_again(
    device: LearningDevice, level: Level
) -> None:
    receipt = device.consent.set_level(level)
    append(device, msgspec.structs.replace(receipt, receipt_id="older", policy_version=2, policy_sha256="0" * 64))
    assert (device.consent.level(), device.consent.state().reason) == (Level.OFF, "what the level means has changed")
    device.keep_many(2)
    device.catch_up()
    assert not device.chooser.choose(level, at_most=9).trajectories
    device.set_level(level)
    device.keep_many(2, start=10)
    device.catch_up()
    assert set(device.chooser.choose(level, at_most=9).session_ids) == {"s10", "s11"}


def test_what_was_kept_at_deltas_before_there_were_any_is_not_learned_from_later(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    receipt = device.consent.set_level(Level.FULL)
    assert receipt.ladder.at(1) is Level.DELTAS
    append(device, msgspec.structs.replace(receipt, receipt_id="older", policy_version=2))
    assert device.consent.state().ladder.at(1) is Level.METRICS
    device.catch_up()
    assert not device.chooser.choose(Level.DELTAS, at_most=9).trajectories


def test_a_limit_at_deltas_from_before_there_were_any_means_metrics_until_it_is_set_again(
    device: LearningDevice,
) -> None:
    device.set_level(Level.FULL)
    limit = device.consent.set_limit(Subject.APP, "agent", level=Level.DELTAS)
    limits = Limits(device.pool)
    plain = msgspec.msgpack.encode(msgspec.structs.replace(limit, policy_version=2))

    def put(database: object) -> None:
        run = database.conn.execute  # type: ignore[attr-defined]
        (limit_id,) = run("SELECT limit_id FROM limits").fetchone()
        scope = device.pool.keyring.find(database, POOL_SCOPE)  # type: ignore[arg-type]
        run("UPDATE limits SET body = ?", (scope.seal("limits", limit_id, column="body", plain=plain),))

    device.pool.submit(put).result()
    with device.pool.read() as database:
        assert [each.level for each in limits.all(database)] == [Level.METRICS]
    device.keep_many(2)
    device.catch_up()
    assert not device.chooser.choose(Level.DELTAS, at_most=9).trajectories
    device.consent.set_limit(Subject.APP, "agent", level=Level.DELTAS)
    device.keep_many(2, start=10)
    device.catch_up()
    assert set(device.chooser.choose(Level.DELTAS, at_most=9).session_ids) == {"s10", "s11"}


def test_rungs_mean_what_they_did_when_they_were_agreed_to() -> None:
    ladder = Ladder((Rung(0, Level.PRIVATE_DELTAS), Rung(3, Level.DELTAS), Rung(7, Level.FULL)))
    assert as_meant(ladder, POLICY_VERSION) == ladder
    assert as_meant(ladder, 2) == Ladder((Rung(0, Level.METRICS), Rung(7, Level.FULL)))


def test_a_pool_from_a_backup_has_no_run_and_gets_no_budget_back(device: LearningDevice) -> None:
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    device.learn()
    device.keep_many(2, start=10)
    device.desk.offered(learn_task())
    device.learner.wait = lambda update: setattr(device, "idle_s", 0.0) if update == 1 else None
    device.schedule.tick()
    assert device.runs.run() is not None
    device.pool.submit(lambda database: drop_run(database, device.pool, spare=False)).result()
    device.ledger.count_all()
    device.set_level(Level.OFF)
    with device.pool.read() as database:
        states = [row[0] for row in database.conn.execute("SELECT state FROM ledger")]
    assert states == [EntryState.RELEASED] * 2, "some of it may have left since the backup was made"
    assert device.runs.run() is None
    assert not [item for item in device.outbox.list() if item.has_bytes]


def test_what_another_pools_ledger_counts_is_counted_also_where_it_was_given_back_here(
    device: LearningDevice, tmp_path: Path
) -> None:
    device.set_level(Level.PRIVATE_DELTAS)
    device.keep_many(2)
    device.learn()
    with device.pool.read() as database:
        (entry_id,) = database.conn.execute("SELECT entry_id FROM ledger").fetchone()
    (tmp_path / "other").mkdir()
    other = LearningDevice(tmp_path / "other")
    other.ledger.take_over(device.ledger)
    assert not other.pool.submit(partial(give_back_in, entry_id=entry_id)).result(), "it may have left there"
    assert device.pool.submit(partial(give_back_in, entry_id=entry_id)).result()
    assert device.ledger.spent("line").releases == 0
    device.ledger.take_over(other.ledger)
    assert device.ledger.spent("line").releases == 1
    other.close()


def test_retention_takes_what_may_yet_be_learned_from_last(device: LearningDevice) -> None:
    device.set_level(Level.DELTAS)
    device.keep_many(2)
    device.keep("unjudged", reward=None)
    device.catch_up()
    with device.pool.read() as database:
        assert waiting_sessions(database, pool=device.pool, consent=device.consent) == {"s0", "s1"}
    device.learn()
    with device.pool.read() as database:
        assert waiting_sessions(database, pool=device.pool, consent=device.consent) == {"s0", "s1"}
    device.outbox.drop(device.outbox.list()[0].item_id)
    with device.pool.read() as database:
        assert waiting_sessions(database, pool=device.pool, consent=device.consent) == set()
