"""Which sessions go because they are old, or because there is no room, and letting them go. docs/formats/pool.md.

The oldest go first; those that somebody still waits for (they have yet to leave) go only when no other is left. One
that was used within the last hour is never taken. What goes is not forgotten for good: its ids may come again.
If the disk is nearly full, and what may go would not be enough, nothing goes for that and no more is kept (`Gate`): to
lose everything and still have no room would help nobody. Nothing goes for its age by a clock that has just jumped.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolFull
from clawloop_edge.pool.settings import RetentionSettings
from clawloop_edge.pool.shrinking import SPARE_PAGES, pragma, shrink

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

_LOG = logging.getLogger(__name__)
IN_USE_MS = 3_600_000
"""a session that was used within this time may be in use now"""
SWEEP_EVERY_MS = 3_600_000
SHORT_EVERY_MS = 60_000
"""how often it is tried again while the disk is nearly full"""
_DAY_MS = 86_400_000
JUMP_MS = 7 * _DAY_MS
TRUSTED_AFTER_MS = _DAY_MS
"""for how long the clock must have gone on without a jump before anything goes for its age: one wrong date, or the
right one after it, would make a whole life older than `days`"""
CLOCK = "retention.clock"
_OLDEST = "SELECT session_id, last_ms, size FROM sessions WHERE last_ms < ? ORDER BY last_ms, last_seq"
_FULL = "SELECT session_id FROM sessions WHERE last_ms >= ? AND size >= ?"

Waiting = Callable[["Database"], Collection[str]]
"""the sessions that somebody still waits for"""


class Reason(StrEnum):
    """Why a session goes."""

    AGE = "age"
    """it was not used for `days`"""
    SIZE = "size"
    """the pool takes more than `max_bytes`"""
    DISK = "disk"
    """the disk has less than `free_floor_bytes` left"""


class Leaving(msgspec.Struct, frozen=True, kw_only=True):
    """A session that goes. `size_bytes` is what is sealed of it; `waited_for`: although somebody waits for it."""

    session_id: str
    last_ms: int
    size_bytes: int
    reason: Reason
    waited_for: bool


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What goes now, the first first; and how many bytes the disk lacks even then."""

    leaving: list[Leaving]
    lacking_bytes: int


class Clock(msgspec.Struct, frozen=True):
    """What the wall clock said at the last sweep, and since when it has gone on without a jump."""

    at_ms: int
    since_ms: int

    def then(self, now_ms: int) -> "Clock":
        """The clock as it is now; more than `JUMP_MS` since the last sweep, or a step back, is a jump."""
        return Clock(now_ms, self.since_ms if 0 <= now_ms - self.at_ms <= JUMP_MS else now_ms)

    @property
    def trusted(self) -> bool:
        """Whether something may go for its age."""
        return self.at_ms - self.since_ms >= TRUSTED_AFTER_MS


class Gate:
    """Whether more may be kept. Set by `Retention`; asked by the pool for each step, in any thread."""

    def __init__(self) -> None:
        self.closed = ""
        """why nothing is kept; empty: it is"""
        self.full: frozenset[str] = frozenset()
        """sessions that are as large as one may be"""
        self.refused = 0

    def check(self, session_id: str) -> None:
        """Return if a step of this session may be kept; else count it.

        Raises:
            PoolFull: it may not, and why.
        """
        reason = self.closed or ("its session is as large as one may be" if session_id in self.full else "")
        if reason:
            self.refused += 1
            raise PoolFull(f"the step is not kept: {reason}")


class _Need(msgspec.Struct, frozen=True):
    """Until when a session is too old, by how many bytes the pool is too large, and how many the disk lacks.

    `shrinks`: what goes gives its room back to the disk.
    """

    expired_ms: int
    over_bytes: int
    short_bytes: int
    shrinks: bool

    def reason(self, last_ms: int, freed_bytes: int) -> Reason | None:
        """Why the next session goes, if so much has gone before it; None: it stays, and so do all after it."""
        if last_ms < self.expired_ms:
            return Reason.AGE
        if freed_bytes < self.over_bytes:
            return Reason.SIZE
        return Reason.DISK if self.shrinks and freed_bytes < self.short_bytes else None


def plan(
    database: "Database",
    settings: RetentionSettings,
    *,
    now_ms: int,
    free_bytes: int,
    waiting: Collection[str] = (),
    aged: bool = True,
) -> Plan:
    """What should go now. `free_bytes` is what the disk has left; not `aged`: nothing goes for its age."""
    need = _Need(
        expired_ms=now_ms - int(settings.days * _DAY_MS) if settings.days and aged else 0,
        over_bytes=used_bytes(database) - settings.max_bytes if settings.max_bytes else 0,
        short_bytes=settings.free_floor_bytes - free_bytes,
        shrinks=bool(pragma(database, "auto_vacuum")),
    )
    rows: list[tuple[str, int, int]] = database.conn.execute(_OLDEST, (now_ms - IN_USE_MS,)).fetchall()
    leaving = list[Leaving]()
    for waited_for in (False, True):
        group = [row for row in rows if (row[0] in waiting) is waited_for]
        leaving += _take(group, need, before=sum(each.size_bytes for each in leaving), waited_for=waited_for)
    lacking = need.short_bytes - (sum(each.size_bytes for each in leaving) if need.shrinks else 0)
    if lacking > 0:
        leaving = [each for each in leaving if each.reason is not Reason.DISK]
    return Plan(leaving=leaving, lacking_bytes=max(0, lacking))


