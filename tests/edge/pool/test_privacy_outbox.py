"""The outbox: what is sent is what was shown, and nothing is in it that was not consented to."""

import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import items
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.batch import MAX_RAW_BYTES, MAX_RECORDS, LineRedactor
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.items import OutboxTotals
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import wire
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level
from clawloop_shared.records import Step, StepBatch, Target

from .conftest import Acknowledging, Blotter, MakeKept, MakeSignal

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


@pytest.mark.parametrize("level", [None, Level.OFF, Level.METRICS])
def test_below_full_nothing_is_made_and_nothing_is_given_out(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, level: Level | None
) -> None:
    if level:
        consent.set_level(level)
    pool.keep_step(make_kept()).result()
    assert outbox.fill() == 0
    assert outbox.list() == []
    assert outbox.next_items(MIB) == ([], False)
    assert not list(AuditLog(pool).entries())


def test_an_item_that_no_message_holds_is_passed_by_and_given_out_by_itself(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    small = item.size_bytes
    assert outbox.next_items(small) == ([], False)
    found = outbox.next_large(small, MIB)
    assert found == outbox.get(item.item_id)
    assert outbox.next_large(MIB, 2 * MIB) is None
    assert outbox.next_large(small, small - 1) is None
    outbox.mark_sent([item.item_id])
    assert outbox.next_large(small, MIB) == found
    consent.set_level(Level.METRICS)
    assert outbox.next_large(small, MIB) is None


def test_the_bytes_given_out_are_the_bytes_shown(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    receipt = consent.set_level(Level.FULL)
    kept = [make_kept(words=f"{number}") for number in range(3)]
    for each in kept:
        pool.keep_step(each)
    signal = make_signal(kept[0].step.run_id, target=Target.RUN)
    pool.keep_signal(signal).result()
    assert outbox.fill() == 1
    (listed,) = outbox.list()
    shown = outbox.get(listed.item_id)
    (given,), more = outbox.next_items(MIB)
    assert given == shown
    assert not more
    assert sha256(given.body) == listed.sha256
    assert (listed.size_bytes, given.receipt_id) == (len(given.body), receipt.receipt_id)
    expected = StepBatch(steps=[each.step for each in kept], signals=[signal])
    assert wire.decode(given.body, StepBatch) == expected
    assert outbox.fill() == 0
    assert Outbox.items_with(pool, kept[1].step.step_id) == [listed]
    assert Outbox.items_with(pool, signal.signal_id) == [listed]


def test_what_was_kept_before_the_level_was_raised_stays_at_home(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    def keep() -> KeptStep:
        kept = make_kept(session=f"session-{pool.stats().steps}")
        pool.keep_step(kept).result()
        return kept

    before = keep()
    consent.set_level(Level.FULL)
    first = keep()
    outbox.fill()
    pending = keep()
    consent.set_level(Level.OFF)
    between = keep()
    outbox.fill()
    consent.set_level(Level.FULL)
    for judged in (before, pending, between):
        pool.keep_signal(make_signal(judged.step.step_id)).result()
    after = keep()
    pool.keep_signal(make_signal(after.step.step_id)).result()
    outbox.fill()
    assert [item.state for item in outbox.list()] == [ItemState.DROPPED, ItemState.QUEUED]
    (batch,) = batches(outbox)
    assert [step.step_id for step in batch.steps] == [after.step.step_id]
    assert [signal.target_id for signal in batch.signals] == [after.step.step_id]
    assert first.step.step_id not in sent_steps(outbox)


def test_renewing_a_consent_leaves_no_gap(pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept) -> None:
    consent.set_level(Level.FULL)
    kept = [make_kept(), make_kept()]
    pool.keep_step(kept[0]).result()
    consent.set_level(Level.FULL)
    pool.keep_step(kept[1]).result()
    outbox.fill()
    assert sent_steps(outbox) == [each.step.step_id for each in kept]


def test_lowering_the_level_destroys_the_queue_at_once(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, server: Acknowledging
) -> None:
    consent.set_level(Level.FULL)
    for _ in range(3):
        pool.keep_step(make_kept()).result()
        outbox.fill()
    sent, received, queued = (item.item_id for item in outbox.list())
    outbox.mark_sent([sent, received])
    server.acknowledge(outbox, [received])
    consent.set_level(Level.METRICS)
    assert [(item.state, item.has_bytes) for item in outbox.list()] == [
        (ItemState.SENT, False),
        (ItemState.RECEIVED, True),
        (ItemState.DROPPED, False),
    ]
    assert outbox.waiting() == 0
    with pytest.raises(PoolError, match="destroyed"):
        outbox.get(queued)
    consent.set_level(Level.FULL)
    assert outbox.next_items(MIB) == ([], False)
    server.acknowledge(outbox, [sent])
    assert outbox.totals().items == 2


def test_a_level_lowered_between_asking_and_sending_stops_the_sending(
    tmp_path: Path, key: bytes, make_kept: MakeKept
) -> None:
    with (
        Pool.open(tmp_path, KnownKey.of(key), writer=True) as serving,
        Pool.open(tmp_path, KnownKey.of(key)) as command,
    ):
        ConsentLog(command).set_level(Level.FULL)
        serving.keep_step(make_kept()).result()
        outbox = Outbox(serving, hold_s=0)
        outbox.fill()
        (item,), _ = outbox.next_items(MIB)
        ConsentLog(command).set_level(Level.OFF)
        with pytest.raises(ConsentError, match="the level is off now"):
            outbox.mark_sent([item.item_id])
        assert not list(AuditLog(serving).entries())


class Lowering(Blotter):
    """A redactor in whose time a level is lowered."""

    def __init__(self, lower: Callable[[], object]) -> None:
        super().__init__()
        self._lower: Callable[[], object] | None = lower

    def learn(self, steps: Iterable[Step]) -> None:
        lower, self._lower = self._lower, None
        if lower:
            lower()


@pytest.mark.parametrize("whose", ["the device's", "a session's", "an app's", "none but a pause"])
def test_a_level_lowered_while_items_are_built_leaves_none_of_them(
    tmp_path: Path, key: bytes, make_kept: MakeKept, whose: str
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as serving, Pool.open(tmp_path, KnownKey.of(key)) as command:
        consent = ConsentLog(command)
        lower: dict[str, Callable[[], object]] = {
            "the device's": lambda: consent.set_level(Level.METRICS),
            "a session's": lambda: consent.set_limit(Subject.SESSION, "session-1", level=Level.METRICS),
            "an app's": lambda: consent.set_limit(Subject.APP, "agent", level=Level.METRICS),
            "none but a pause": lambda: consent.pause(wall_clock_ms() + 60_000),
        }
        consent.set_level(Level.FULL)
        serving.keep_step(make_kept()).result()
        outbox = Outbox(serving, hold_s=0, redactor=LineRedactor("line", Lowering(lower[whose])))
        assert outbox.fill() == 0
        assert outbox.list() == []


def test_an_item_is_of_one_session_and_the_records_keep_their_order(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    consent.set_level(Level.FULL)
    kept = [make_kept(session=name) for name in ("a", "b", "a", "c", "b", "a")]
    for each in kept:
        pool.keep_step(each).result()
    pool.keep_signal(make_signal(kept[1].step.step_id)).result()
    assert outbox.fill() == 3
    assert [(item.session_id, item.steps, item.signals) for item in outbox.list()] == [
        ("a", 3, 0),
        ("b", 2, 1),
        ("c", 1, 0),
    ]
    wanted = [each.step.step_id for name in "abc" for each in kept if each.step.session_id == name]
    assert sent_steps(outbox) == wanted


def test_an_item_is_found_by_the_beginning_of_its_id(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_level(Level.FULL)
    for session in ("one", "two"):
        pool.keep_step(make_kept(session=session)).result()
    outbox.fill()
    one, two = outbox.list()
    width = next(n for n in range(27) if one.item_id[:n] != two.item_id[:n])
    assert outbox.find(one.item_id[:width]) == one
    assert outbox.find(two.item_id[:width].lower()) == two
    assert outbox.approve(two.item_id[:width]).item_id == two.item_id
    assert outbox.get(one.item_id[:width]).item_id == one.item_id
    with pytest.raises(PoolError, match="is the beginning of several items"):
        outbox.find(one.item_id[: width - 1])
    for wrong in ("", "nonsense", "%", "0' OR 1"):
        with pytest.raises(PoolError, match="no outbox item"):
            outbox.find(wrong)


def test_the_bytes_of_what_the_server_has_are_destroyed_after_their_time(
    pool: Pool, make_kept: MakeKept, server: Acknowledging
) -> None:
    now = [1_000_000]
    consent = ConsentLog(pool, clock=lambda: now[0])
    outbox = Outbox(pool, consent, hold_s=0, keep_received_days=7, clock=lambda: now[0])
    consent.set_level(Level.FULL)
    for session in ("one", "two"):
        pool.keep_step(make_kept(session=session)).result()
    outbox.fill()
    one, two = (item.item_id for item in outbox.list())
    outbox.mark_sent([one, two])
    server.acknowledge(outbox, [one])
    now[0] += 7 * 86_400_000 - 1
    assert outbox.tidy() == 0
    now[0] += 1
    assert outbox.tidy() == 1
    assert outbox.tidy() == 0
    assert [(item.state, item.has_bytes) for item in outbox.list()] == [
        (ItemState.RECEIVED, False),
        (ItemState.SENT, True),
    ]
    with pool.read() as database:
        keys = database.conn.execute("SELECT scope FROM keys WHERE scope GLOB 'outbox/*'").fetchall()
    assert keys == [(f"outbox/{two}",)]
    assert outbox.totals() == OutboxTotals(
        waiting=0, unacknowledged=1, items=2, bytes=sum(item.size_bytes for item in outbox.list())
    )


def test_each_level_has_its_own_hold(pool: Pool, make_kept: MakeKept) -> None:
    now = [1_000_000]
    consent = ConsentLog(pool, clock=lambda: now[0])
    redactor = LineRedactor("line", Blotter())
    outbox = Outbox(pool, consent, hold_s=0, hold_redacted_s=60, redactor=redactor, clock=lambda: now[0])
    consent.set_level(Level.FULL)
    consent.set_limit(Subject.SESSION, "red", level=Level.REDACTED)
    for session in ("red", "open"):
        pool.keep_step(make_kept(session=session)).result()
    outbox.fill()
    red, full = outbox.list()
    assert (red.release_ms - now[0], full.release_ms - now[0]) == (60_000, 0)
    assert [item.item_id for item in outbox.next_items(MIB)[0]] == [full.item_id]


def test_what_waits_is_asked_for_without_reading_what_has_left(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    """Thousands of items that have left must not make the next upload slower."""
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    with pool.read() as database:

        def plan(query: str) -> str:
            values = [1] * len(set(re.findall(r"\?\d", query)))
            return "; ".join(row[3] for row in database.conn.execute(f"EXPLAIN QUERY PLAN {query}", values))

        ready, waiting, old = plan(items._READY), plan(items._COUNT), plan(items._OLD)
    assert "COVERING INDEX outbox_state (state=? AND release_ms<?)" in ready
    assert "SCAN outbox" not in ready + waiting + old
    assert "COVERING INDEX outbox_state (state=?)" in waiting
    assert "INDEX outbox_old" in old


def test_steps_that_cannot_be_learned_from_and_their_signals_stay_at_home(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    consent.set_level(Level.FULL)
    side = make_kept(session="side", untrainable="a title request")
    broken = make_kept(session="broken")
    step = msgspec.structs.replace(broken.step, response_logprobs=[-0.5, float("nan"), -0.5])
    broken = msgspec.structs.replace(broken, step=step)
    for kept in (side, broken):
        pool.keep_step(kept).result()
    pool.keep_signal(make_signal(side.step.step_id)).result()
    assert outbox.fill() == 0
    good = make_kept()
    pool.keep_step(good).result()
    assert outbox.fill() == 1
    assert sent_steps(outbox) == [good.step.step_id]


def test_items_are_held_until_their_time_or_until_approved(pool: Pool, make_kept: MakeKept) -> None:
    now = [1_000_000]
    consent = ConsentLog(pool, clock=lambda: now[0])
    outbox = Outbox(pool, consent, hold_s=60, clock=lambda: now[0])
    consent.set_level(Level.FULL)
    for _ in range(2):
        pool.keep_step(make_kept()).result()
        outbox.fill()
    first, second = (item.item_id for item in outbox.list())
    assert outbox.next_items(MIB) == ([], False)
    with pytest.raises(ConsentError, match="may not leave now"):
        outbox.mark_sent([first])
    outbox.approve(second)
    assert [item.item_id for item in outbox.next_items(MIB)[0]] == [second]
    now[0] += 60_000
    assert [item.item_id for item in outbox.next_items(MIB)[0]] == [first, second]


def test_an_item_that_was_dropped_never_leaves(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    outbox.drop(item.item_id)
    outbox.drop(item.item_id)
    assert outbox.next_items(MIB) == ([], False)
    assert outbox.fill() == 0
    with pytest.raises(ConsentError, match="dropped"):
        outbox.approve(item.item_id)
    with pytest.raises(PoolError, match="no outbox item"):
        outbox.drop("unknown")


def test_what_was_sent_comes_again_until_it_is_received_and_is_written_down_each_time(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, server: Acknowledging
) -> None:
    receipt = consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    for _ in range(2):
        (item,), _ = outbox.next_items(MIB)
        outbox.mark_sent([item.item_id])
    for _ in range(2):
        server.acknowledge(outbox, [item.item_id, "unknown"])
    assert outbox.next_items(MIB) == ([], False)
    entries = list(AuditLog(pool).entries())
    assert [entry.kind for entry in entries] == ["sent", "sent", "received"]
    assert {entry.sha256 for entry in entries} == {sha256(item.body)}
    assert {entry.receipt_id for entry in entries} == {receipt.receipt_id}
    assert outbox.totals() == OutboxTotals(waiting=0, unacknowledged=0, items=1, bytes=len(item.body))
    with pytest.raises(ConsentError, match="was received"):
        outbox.drop(item.item_id)


def test_the_servers_word_does_not_end_an_item_that_never_left(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, server: Acknowledging
) -> None:
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    server.acknowledge(outbox, [item.item_id])
    assert outbox.list()[0].state is ItemState.QUEUED
    assert not list(AuditLog(pool).entries())


def test_marking_is_all_or_nothing(pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept) -> None:
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    with pytest.raises(PoolError, match="no outbox item"):
        outbox.mark_sent([item.item_id, "unknown"])
    assert outbox.list() == [item]
    assert not list(AuditLog(pool).entries())


def test_items_are_bounded_and_given_out_as_room_allows(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept, server: Acknowledging
) -> None:
    consent.set_level(Level.FULL)
    small = [make_kept(session="small") for _ in range(MAX_RECORDS + 10)]
    large = [
        make_kept(session=f"large-{number}", prompt=[(number * at * 7919) % 90_000 for at in range(60_000)])
        for number in range(1, 7)
    ]
    for future in [pool.keep_step(each) for each in (*small, *large)]:
        future.result()
    assert outbox.fill() >= 3
    assert sent_steps(outbox) == [each.step.step_id for each in (*small, *large)]
    for batch in batches(outbox):
        assert len(batch.steps) <= MAX_RECORDS
        assert len(msgspec.msgpack.encode(batch)) <= MAX_RAW_BYTES + 100
    sizes = [item.size_bytes for item in outbox.list()]
    room, got = max(sizes) + 300, list[str]()
    while outbox.waiting():
        items, more = outbox.next_items(room)
        assert sum(len(item.body) for item in items) <= room
        outbox.mark_sent([item.item_id for item in items])
        server.acknowledge(outbox, [item.item_id for item in items])
        got += [item.item_id for item in items]
        assert more == bool(outbox.waiting())
    assert got == [item.item_id for item in outbox.list()]
    assert outbox.next_items(10) == ([], False)


def test_a_step_that_no_server_would_unpack_does_not_stop_the_others(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_level(Level.FULL)
    bomb, good = make_kept(prompt=[1] * 1_100_000), make_kept()
    bomb = msgspec.structs.replace(bomb, step=msgspec.structs.replace(bomb.step, prompt_ids=[70_000] * 1_000_000))
    for kept in (bomb, good):
        pool.keep_step(kept).result()
    outbox.fill()
    assert sent_steps(outbox) == [good.step.step_id]


def test_two_that_fill_at_once_make_nothing_twice(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as one, Pool.open(tmp_path, KnownKey.of(key)) as other:
        ConsentLog(one).set_level(Level.FULL)
        kept = [make_kept() for _ in range(30)]
        for each in kept[:15]:
            one.keep_step(each).result()
        futures = [one.keep_step(each) for each in kept[15:]]
        boxes = [Outbox(pool, hold_s=0) for pool in (one, other, one)]
        threads = [threading.Thread(target=box.fill) for box in boxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for future in futures:
            future.result()
        boxes[0].fill()
        assert sorted(sent_steps(boxes[0])) == sorted(each.step.step_id for each in kept)
