"""What an owner says of steps, and what the outbox does with what tells of them."""

import pytest

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared import wire
from clawloop_shared.levels import Level
from clawloop_shared.records import StepBatch, Target

from .conftest import MakeKept, MakeSignal

MIB = 1 << 20


@pytest.fixture
def consent(pool: Pool) -> ConsentLog:
    """A consent log without receipts."""
    return ConsentLog(pool)


@pytest.fixture
def outbox(pool: Pool, consent: ConsentLog) -> Outbox:
    """An outbox that holds nothing back."""
    return Outbox(pool, consent, hold_s=0)


def batches(outbox: Outbox) -> list[StepBatch]:
    """What all items that still have bytes hold."""
    return [wire.decode(outbox.get(item.item_id).body, StepBatch) for item in outbox.list() if item.has_bytes]


def sent_steps(outbox: Outbox) -> list[str]:
    return [step.step_id for batch in batches(outbox) for step in batch.steps]


@pytest.mark.parametrize("target", [Target.STEP, Target.SESSION])
def test_what_is_said_of_a_step_that_its_owner_took_out_stays_here_and_is_counted(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal, target: Target
) -> None:
    consent.set_level(Level.FULL)
    kept, other = make_kept(session="a"), make_kept(session="b")
    pool.keep_step(kept).result()
    outbox.fill()
    (item,) = outbox.list()
    outbox.drop(item.item_id)
    for each in (kept, other):
        pool.keep_step(other).result()
        name = each.step.step_id if target is Target.STEP else each.step.session_id
        pool.keep_signal(make_signal(name, target=target, comment="about Jane's letter")).result()
    outbox.fill()
    (left,) = [found for found in outbox.list() if found.has_bytes]
    assert (left.session_id, left.steps, left.signals) == ("b", 1, 1)
    assert outbox.left_out() == {"signals on steps that you took out of the outbox": 1}


def test_an_item_that_is_dropped_names_those_that_tell_of_its_steps(
    pool: Pool, consent: ConsentLog, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    consent.set_level(Level.FULL)
    outbox, kept = Outbox(pool, consent), make_kept()
    pool.keep_step(kept).result()
    outbox.fill()
    pool.keep_signal(make_signal(kept.step.step_id)).result()
    outbox.fill()
    pool.keep_step(make_kept(session="other")).result()
    outbox.fill()
    first, second, _ = outbox.list()
    outbox.drop(first.item_id)
    assert outbox.telling_of(first.item_id) == [second]
    assert outbox.telling_of(second.item_id) == []
