"""The outbox's items as they are listed, and reading them from the tables. Works inside any transaction or snapshot."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring
from clawloop_edge.privacy.schema import WAITING, ItemState, item_scope
from clawloop_shared.levels import Level
from clawloop_shared.messages import UploadItem

if TYPE_CHECKING:
    from sqlite_utils import Database

_COLUMNS = (
    "SELECT item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size,"
    " body IS NOT NULL, facts FROM outbox"
)
_READY = """
    SELECT item_id FROM (
        SELECT seq, size, item_id FROM outbox WHERE state = 'queued' AND release_ms <= ?1
        UNION ALL SELECT seq, size, item_id FROM outbox WHERE state = 'approved'
        UNION ALL SELECT seq, size, item_id FROM outbox WHERE state = 'sent' AND body IS NOT NULL
    ) WHERE size <= ?2 ORDER BY seq LIMIT ?3"""
_READY_LARGE = _READY.replace("size <= ?2", "size > ?2 AND size <= ?4")
_COUNT = """
    SELECT (SELECT count(*) FROM outbox WHERE state IN ('queued', 'approved')),
        (SELECT count(*) FROM outbox WHERE state = 'sent' AND body IS NOT NULL)"""
_OLD = (
    "SELECT item_id FROM outbox INDEXED BY outbox_old"
    " WHERE body IS NOT NULL AND state = 'received' AND received_ms <= ?1"
)
_LEFT = "SELECT count(*), coalesce(sum(size), 0) FROM outbox WHERE state IN ('sent', 'received')"
_SHOWN_MATCHES = 5


class DeltaFacts(msgspec.Struct, frozen=True, array_like=True):
    """What is told of an item that is a delta. It was learned from `trajectories` with `steps`; a noised one was cut to
    the norm `clip` and got noise of `sigma` times that on each of its `parameters`. A `secure` one leaves in a sum
    alone, masked."""

    task_id: str
    line_id: str
    base_version: int
    method: str
    rank: int
    trajectories: int
    steps: int
    parameters: int
    clip: float = 0.0
    sigma: float = 0.0
    secure: bool = False


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """What is sealed of an item beside its bytes. `redacted` is the number of tokens that were replaced."""

    sha256: str
    steps: int
    signals: int
    created_ms: int
    app: str = ""
    redacted: int = 0
    marks: int = 0
    delta: DeltaFacts | None = None


class OutboxItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item as it is listed: steps, signals and marks of one session at one level, or a delta that was learned from
    all of `sessions`. It is held until `release_ms`.

    `has_bytes`: whether its bytes are still here.
    """

    item_id: str
    session_id: str
    level: Level
    state: ItemState
    kind: str
    receipt_id: str
    created_ms: int
    release_ms: int
    received_ms: int
    size_bytes: int
    sha256: str
    steps: int
    signals: int
    app: str
    redacted_tokens: int
    has_bytes: bool
    marks: int = 0
    delta: DeltaFacts | None = None
    sessions: list[str] = []

    @property
    def has_left(self) -> bool:
        """Whether its bytes went out, maybe in part."""
        return self.state in (ItemState.SENT, ItemState.RECEIVED)

    @property
    def goes_masked(self) -> bool:
        """Whether it leaves in a secure sum alone, never by an upload."""
        return self.delta is not None and self.delta.secure

    def may_leave(self, now_ms: int) -> bool:
        """Whether nothing but the level stands in its way."""
        held = self.state is ItemState.QUEUED and now_ms < self.release_ms
        return self.has_bytes and not held and self.state in (ItemState.QUEUED, ItemState.APPROVED, ItemState.SENT)


class OutboxTotals(msgspec.Struct, frozen=True):
    """Items that have yet to leave, those sent and not acknowledged, and the items and bytes that have left."""

    waiting: int
    unacknowledged: int
    items: int
    bytes: int


