"""What is known of trajectories that callers name in URLs: group, channel, metadata, and the number of the next step.

Lives in the pool, through its writer, so that a restart forgets nothing; those of late are in memory too. A row that no
call ever used goes after a week; one with steps goes with its session, that has the same name. Knows no HTTP.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from clawloop_edge.gateway.schema import Adopts, prepare_trajectories
from clawloop_edge.pool.codec import to_json
from clawloop_edge.pool.crypt import Keyring, session_scope
from clawloop_edge.pool.tombstones import Tombstones
from clawloop_edge.sessions.identity import Seat
from clawloop_shared.records import Channel

if TYPE_CHECKING:
    from sqlite_utils import Database

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_CACHED = 4096
_UNUSED_MS = 7 * 86_400_000
_SELECT = (
    "SELECT trajectory_id, minted, created_ms, next_index, last_ms, completed, facts FROM trajectories WHERE tag = ?"
)
_UPSERT = (
    "INSERT INTO trajectories (tag, trajectory_id, minted, created_ms, next_index, last_ms, completed, facts)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tag) DO UPDATE SET next_index = excluded.next_index,"
    " last_ms = excluded.last_ms, completed = excluded.completed, facts = excluded.facts"
)


class RoomPool(Adopts, Protocol):
    """The part of the pool that a room with tables of its own needs."""

    keyring: Keyring
    tombstones: Tombstones

    def submit(self, operation: Callable[["Database"], T]) -> "Future[T]": ...
    def tag(self, name: str, value: bytes) -> bytes: ...


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is sealed of a trajectory. No channel: none was said and no step was made yet. `group_size` is 0 where
    nobody said it. `rewards` counts the different rewards that were given, `reward` is the last of them."""

    group_id: str = ""
    group_size: int = 0
    channel: Channel | None = None
    rewards: int = 0
    reward: float | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One trajectory. `minted`: its id was made here, and nobody can guess it; `last_ms`: when its last step began."""

    trajectory_id: str
    minted: bool
    created_ms: int
    next_index: int = 0
    last_ms: int = 0
    completed: bool = False
    facts: Facts = Facts()

    def bound(self, *, group_id: str, channel: Channel) -> Facts:
        """The facts after a step that names a group and a channel: they are what the first step found."""
        facts = self.facts
        if self.next_index:
            return facts
        return msgspec.structs.replace(facts, group_id=facts.group_id or group_id, channel=facts.channel or channel)


class Entry:
    """A trajectory in memory. Whoever works on it holds it by `using`, and a call by `calling` as well."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.lock = asyncio.Lock()
        self.users = 0
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A call of this trajectory runs meanwhile."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until none of its calls runs; False if one still did when the time was up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class TrajectoryStore:
    """The trajectories of a pool. On the event loop's thread."""

    def __init__(self, pool: RoomPool) -> None:
        self._pool = pool
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        prepare_trajectories(pool)

    async def find(self, trajectory_id: str) -> Entry | None:
        """A trajectory; None if there is no such one."""
        found = self._entries.get(trajectory_id)
        if found is None:
            # Through the writer, so that what is still on its way to the disk is seen.
            row = await self._ask(lambda database: self._read(database, trajectory_id))
            return self._enter(row) if row else None
        self._entries.move_to_end(trajectory_id)
        return found

    async def create(self, trajectory_id: str, *, minted: bool, now_ms: int) -> Entry:
        """A new trajectory, once it is on disk; one that is there already stays as it is."""
        row = Row(trajectory_id=trajectory_id, minted=minted, created_ms=now_ms)

        def operation(database: "Database") -> Row:
            self._expire(database, now_ms - _UNUSED_MS)
            found = self._read(database, trajectory_id)
            if found is None:
                self._write(database, row)
            return found or row

        return self._enter(await self._ask(operation))

    def seat(self, entry: Entry, *, group_id: str, channel: Channel, count: int, now_ms: int) -> Seat:
        """The place of a call's `count` steps: numbered in the order of arrival, and never made at one time.

        The first step binds group and channel, if they were not named before.
        """
        old = entry.row
        facts = old.bound(group_id=group_id, channel=channel)
        now_ms = max(now_ms, old.last_ms + 1)
        self.update(entry, next_index=old.next_index + count, last_ms=now_ms, facts=facts)
        return Seat(
            trajectory_id=old.trajectory_id,
            group_id=facts.group_id,
            group_size=facts.group_size,
            index=old.next_index,
            created_ms=now_ms,
            closed=old.completed,
        )

    def update(self, entry: Entry, *, metadata: dict[str, Any] | None = None, **changes: Any) -> "Future[None]":
        """Change a trajectory at once; the future is resolved when the change is on disk."""
        row = entry.row = msgspec.structs.replace(entry.row, **changes)
        sealed = None if metadata is None else to_json(metadata)
        future = self._pool.submit(lambda database: self._write(database, row, metadata=sealed))
        future.add_done_callback(_complain)
        return future

    def drop(self, trajectory_ids: Collection[str]) -> None:
        """Let go of trajectories that were forgotten. Who holds one goes on with it; nothing of it is kept."""
        for trajectory_id in trajectory_ids:
            self._entries.pop(trajectory_id, None)

    @property
    def names(self) -> list[str]:
        """The trajectories that memory holds."""
        return list(self._entries)

    async def count_steps(self, trajectory_id: str) -> int:
        """How many of its steps are kept, those included that are on their way to the disk."""
        query = "SELECT count(*) FROM steps WHERE trajectory_id = ?"
        found = await self._ask(lambda database: database.conn.execute(query, (trajectory_id,)).fetchone())
        return int(found[0])

    @contextmanager
    def using(self, entry: Entry) -> Iterator[Entry]:
        """Hold on to a trajectory: it stays in memory meanwhile."""
        entry.users += 1
        try:
            yield entry
        finally:
            entry.users -= 1

    def _enter(self, row: Row) -> Entry:
        entry = self._entries.setdefault(row.trajectory_id, Entry(row))
        self._entries.move_to_end(row.trajectory_id)
        if len(self._entries) > _CACHED:
            oldest = next((name for name, old in self._entries.items() if not old.users and old is not entry), None)
            if oldest is not None:
                del self._entries[oldest]
        return entry

    async def _ask(self, operation: "Callable[[Database], T]") -> T:
        return await asyncio.shield(asyncio.wrap_future(self._pool.submit(operation)))

    def _tag(self, trajectory_id: str) -> bytes:
        return self._pool.tag("trajectory", trajectory_id.encode("utf-8", "surrogatepass"))

    def _read(self, database: "Database", trajectory_id: str) -> Row | None:
        found = database.conn.execute(_SELECT, (self._tag(trajectory_id),)).fetchone()
        if found is None:
            return None
        name, minted, created_ms, next_index, last_ms, completed, sealed = found
        facts = Facts()
        if sealed is not None:
            scope = self._pool.keyring.find(database, session_scope(name))
            facts = msgspec.msgpack.decode(
                scope.unseal("trajectories", name, column="facts", sealed=sealed), type=Facts
            )
        return Row(
            trajectory_id=name,
            minted=bool(minted),
            created_ms=created_ms,
            next_index=next_index,
            last_ms=last_ms,
            completed=bool(completed),
            facts=facts,
        )

    def _write(self, database: "Database", row: Row, *, metadata: bytes | None = None) -> None:
        name, tag, run = row.trajectory_id, self._tag(row.trajectory_id), database.conn.execute
        if self._pool.tombstones.forgot(database, session=name):
            return
        facts = None
        if row.facts != Facts():  # a trajectory that was only begun needs no key of its own
            facts = self._seal(database, name, column="facts", plain=msgspec.msgpack.encode(row.facts))
        numbers = (row.minted, row.created_ms, row.next_index, row.last_ms, row.completed)
        run(_UPSERT, (tag, name, *numbers, facts))
        if metadata is not None:
            sealed = self._seal(database, name, column="metadata", plain=metadata)
            run("UPDATE trajectories SET metadata = ? WHERE tag = ?", (sealed, tag))

    def _seal(self, database: "Database", name: str, *, column: str, plain: bytes) -> bytes:
        scope = self._pool.keyring.ensure(database, session_scope(name))
        return scope.seal("trajectories", name, column=column, plain=plain)

    def _expire(self, database: "Database", before_ms: int) -> None:
        """Forget what no call ever used."""
        run = database.conn.execute
        old = "SELECT trajectory_id FROM trajectories WHERE next_index = 0 AND created_ms < ? LIMIT 100"
        for (name,) in run(old, (before_ms,)).fetchall():
            run("DELETE FROM trajectories WHERE tag = ?", (self._tag(name),))
            if run("SELECT 1 FROM sessions WHERE session_id = ?", (name,)).fetchone() is None:
                self._pool.keyring.destroy(database, session_scope(name))


def _complain(future: "Future[None]") -> None:
    error = None if future.cancelled() else future.exception()
    if error is not None:
        _LOG.error("what changed of a trajectory could not be kept: %s", type(error).__name__)
