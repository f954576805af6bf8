"""What will leave this device, made once and kept as bytes: what is sent is what was shown. docs/formats/outbox.md.

The outbox never sends. The node asks for the next items, marks them sent before their bytes go out, and marks them
received when the server says that they are on its disk. Methods that write wait for the disk: from the event loop,
call them in a thread.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.batch import Draft, draft_batch
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.schema import CURSOR, ItemState, destroy_item, item_scope
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.messages import UploadItem

if TYPE_CHECKING:
    from sqlite_utils import Database

KIND = "steps.v1"
DEFAULT_HOLD_S = 86_400
_ITEM_OVERHEAD_BYTES = 256
_UNRECEIVED = " WHERE state IN ('queued', 'approved', 'sent')"
_SENT = " WHERE state = 'sent'"
_LIST = "SELECT item_id, state, kind, receipt_id, release_ms, size, facts, body IS NOT NULL FROM outbox"


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """What is sealed of an item beside its bytes."""

    sha256: str
    steps: int
    signals: int
    created_ms: int


class OutboxTotals(msgspec.Struct, frozen=True):
    """Items that the server does not have yet, and the items and bytes that have left."""

    waiting: int
    items: int
    bytes: int


class OutboxItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item as it is listed. It is held until `release_ms`; `has_bytes`: whether its bytes are still here."""

    item_id: str
    state: ItemState
    kind: str
    receipt_id: str
    created_ms: int
    release_ms: int
    size_bytes: int
    sha256: str
    steps: int
    signals: int
    has_bytes: bool

    def may_leave(self, now_ms: int) -> bool:
        """Whether nothing but the level stands in its way."""
        held = self.state is ItemState.QUEUED and now_ms < self.release_ms
        return self.has_bytes and not held and self.state in (ItemState.QUEUED, ItemState.APPROVED, ItemState.SENT)


Items = list[OutboxItem]
"""an alias, because inside the class `list` is its own method"""