def _take(rows: list[tuple[str, int, int]], need: _Need, *, before: int, waited_for: bool) -> Iterator[Leaving]:
    """Those of `rows`, oldest first, that must go after `before` bytes have gone."""
    for session_id, last_ms, size in rows:
        reason = need.reason(last_ms, before)
        if reason is None:
            return
        before += size
        yield Leaving(session_id=session_id, last_ms=last_ms, size_bytes=size, reason=reason, waited_for=waited_for)


def used_bytes(database: "Database") -> int:
    """Bytes of those of the database's pages that hold something."""
    return (pragma(database, "page_count") - pragma(database, "freelist_count")) * pragma(database, "page_size")


def full_sessions(database: "Database", settings: RetentionSettings, *, now_ms: int) -> frozenset[str]:
    """The sessions in use that are as large as one may be."""
    if not settings.session_max_bytes:
        return frozenset()
    rows = database.conn.execute(_FULL, (now_ms - IN_USE_MS, settings.session_max_bytes))
    return frozenset(row[0] for row in rows)


class Retention:
    """Lets sessions of a pool go in time, and closes its gate while there is no room. For one thread at a time."""

    def __init__(
        self,
        pool: "Pool",
        settings: RetentionSettings,
        *,
        waiting: Waiting,
        clock_ms: Callable[[], int],
        free_bytes: Callable[[], int],
    ) -> None:
        self._pool, self._settings, self._waiting = pool, settings, waiting
        self._clock_ms, self._free_bytes = clock_ms, free_bytes
        self._swept_ms = 0

    def tick(self) -> None:
        """Sweep if it is time; call it every few seconds, so that a disk that fills is noticed. Waits for the disk.

        Raises:
            StorageError: the pool cannot be read or written.
        """
        since_ms = self._clock_ms() - self._swept_ms
        short = self._free_bytes() < self._settings.free_floor_bytes
        wait_ms = SHORT_EVERY_MS if short and self._pool.gate.closed else 0 if short else SWEEP_EVERY_MS
        if not 0 <= since_ms < wait_ms:  # a clock that was set back must not stop it
            self.sweep()
        elif not short:
            self._close("")

    def sweep(self) -> Plan:
        """Let go of what should go, each session in a transaction of its own; gives what was planned."""
        self._swept_ms = now_ms = self._clock_ms()
        clock = self._clock(now_ms)
        with self._pool.read() as database:
            waiting = self._waiting(database)
            found = plan(
                database,
                self._settings,
                now_ms=now_ms,
                free_bytes=self._free_bytes(),
                waiting=waiting,
                aged=clock.trusted,
            )
            self._pool.gate.full = full_sessions(database, self._settings, now_ms=now_ms)
        gone = [
            each for each in found.leaving if self._pool.submit(partial(_let_go, pool=self._pool, each=each)).result()
        ]
        if gone:
            short = any(each.reason is Reason.DISK for each in gone)
            shrink(self._pool, spare_pages=0 if short else SPARE_PAGES)
            _log_gone(gone)
        self._close(self._lack(found))
        return found

    def _clock(self, now_ms: int) -> Clock:
        before = self._pool.get_state(CLOCK)
        clock = msgspec.msgpack.decode(before, type=Clock).then(now_ms) if before else Clock(now_ms, now_ms)
        self._pool.set_state(CLOCK, msgspec.msgpack.encode(clock)).result()
        return clock

    def _lack(self, found: Plan) -> str:
        if not found.lacking_bytes:
            return ""
        free, floor = self._free_bytes() >> 20, self._settings.free_floor_bytes >> 20
        return (
            f"the disk has {free} MiB left, under [retention] free_floor_bytes ({floor} MiB), and what the pool could "
            "let go is not enough; free some space"
        )

    def _close(self, reason: str) -> None:
        before, self._pool.gate.closed = self._pool.gate.closed, reason
        if reason and not before:
            _LOG.error("nothing more is kept: %s", reason)
        elif before and not reason:
            _LOG.info("the disk has room again: steps are kept (%d were not)", self._pool.gate.refused)


def _let_go(database: "Database", *, pool: "Pool", each: Leaving) -> bool:
    """Take the session out, unless it was used since it was looked at."""
    row = database.conn.execute("SELECT last_ms FROM sessions WHERE session_id = ?", (each.session_id,)).fetchone()
    if row is None or row[0] != each.last_ms:
        return False
    pool.forgetting.let_go(database, [each.session_id])
    return True


def _log_gone(gone: list[Leaving]) -> None:
    counts = Counter(each.reason for each in gone)
    reasons = ", ".join(f"{count} for {reason}" for reason, count in counts.items())
    mib = sum(each.size_bytes for each in gone) >> 20
    waited = sum(each.waited_for for each in gone)
    _LOG.info("let go of %d old sessions (%d MiB): %s; %d of them had yet to leave", len(gone), mib, reasons, waited)
