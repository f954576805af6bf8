"""What is old goes, what is in use stays, what is waited for goes last, and a full disk refuses what is new."""

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import PoolFull
from clawloop_edge.pool import retention
from clawloop_edge.pool.finishing import unfinished
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.retention import Reason, Retention, plan, used_bytes
from clawloop_edge.pool.settings import RetentionSettings
from clawloop_edge.pool.store import Pool

MakeKept = Callable[..., KeptStep]
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
NOW_MS = 100 * DAY_MS
ROOM = 1 << 50
NO_LIMITS = RetentionSettings(days=0, max_bytes=0, session_max_bytes=0, free_floor_bytes=0)


def settings(**limits: float) -> RetentionSettings:
    """Settings with these limits and no others."""
    return msgspec.structs.replace(NO_LIMITS, **limits)


def keep(pool: Pool, make_kept: MakeKept, session: str, *, at_ms: int, steps: int = 2, size: int = 2000) -> None:
    """A session, last used at `at_ms`, of random words that cannot be packed."""
    for _ in range(steps):
        words = os.urandom(size).hex()
        pool.keep_step(make_kept(session=session, words=words, started_ms=at_ms - 1, finished_ms=at_ms)).result()


class World:
    """A clock and a disk that the test moves, and a retention that goes by them."""

    def __init__(self, pool: Pool, limits: RetentionSettings, *, waiting: Collection[str] = ()) -> None:
        self.pool, self.now_ms, self.free = pool, NOW_MS, ROOM
        self.retention = Retention(
            pool, limits, waiting=lambda _: waiting, clock_ms=lambda: self.now_ms, free_bytes=lambda: self.free
        )

    def sweep_for(self, days: float) -> None:
        """A sweep every twelve hours until so many days have gone by."""
        until_ms = self.now_ms + int(days * DAY_MS)
        while self.now_ms < until_ms:
            self.retention.sweep()
            self.now_ms = min(until_ms, self.now_ms + 12 * HOUR_MS)

    def left(self) -> list[str]:
        """The sessions that are left after a sweep, oldest first."""
        self.retention.sweep()
        return [session.session_id for session in reversed(self.pool.sessions())]


def test_a_session_goes_once_it_was_not_used_for_so_many_days(pool: Pool, make_kept: MakeKept) -> None:
    for age in (31, 29, 1):
        keep(pool, make_kept, f"used {age} days ago", at_ms=NOW_MS - age * DAY_MS)
    world = World(pool, settings(days=32))
    world.sweep_for(days=2)
    assert world.left() == ["used 29 days ago", "used 1 days ago"]
    world.sweep_for(days=2)
    assert world.left() == ["used 1 days ago"]
    assert pool.verify().problems == []
    assert unfinished(pool) == (), "nothing was forgotten for good"
    world.sweep_for(days=32)
    assert world.left() == []


@pytest.mark.parametrize("wrong_ms", [NOW_MS + 3_000 * DAY_MS, DAY_MS])
def test_a_wrong_date_takes_nothing_if_it_is_put_right_within_a_day(
    pool: Pool, make_kept: MakeKept, wrong_ms: int
) -> None:
    keep(pool, make_kept, "before", at_ms=NOW_MS)
    world = World(pool, settings(days=30))
    world.sweep_for(days=3)
    right_ms, world.now_ms = world.now_ms, wrong_ms
    world.sweep_for(days=0.9)
    keep(pool, make_kept, "meanwhile", at_ms=wrong_ms)
    world.now_ms = right_ms + DAY_MS
    world.sweep_for(days=0.9)
    assert sorted(world.left()) == ["before", "meanwhile"]


def test_an_edge_that_starts_anew_goes_on_trusting_its_clock(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "old", at_ms=1)
    World(pool, settings(days=30)).sweep_for(days=1)
    assert pool.stats().sessions == 1
    later = World(pool, settings(days=30))
    later.now_ms += DAY_MS
    assert later.left() == []


def test_without_limits_nothing_goes(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "old", at_ms=1)
    world = World(pool, NO_LIMITS)
    world.free = 0
    assert world.left() == ["old"]
    assert pool.gate.closed == ""


def test_a_session_that_may_be_in_use_is_never_taken(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "idle", at_ms=NOW_MS - HOUR_MS - 1)
    keep(pool, make_kept, "in use", at_ms=NOW_MS - HOUR_MS + 1)
    world = World(pool, settings(days=0.0001, max_bytes=1))
    assert world.left() == ["in use"]


def test_a_session_that_was_used_since_it_was_looked_at_stays(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "old", at_ms=1)
    world = World(pool, settings(days=30))
    world.retention.sweep()
    world.now_ms += DAY_MS

    def waiting(_: object) -> Collection[str]:
        keep(pool, make_kept, "old", at_ms=world.now_ms)
        return ()

    world.retention = Retention(
        pool, settings(days=30), waiting=waiting, clock_ms=lambda: world.now_ms, free_bytes=lambda: ROOM
    )
    assert world.left() == ["old"]
    assert pool.stats().steps == 4