class Outbox:
    """The outbox of a pool. `hold_s`: how long an item that is made from now on stays before it leaves by itself."""

    def __init__(
        self,
        pool: Pool,
        consent: ConsentLog | None = None,
        *,
        hold_s: float = DEFAULT_HOLD_S,
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._pool, self._clock = pool, clock
        self._consent = consent or ConsentLog(pool, clock=clock)
        self._hold_ms = int(hold_s * 1000)
        self._audit = AuditLog(pool, clock=clock)

    def fill(self) -> int:
        """Make items of what was kept since the last time, if the level lets steps out; gives how many were made.

        An item is built beside the writer and put in by a transaction that checks level and cursor again, so that a
        level lowered meanwhile, by whichever process, leaves no item behind.
        """
        made = 0
        while (draft := self._draft()) is not None:
            made += self._pool.submit(partial(self._put, draft=draft)).result()
        return made

    def next_items(self, max_bytes: int) -> tuple[list[UploadItem], bool]:
        """The oldest items that may leave now, together at most `max_bytes`, and whether more of them wait.

        Items that were sent but not received come again. An item larger than `max_bytes` is passed by.
        """
        with self._pool.read() as database:
            if not self._consent.state_in(database).level.sends_steps:
                return [], False
            ready = [item for item in self._items(database, _UNRECEIVED) if item.may_leave(self._clock())]
            chosen, room = [], max_bytes
            fitting = [item for item in ready if item.size_bytes + _ITEM_OVERHEAD_BYTES <= max_bytes]
            for item in fitting:
                room -= item.size_bytes + _ITEM_OVERHEAD_BYTES
                if room < 0:
                    break
                chosen.append(self._upload_item(database, item))
        return chosen, len(chosen) < len(fitting)

    def mark_sent(self, item_ids: Sequence[str]) -> None:
        """Note that these items' bytes are about to go out; call it before they do. All or nothing.

        Raises:
            ConsentError: the level was lowered or an item taken back meanwhile: do not send.
        """
        if item_ids:
            self._pool.submit(lambda database: self._mark_sent(database, item_ids)).result()

    def mark_received(self, item_ids: Sequence[str]) -> None:
        """Note that the server has these on disk. Names of items that were not sent, or are not known, change nothing:
        the server's word must not end an item that never left."""
        if item_ids:
            self._pool.submit(lambda database: self._mark_received(database, item_ids)).result()

    def list(self) -> Items:
        """All items, oldest first."""
        with self._pool.read() as database:
            return self._items(database)

    def waiting(self) -> int:
        """How many items the server does not have yet (for `StatusReply.outbox_items`)."""
        return self.totals().waiting

    def totals(self) -> OutboxTotals:
        """Counts, without opening anything."""
        query = (
            "SELECT count(*) FILTER (WHERE body IS NOT NULL AND state != :received), count(*) FILTER (WHERE left),"
            " coalesce(sum(size) FILTER (WHERE left), 0)"
            " FROM (SELECT *, state IN (:sent, :received) AS left FROM outbox)"
        )
        with self._pool.read() as database:
            states = {"sent": ItemState.SENT, "received": ItemState.RECEIVED}
            return OutboxTotals(*database.conn.execute(query, states).fetchone())

    @classmethod
    def items_with(cls, pool: Pool, record_id: str) -> Items:
        """The items of a pool's outbox that a step or signal went into, oldest first."""
        own = cls(pool)
        where = " WHERE item_id IN (SELECT item_id FROM outbox_records WHERE record_id = ?)"
        with pool.read() as database:
            return own._items(database, where, record_id)

    def get(self, item_id: str) -> UploadItem:
        """An item with the very bytes that are sent.

        Raises:
            PoolError: there is no such item, or its bytes were destroyed.
        """
        with self._pool.read() as database:
            return self._upload_item(database, self._item(database, item_id))

    def drop(self, item_id: str) -> None:
        """Take an item back before it leaves; its bytes are destroyed.

        Raises:
            PoolError: there is no such item.
            ConsentError: it has left already.
        """

        def operation(database: "Database") -> None:
            item = self._item(database, item_id)
            if item.state in (ItemState.SENT, ItemState.RECEIVED):
                raise ConsentError(f"item {item_id} was {item.state}; ask the server's operator to delete it")
            if item.has_bytes:
                destroy_item(database, self._pool.keyring, item_id=item_id)

        self._pool.submit(operation).result()

    def approve(self, item_id: str) -> None:
        """Let an item go before its hold time is over.

        Raises:
            PoolError: there is no such item.
            ConsentError: it was dropped.
        """

        def operation(database: "Database") -> None:
            item = self._item(database, item_id)
            if item.state is ItemState.DROPPED:
                raise ConsentError(f"item {item_id} was dropped, and its bytes are destroyed")
            if item.state is ItemState.QUEUED:
                _set_state(database, item_id, state=ItemState.APPROVED)

        self._pool.submit(operation).result()

    def _draft(self) -> Draft | None:
        with self._pool.reading() as reading:
            database = reading.database
            consent = self._consent.state_in(database)
            if consent.receipt is None or not consent.level.sends_steps:
                return None
            cursor = _cursor(database, self._pool)
            return draft_batch(reading, consent.receipt, cursor=cursor)

    def _put(self, database: "Database", *, draft: Draft) -> int:
        """Insert the draft's item and move the cursor, if nothing it was built on has changed; gives items made."""
        consent = self._consent.state_in(database)
        same = consent.receipt is not None and consent.receipt.receipt_id == draft.receipt_id
        if not same or not consent.level.sends_steps or _cursor(database, self._pool) != draft.cursor:
            return 0
        keyring = self._pool.keyring
        write_state(database, keyring, name=CURSOR, value=draft.upto.to_bytes(8, "big"))
        if draft.body is None:
            return 0
        item_id = new_id()
        now_ms = self._clock()
        facts = msgspec.msgpack.encode(
            Facts(sha256(draft.body), len(draft.step_ids), len(draft.signal_ids), created_ms=now_ms)
        )
        sealed_facts = keyring.find(database, POOL_SCOPE).seal("outbox", item_id, column="facts", plain=facts)
        own_scope = keyring.ensure(database, item_scope(item_id))
        sealed_body = own_scope.seal("outbox", item_id, column="body", plain=draft.body)
        insert = (
            "INSERT INTO outbox (item_id, state, kind, receipt_id, release_ms, size, facts, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        )
        plain = (item_id, ItemState.QUEUED, KIND, draft.receipt_id, now_ms + self._hold_ms, len(draft.body))
        database.conn.execute(insert, (*plain, sealed_facts, sealed_body))
        records = [(record_id, item_id) for record_id in (*draft.step_ids, *draft.signal_ids)]
        database.conn.executemany("INSERT INTO outbox_records (record_id, item_id) VALUES (?, ?)", records)
        return 1

    def _mark_sent(self, database: "Database", item_ids: Sequence[str]) -> None:
        level = self._consent.state_in(database).level
        if not level.sends_steps:
            raise ConsentError(f"the level is {level} now; nothing is sent")
        for item_id in item_ids:
            item = self._item(database, item_id)
            if not item.may_leave(self._clock()):
                raise ConsentError(f"item {item_id} is {item.state} and may not leave now")
            _set_state(database, item_id, state=ItemState.SENT)
            self._write_down(database, "sent", item=item)

    def _mark_received(self, database: "Database", item_ids: Sequence[str]) -> None:
        sent = {item.item_id: item for item in self._items(database, _SENT)}
        for item_id in item_ids:
            item = sent.pop(item_id, None)
            if item is not None:
                _set_state(database, item_id, state=ItemState.RECEIVED)
                self._write_down(database, "received", item=item)

    def _write_down(self, database: "Database", kind: str, *, item: OutboxItem) -> None:
        self._audit.append_in(
            database,
            kind,
            size_bytes=item.size_bytes,
            sha256=item.sha256,
            receipt_id=item.receipt_id,
            item_id=item.item_id,
        )

    def _upload_item(self, database: "Database", item: OutboxItem) -> UploadItem:
        row = database.conn.execute("SELECT body FROM outbox WHERE item_id = ?", (item.item_id,)).fetchone()
        if row[0] is None:
            raise PoolError(f"the bytes of item {item.item_id} ({item.state}) were destroyed; nothing is left to show")
        scope = self._pool.keyring.find(database, item_scope(item.item_id))
        body = scope.unseal("outbox", item.item_id, column="body", sealed=row[0])
        return UploadItem(item_id=item.item_id, receipt_id=item.receipt_id, kind=item.kind, body=body)

    def _item(self, database: "Database", item_id: str) -> OutboxItem:
        row = database.conn.execute(f"{_LIST} WHERE item_id = ?", (item_id,)).fetchone()
        if row is None:
            raise PoolError(f"no outbox item {item_id}; see `clawloop-edge outbox list`")
        return self._as_item(database, row)

    def _items(self, database: "Database", where: str = "", *parameters: str) -> Items:
        rows = database.conn.execute(f"{_LIST}{where} ORDER BY seq", parameters).fetchall()
        return [self._as_item(database, row) for row in rows]

    def _as_item(self, database: "Database", row: tuple[str, str, str, str, int, int, bytes, int]) -> OutboxItem:
        item_id, state, kind, receipt_id, release_ms, size, sealed, has_bytes = row
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        plain = scope.unseal("outbox", item_id, column="facts", sealed=sealed)
        facts = msgspec.msgpack.decode(plain, type=Facts)
        return OutboxItem(
            item_id=item_id,
            state=ItemState(state),
            kind=kind,
            receipt_id=receipt_id,
            created_ms=facts.created_ms,
            release_ms=release_ms,
            size_bytes=size,
            sha256=facts.sha256,
            steps=facts.steps,
            signals=facts.signals,
            has_bytes=bool(has_bytes),
        )


def _cursor(database: "Database", pool: Pool) -> int:
    found = read_state(database, pool.keyring, name=CURSOR)
    return int.from_bytes(found, "big") if found else 0


def _set_state(database: "Database", item_id: str, *, state: ItemState) -> None:
    database.conn.execute("UPDATE outbox SET state = ? WHERE item_id = ?", (state, item_id))
