"""Taking whole sessions out of the pool: all of their rows and their key in one transaction, so that never half of one
is gone. Whole ones, because later steps build on earlier ones. Format: docs/formats/pool.md, "Forgetting".

`forget` is the owner's word: it leaves tombstones, takes what belongs to no session along, and leaves a note of what
remains to be done once it is on disk (`finishing`). `let_go` is for what became old: its ids may come again.
Rooms with tables of their own name what must go with a session (`Pool.adopt(..., forget=...)`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool import finishing
from clawloop_edge.pool.crypt import Keyring, session_scope
from clawloop_edge.pool.heads import mark_forgotten
from clawloop_edge.pool.parts import release_parts
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.tally import Label, count_all, count_step
from clawloop_edge.pool.tombstones import SESSION, SIGNAL, STEP, Tombstones
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from sqlite_utils import Database

LOOSE_SCOPES = "loose/"
"""how the scopes begin of what belongs to no session, and goes with any forgetting"""
_AT_ONCE = 256
_IDS = "(SELECT value FROM json_each(?))"
_LOOKUPS = f"lookups WHERE seq IN (SELECT seq FROM steps WHERE session_id IN {_IDS})"  # noqa: S608


class Going(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions that go. `for_good`: by the owner's word, never to be kept again; `everything`: all that there is."""

    session_ids: Sequence[str]
    for_good: bool
    everything: bool = False


GoesWith = Callable[["Database", Going], None]
"""deletes what a room's own tables hold of sessions that go; runs inside the transaction, while their rows are there"""


class Forgotten(msgspec.Struct, frozen=True, kw_only=True):
    """What went. `size_bytes` is what was sealed of it."""

    session_ids: list[str]
    step_ids: list[str]
    signal_ids: list[str]
    size_bytes: int


class Forgetting:
    """Forgets in one pool. Its methods need the writer's transaction."""

    def __init__(
        self, keyring: Keyring, index_key: bytes, *, tombstones: Tombstones, dropped: Callable[[], None]
    ) -> None:
        """`dropped` is called after sessions were taken out: what memory holds of them must go too."""
        self._keyring, self._index_key = keyring, index_key
        self._tombstones, self._dropped = tombstones, dropped
        self._rooms: dict[str, GoesWith] = {}

    def goes_with(self, name: str, room: GoesWith) -> None:
        """Have the tables of the room `name` cleared of what goes."""
        self._rooms[name] = room

    def forget(self, database: "Database", session_ids: Collection[str], *, everything: bool = False) -> Forgotten:
        """Forget these sessions for good, or all that there are; ids that are not here are never kept either."""
        wanted = {*session_ids, *(_all_sessions(database) if everything else ())}
        going = Going(session_ids=sorted(wanted), for_good=True, everything=everything)
        found = self._take_out(database, going)
        for (scope,) in database.conn.execute("SELECT scope FROM keys WHERE scope GLOB ?", (f"{LOOSE_SCOPES}*",)):
            self._keyring.destroy(database, scope)
        for kind, record_ids in ((SESSION, wanted), (STEP, found.step_ids), (SIGNAL, found.signal_ids)):
            self._tombstones.add(database, kind, record_ids=record_ids)
        finishing.note(database, self._keyring)
        return found

    def let_go(self, database: "Database", session_ids: Collection[str]) -> Forgotten:
        """Take these sessions out because they are old; what comes of them later is kept as new."""
        return self._take_out(database, Going(session_ids=sorted(set(session_ids)), for_good=False))

    def _take_out(self, database: "Database", going: Going) -> Forgotten:
        counts, whole = (Counter[Label](), True) if going.everything else self._labels(database, going.session_ids)
        for room in self._rooms.values():
            room(database, going)
        found = Forgotten(session_ids=[], step_ids=[], signal_ids=[], size_bytes=0)
        for session_ids in _batches(going.session_ids):
            if going.for_good:
                self._tombstones.add_lookups(database, _lookup_tags(database, session_ids))
            shared = sum(release_parts(database, self._keyring, session_id) for session_id in session_ids)
            found = _add(found, _delete_rows(database, session_ids, shared_bytes=shared))
            for session_id in session_ids:
                self._keyring.destroy(database, session_scope(session_id))
        for label, steps in counts.items():
            count_step(database, self._keyring, index_key=self._index_key, label=label, steps=-steps)
        database.conn.execute("DELETE FROM tallies WHERE steps <= 0 OR ?", (going.everything,))
        if not whole:
            count_all(database, self._keyring, index_key=self._index_key)
        self._dropped()
        return found

    def _labels(self, database: "Database", session_ids: Collection[str]) -> tuple[Counter[Label], bool]:
        """What the steps of these sessions are counted as; False if one cannot be opened, for then all that stay must
        be counted anew: damage must not keep a session from being forgotten."""
        found: Counter[Label] = Counter()
        try:
            for session_id in session_ids:
                found.update(Reading(database, self._keyring).labels(session_id))
        except ClawloopError:
            return Counter(), False
        return found, True


def _delete_rows(database: "Database", session_ids: Sequence[str], *, shared_bytes: int) -> Forgotten:
    """Delete the pool's own rows of these sessions; gives what they were. `shared_bytes` went with them already."""
    wanted = (msgspec.json.encode(session_ids).decode(),)
    run = database.conn.execute
    steps = run(f"SELECT step_id, seq FROM steps WHERE session_id IN {_IDS}", wanted).fetchall()  # noqa: S608
    signals = run(f"SELECT signal_id, seq FROM signals WHERE session_id IN {_IDS}", wanted).fetchall()  # noqa: S608
    here = run(f"SELECT session_id, size FROM sessions WHERE session_id IN {_IDS}", wanted).fetchall()  # noqa: S608
    mark_forgotten(database, [row[1] for row in (*steps, *signals)])
    run(f"DELETE FROM {_LOOKUPS}", wanted)  # noqa: S608
    for table in ("signals", "steps", "parts", "sessions"):
        run(f"DELETE FROM {table} WHERE session_id IN {_IDS}", wanted)  # noqa: S608
    return Forgotten(
        session_ids=[row[0] for row in here],
        step_ids=[row[0] for row in steps],
        signal_ids=[row[0] for row in signals],
        size_bytes=sum(row[1] for row in here) + shared_bytes,
    )


def _all_sessions(database: "Database") -> list[str]:
    """All sessions, and those trajectories that have a key and no step."""
    run, start = database.conn.execute, session_scope("")
    keyed = run("SELECT substr(scope, ?) FROM keys WHERE scope GLOB ?", (len(start) + 1, f"{start}*")).fetchall()
    return [row[0] for row in (*run("SELECT session_id FROM sessions").fetchall(), *keyed)]


def _lookup_tags(database: "Database", session_ids: Sequence[str]) -> list[bytes]:
    wanted = (msgspec.json.encode(session_ids).decode(),)
    return [row[0] for row in database.conn.execute(f"SELECT tag FROM {_LOOKUPS}", wanted)]  # noqa: S608


def _batches(session_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(session_ids), _AT_ONCE):
        yield session_ids[start : start + _AT_ONCE]


def _add(one: Forgotten, other: Forgotten) -> Forgotten:
    return Forgotten(
        session_ids=one.session_ids + other.session_ids,
        step_ids=one.step_ids + other.step_ids,
        signal_ids=one.signal_ids + other.signal_ids,
        size_bytes=one.size_bytes + other.size_bytes,
    )