def test_the_oldest_go_until_the_pool_is_small_enough_and_those_waited_for_go_last(
    pool: Pool, make_kept: MakeKept
) -> None:
    for number in range(8):
        keep(pool, make_kept, f"s{number}", at_ms=NOW_MS - (20 - number) * DAY_MS, size=100_000)
    with pool.read() as database:
        used = used_bytes(database)
    waiting = {"s0", "s1", "s2"}
    one = used // 9
    assert World(pool, settings(max_bytes=used - one), waiting=waiting).left() == [
        *("s0", "s1", "s2"),
        *("s4", "s5", "s6", "s7"),
    ]
    assert World(pool, settings(max_bytes=used - 6 * one), waiting=waiting).left() == ["s1", "s2"]
    with pool.read() as database:
        assert used_bytes(database) < used - 5 * one
    assert pool.verify().problems == []


def test_what_goes_gives_its_room_back_to_the_disk(
    tmp_path: Path, key: bytes, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "SPARE_PAGES", 100)
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        for number in range(10):
            keep(pool, make_kept, f"s{number}", at_ms=number, size=100_000)
        pool.cut_log()
        before = (tmp_path / "pool.db").stat().st_size
        assert before > 2_000_000
        World(pool, settings(days=1)).sweep_for(days=2)
        assert (tmp_path / "pool.db").stat().st_size < 1_000_000
        keep(pool, make_kept, "s1", at_ms=NOW_MS)
        assert pool.verify().problems == []


def test_a_full_disk_takes_the_oldest_if_that_helps(pool: Pool, make_kept: MakeKept) -> None:
    for number in range(4):
        keep(pool, make_kept, f"s{number}", at_ms=number, size=50_000)
    world = World(pool, settings(free_floor_bytes=1_000_000))
    world.free = 900_000
    assert world.left() == ["s1", "s2", "s3"]
    assert pool.gate.closed == ""


def test_a_disk_that_stays_full_takes_nothing_but_refuses_what_is_new_and_says_so_once(
    pool: Pool, make_kept: MakeKept, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keep(pool, make_kept, "old", at_ms=1)
    world = World(pool, settings(free_floor_bytes=5 << 30))
    world.free = 1 << 30
    for _ in range(3):
        world.retention.tick()
        world.now_ms += 60_000
    with pytest.raises(PoolFull, match=r"1024 MiB left, under .* free_floor_bytes \(5120 MiB"):
        pool.keep_step(make_kept(session="new")).result()
    assert pool.stats().refused == 1
    assert [record.message for record in caplog.records if "kept" in record.message] == [
        "nothing more is kept: the disk has 1024 MiB left, under [retention] free_floor_bytes (5120 MiB), "
        "and what the pool could let go is not enough; free some space"
    ]
    world.free = ROOM
    world.retention.tick()
    pool.keep_step(make_kept(session="new")).result()
    assert [session.session_id for session in pool.sessions()] == ["new", "old"]
    assert caplog.records[-1].message == "the disk has room again: steps are kept (1 were not)"


def test_a_pool_whose_file_cannot_shrink_loses_nothing_to_a_full_disk(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "old", at_ms=1, size=50_000)
    with pool._reader() as database:
        for change in ("PRAGMA query_only = OFF", "PRAGMA auto_vacuum = NONE", "VACUUM", "PRAGMA query_only = ON"):
            database.conn.execute(change)
    world = World(pool, settings(free_floor_bytes=1_000_000))
    world.free = 999_999
    assert world.left() == ["old"]
    assert "free some space" in pool.gate.closed


def test_a_session_that_is_as_large_as_one_may_be_grows_no_further(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "large", at_ms=NOW_MS, size=50_000)
    keep(pool, make_kept, "small", at_ms=NOW_MS)
    World(pool, settings(session_max_bytes=50_000)).left()
    with pytest.raises(PoolFull, match="as large as one may be"):
        pool.keep_step(make_kept(session="large")).result()
    pool.keep_step(make_kept(session="small")).result()
    assert pool.stats().steps == 5


def test_it_sweeps_at_the_start_and_once_an_hour_and_after_the_clock_was_set_back(
    pool: Pool, make_kept: MakeKept
) -> None:
    world, sweeps = World(pool, settings(days=30)), list[int]()
    sweep = world.retention.sweep

    def counted() -> object:
        sweeps.append(world.now_ms)
        return sweep()

    world.retention.sweep = counted  # type: ignore[method-assign,assignment]
    for minutes in (0, 59, 60, 90, 121, 5):
        world.now_ms = NOW_MS + minutes * 60_000
        world.retention.tick()
    assert [(at - NOW_MS) // 60_000 for at in sweeps] == [0, 60, 121, 5]


def test_a_plan_tells_what_would_go_and_why(pool: Pool, make_kept: MakeKept) -> None:
    keep(pool, make_kept, "old", at_ms=1)
    keep(pool, make_kept, "idle", at_ms=NOW_MS - DAY_MS)
    with pool.read() as database:
        found = plan(database, settings(days=30, max_bytes=1), now_ms=NOW_MS, free_bytes=ROOM, waiting={"old"})
    told = [(each.session_id, each.reason, each.waited_for) for each in found.leaving]
    assert told == [("idle", Reason.SIZE, False), ("old", Reason.AGE, True)]
    assert pool.stats().sessions == 2