class Items:
    """Reads the items of one pool."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def find(self, database: "Database", name: str) -> OutboxItem:
        """The item of that id, or of the only id that begins so.

        Raises:
            PoolError: there is no such item, or more than one.
        """
        row = database.conn.execute(f"{_COLUMNS} WHERE item_id = ?", (name,)).fetchone()
        if row is not None:
            return self._as_item(database, row)
        query = f"{_COLUMNS} WHERE item_id >= ? AND item_id < ? ORDER BY item_id LIMIT ?"
        upper = name.upper()
        rows = database.conn.execute(query, (upper, upper + "~", _SHOWN_MATCHES)).fetchall() if upper else []
        if len(rows) == 1:
            return self._as_item(database, rows[0])
        if rows:
            raise PoolError(f"{name} is the beginning of several items: {', '.join(row[0] for row in rows)}; give more")
        raise PoolError(f"no outbox item {name}; see `clawloop-edge outbox list`")

    def all(self, database: "Database", where: str = "", *parameters: str) -> Iterator[OutboxItem]:
        """The items, oldest first."""
        for row in database.conn.execute(f"{_COLUMNS}{where} ORDER BY seq", parameters):
            yield self._as_item(database, row)

    def latest(self, database: "Database", limit: int) -> list[OutboxItem]:
        """The `limit` latest items, oldest first."""
        rows = database.conn.execute(f"{_COLUMNS} ORDER BY seq DESC LIMIT ?", (limit,)).fetchall()
        return [self._as_item(database, row) for row in reversed(rows)]

    def waiting(self, database: "Database") -> Iterator[OutboxItem]:
        """Those whose bytes are here and that the server does not have yet."""
        return self.all(database, f" WHERE {WAITING}")

    def ready(self, database: "Database", *, now_ms: int, max_bytes: int, limit: int) -> list[OutboxItem]:
        """The oldest items, none over `max_bytes`, that only their level may keep from leaving."""
        rows = database.conn.execute(_READY, (now_ms, max_bytes, limit)).fetchall()
        return [self.find(database, row[0]) for row in rows]

    def ready_large(
        self, database: "Database", *, now_ms: int, above_bytes: int, max_bytes: int, limit: int
    ) -> list[OutboxItem]:
        """The oldest items of a size over the one and up to the other, that only their level may keep from leaving."""
        rows = database.conn.execute(_READY_LARGE, (now_ms, above_bytes, limit, max_bytes)).fetchall()
        return [self.find(database, row[0]) for row in rows]

    def received(self, database: "Database", *, before_ms: int) -> list[str]:
        """Ids of items that the server has had since before a time, and whose bytes are still here."""
        return [row[0] for row in database.conn.execute(_OLD, (before_ms,))]

    def upload(self, database: "Database", item_id: str) -> UploadItem:
        """An item with the very bytes that are sent.

        Raises:
            PoolError: there is no such item, or its bytes were destroyed.
        """
        query = "SELECT receipt_id, kind, state, body FROM outbox WHERE item_id = ?"
        row = database.conn.execute(query, (item_id,)).fetchone()
        if row is None or row[3] is None:
            state = f" ({row[2]})" if row else ""
            raise PoolError(f"the bytes of item {item_id}{state} were destroyed; nothing is left to show")
        scope = self._keyring.find(database, item_scope(item_id))
        body = scope.unseal("outbox", item_id, column="body", sealed=row[3])
        return UploadItem(item_id=item_id, receipt_id=row[0], kind=row[1], body=body)

    def totals(self, database: "Database") -> OutboxTotals:
        """Counts, without opening anything."""
        run = database.conn.execute
        return OutboxTotals(*run(_COUNT).fetchone(), *run(_LEFT).fetchone())

    def _as_item(self, database: "Database", row: tuple[Any, ...]) -> OutboxItem:
        item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size, has_bytes, sealed = row
        scope = self._keyring.find(database, POOL_SCOPE)
        facts = msgspec.msgpack.decode(scope.unseal("outbox", item_id, column="facts", sealed=sealed), type=Facts)
        return OutboxItem(
            item_id=item_id,
            session_id=session_id,
            level=Level(level),
            state=ItemState(state),
            kind=kind,
            receipt_id=receipt_id,
            created_ms=facts.created_ms,
            release_ms=release_ms,
            received_ms=received_ms,
            size_bytes=size,
            sha256=facts.sha256,
            steps=facts.steps,
            signals=facts.signals,
            app=facts.app,
            redacted_tokens=facts.redacted,
            has_bytes=bool(has_bytes),
            marks=facts.marks,
            delta=facts.delta,
            sessions=[session_id] if facts.delta is None else _sessions_of(database, item_id),
        )


def _sessions_of(database: "Database", item_id: str) -> list[str]:
    query = "SELECT session_id FROM outbox_sessions WHERE item_id = ? ORDER BY session_id"
    return [row[0] for row in database.conn.execute(query, (item_id,))]
