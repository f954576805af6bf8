"""Lower levels for one app or session, and pauses: only ever less, at once, and never undone for what was kept then."""

from pathlib import Path

import pytest

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared.levels import Level

from .conftest import Blotter, MakeKept

MIB = 1 << 20


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def consent(pool: Pool, clock: Clock) -> ConsentLog:
    """A consent to everything."""
    consent = ConsentLog(pool, clock=clock)
    consent.set_level(Level.FULL)
    return consent


@pytest.fixture
def outbox(pool: Pool, consent: ConsentLog, clock: Clock) -> Outbox:
    """An outbox that holds nothing back."""
    return Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()), clock=clock)


def listed(outbox: Outbox) -> list[tuple[str, Level]]:
    """Session and level of what waits."""
    return [(item.session_id, item.level) for item in outbox.list() if item.has_bytes]


def test_a_session_with_a_lower_level_leaves_at_that(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_limit(Subject.SESSION, "red", level=Level.REDACTED)
    consent.set_limit(Subject.SESSION, "home", level=Level.METRICS)
    for session in ("red", "home", "open"):
        pool.keep_step(make_kept(session=session)).result()
    outbox.fill()
    assert listed(outbox) == [("red", Level.REDACTED), ("open", Level.FULL)]
    assert [(limit.name, limit.level) for limit in consent.limits()] == [
        ("home", Level.METRICS),
        ("red", Level.REDACTED),
    ]


def test_an_app_with_a_lower_level_takes_all_its_sessions_along(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_limit(Subject.APP, "diary", level=Level.OFF)
    for session, app in (("one", "diary"), ("two", "diary"), ("three", "agent")):
        pool.keep_step(make_kept(session=session, app=app)).result()
    outbox.fill()
    assert listed(outbox) == [("three", Level.FULL)]


def test_a_limit_of_an_app_holds_for_every_session_that_it_spoke_in(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    pool.keep_step(make_kept(session="mixed", app="")).result()
    outbox.fill()
    pool.keep_step(make_kept(session="mixed", app="diary")).result()
    pool.keep_step(make_kept(session="apart", app="")).result()
    consent.set_limit(Subject.APP, "diary", level=Level.OFF)
    outbox.fill()
    assert listed(outbox) == [("apart", Level.FULL)]


def test_the_lowest_of_device_app_and_session_holds(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_limit(Subject.APP, "agent", level=Level.REDACTED)
    consent.set_limit(Subject.SESSION, "private", level=Level.OFF)
    for session in ("private", "open"):
        pool.keep_step(make_kept(session=session)).result()
    outbox.fill()
    assert listed(outbox) == [("open", Level.REDACTED)]
    consent.set_level(Level.METRICS)
    assert listed(outbox) == []


def test_a_limit_above_the_devices_level_is_refused_with_the_reason(consent: ConsentLog) -> None:
    consent.set_level(Level.REDACTED)
    with pytest.raises(ConsentError, match="full is above this device's level redacted, and a limit can only be lower"):
        consent.set_limit(Subject.APP, "agent", level=Level.FULL)
    assert consent.limits() == []


def test_a_limit_holds_at_once_and_destroys_what_waits_above_it_alone(
    tmp_path: Path, key: bytes, make_kept: MakeKept
) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as serving, Pool.open(tmp_path, KnownKey.of(key)) as command:
        ConsentLog(command).set_level(Level.FULL)
        for session in ("one", "two"):
            serving.keep_step(make_kept(session=session)).result()
        outbox = Outbox(serving, hold_s=0)
        outbox.fill()
        one, two = (item.item_id for item in outbox.list())
        (given, _), _ = outbox.next_items(MIB)
        assert given.item_id == one
        ConsentLog(command).set_limit(Subject.SESSION, "one", level=Level.METRICS)
        with pytest.raises(ConsentError, match="may not leave now"):
            outbox.mark_sent([one])
        assert [item.item_id for item in outbox.next_items(MIB)[0]] == [two]
        assert outbox.find(one).state is ItemState.DROPPED
        outbox.mark_sent([two])
        assert outbox.may_still_leave([two])
        ConsentLog(command).set_limit(Subject.APP, "agent", level=Level.METRICS)
        assert not outbox.may_still_leave([two])


def test_a_limit_that_is_lifted_lets_out_only_what_comes_after(
    pool: Pool, consent: ConsentLog, outbox: Outbox, make_kept: MakeKept
) -> None:
    consent.set_limit(Subject.SESSION, "session-1", level=Level.OFF)
    pool.keep_step(make_kept()).result()
    consent.lift_limit(Subject.SESSION, "session-1")
    after = make_kept()
    pool.keep_step(after).result()
    outbox.fill()
    assert consent.limits() == []
    assert listed(outbox) == [("session-1", Level.FULL)]
    (item,) = Outbox.items_with(pool, after.step.step_id)
    assert item.steps == 1


def test_in_a_pause_nothing_leaves_and_what_waits_waits_on(
    pool: Pool, consent: ConsentLog, outbox: Outbox, clock: Clock, make_kept: MakeKept
) -> None:
    pool.keep_step(make_kept()).result()
    outbox.fill()
    (item,) = outbox.list()
    consent.pause(clock.now_ms + 5_000)
    state = consent.state()
    assert (state.level, state.chosen) == (Level.OFF, Level.FULL)
    assert "everything is paused until" in state.reason
    assert outbox.next_items(MIB) == ([], False)
    with pytest.raises(ConsentError, match="the level is off now"):
        outbox.mark_sent([item.item_id])
    clock.now_ms += 5_000
    assert consent.level() is Level.FULL
    assert [given.item_id for given in outbox.next_items(MIB)[0]] == [item.item_id]


@pytest.mark.parametrize("by_itself", [False, True])
def test_what_was_said_in_a_pause_never_leaves_nor_what_follows_it_in_the_same_session(
    pool: Pool, consent: ConsentLog, outbox: Outbox, clock: Clock, make_kept: MakeKept, by_itself: bool
) -> None:
    kept = {name: make_kept(session=name) for name in ("before", "in", "after")}
    pool.keep_step(kept["before"]).result()
    consent.pause(clock.now_ms + 5_000)
    pool.keep_step(kept["in"]).result()
    if by_itself:
        clock.now_ms += 5_000
        outbox.fill()
    else:
        consent.resume()
    pool.keep_step(kept["after"]).result()
    pool.keep_step(make_kept(session="in")).result()
    outbox.fill()
    assert listed(outbox) == [("before", Level.FULL), ("after", Level.FULL)]
    consent.set_level(Level.FULL, past_after=0)
    outbox.fill()
    assert listed(outbox) == [("before", Level.FULL), ("after", Level.FULL)]


def test_a_pause_that_ended_unnoticed_is_not_stretched_over_by_the_next(
    pool: Pool, consent: ConsentLog, outbox: Outbox, clock: Clock, make_kept: MakeKept
) -> None:
    consent.pause(clock.now_ms + 1_000)
    clock.now_ms += 1_000
    consent.settle()
    pool.keep_step(make_kept(session="between")).result()
    consent.pause(clock.now_ms + 1_000)
    consent.pause(clock.now_ms + 2_000)
    assert consent.state().paused_until_ms == clock.now_ms + 2_000
    consent.resume()
    outbox.fill()
    assert listed(outbox) == [("between", Level.FULL)]


def test_limits_and_pauses_are_sealed(pool: Pool, consent: ConsentLog, tmp_path: Path) -> None:
    consent.set_limit(Subject.APP, "a-very-private-app", level=Level.OFF)
    consent.pause(2_000_000)
    assert pool.verify().ok
    with pool.read() as database:
        rows = database.conn.execute("SELECT limit_id, body FROM limits").fetchall()
    assert len(rows) == 2
    assert not [row for row in rows if b"private" in row[1] or "private" in row[0]]
