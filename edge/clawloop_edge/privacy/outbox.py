"""What will leave this device, made once and kept as bytes: what is sent is what was shown. docs/formats/outbox.md.

The outbox never sends. The node asks for the next items, marks them sent before their bytes go out, and hands in the
server's receipts for what is on its disk. Methods that write wait for the disk: from the event loop, call them in a
thread.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError, ReceiptInvalid
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import RECEIVED, SENT, STOPPED, AuditLog, Proof
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.filling import Filler
from clawloop_edge.privacy.items import Items, OutboxItem, OutboxTotals
from clawloop_edge.privacy.schema import ItemState, count_release, destroy_item, item_scope
from clawloop_shared.levels import Level
from clawloop_shared.messages import ItemReceipt, UploadItem
from clawloop_shared.receipts import open_item

if TYPE_CHECKING:
    from sqlite_utils import Database

DEFAULT_HOLD_S = 86_400
DEFAULT_KEEP_RECEIVED_DAYS = 7
MAX_ITEMS = 256
"""in one upload: a bound on the transaction that marks them"""
_DAY_MS = 86_400_000
_TELLING = """ WHERE state IN ('queued', 'approved') AND item_id != ?1 AND item_id IN (
    SELECT told.item_id FROM outbox_records AS own JOIN steps ON steps.step_id = own.record_id
    JOIN signals AS g ON g.target IN ('step', 'run', 'session', 'trajectory')
        AND g.target_id IN (steps.step_id, steps.run_id, steps.session_id, steps.trajectory_id)
    JOIN outbox_records AS told ON told.record_id = g.signal_id WHERE own.item_id = ?1)"""
_ITEM_OVERHEAD_BYTES = 256

Listing = list[OutboxItem]
"""an alias, because inside the class `list` is its own method"""


class Outbox:
    """The outbox of a pool.

    `hold_s`: how long an item that is made from now on stays before it leaves by itself; `hold_redacted_s`: the same at
    `redacted`, if it is another time. Without a `redactor`, what must be redacted waits until somebody fills with one.
    """

    def __init__(
        self,
        pool: Pool,
        consent: ConsentLog | None = None,
        *,
        hold_s: float = DEFAULT_HOLD_S,
        hold_redacted_s: float | None = None,
        keep_received_days: float = DEFAULT_KEEP_RECEIVED_DAYS,
        redactor: LineRedactor | None = None,
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._pool, self._clock = pool, clock
        self._consent = consent or ConsentLog(pool, clock=clock)
        redacted_s = hold_s if hold_redacted_s is None else hold_redacted_s
        self.hold_ms = dict.fromkeys(Level, int(hold_s * 1000)) | {Level.REDACTED: int(redacted_s * 1000)}
        self._filler = Filler(pool, self._consent, hold_ms=self.hold_ms, redactor=redactor, clock=clock)
        self._keep_received_ms = int(keep_received_days * _DAY_MS)
        self._audit = AuditLog(pool, clock=clock)
        self._items = Items(pool.keyring)

    def fill(self) -> int:
        """Make items of what was kept since the last time, as far as levels allow; gives how many were made."""
        return self._filler.fill()

    def redact_with(self, redactor: LineRedactor | None) -> None:
        """What is filled from now on is redacted with that."""
        self._filler.redactor = redactor

    def stop(self) -> None:
        """Have a `fill` that runs in another thread end soon. Raises RedactionError there."""
        self._filler.stop()

    def left_out(self) -> dict[str, int]:
        """Why steps that their level would let out stayed at home, with how many."""
        return self._filler.left_out()

    def waits_for_redactor(self) -> bool:
        """Whether the next record must be redacted, and there is nothing here to do it with."""
        return self._filler.waits_for_redactor()

    def tidy(self) -> int:
        """Destroy the bytes of items that the server has had for `keep_received_days`; gives how many."""
        with self._pool.read() as database:
            old = self._items.received(database, before_ms=self._clock() - self._keep_received_ms)

        def operation(database: "Database") -> None:
            for item_id in old:
                self._pool.keyring.destroy(database, item_scope(item_id))
                database.conn.execute("UPDATE outbox SET body = NULL WHERE item_id = ?", (item_id,))

        if old:
            self._pool.submit(operation).result()
        return len(old)

    # Sending

    def next_items(self, max_bytes: int) -> tuple[list[UploadItem], bool]:
        """The oldest items that may leave now, together at most `max_bytes`, and whether more of them wait.

        Items that were sent but not received come again. An item larger than `max_bytes` is passed by.
        """
        with self._pool.read() as database:
            allowance = self._consent.within(database)
            if not allowance.state.level.sends_items:
                return [], False
            limit = max_bytes - _ITEM_OVERHEAD_BYTES
            found = self._items.ready(database, now_ms=self._clock(), max_bytes=limit, limit=MAX_ITEMS + 1)
            ready = [item for item in found if allowance.lets_out(item) and not item.goes_masked]
            chosen, room = [], max_bytes
            for item in ready[:MAX_ITEMS]:
                room -= item.size_bytes + _ITEM_OVERHEAD_BYTES
                if room < 0:
                    break
                chosen.append(self._items.upload(database, item.item_id))
        return chosen, len(chosen) < len(ready)

    def next_large(self, above_bytes: int, max_bytes: int) -> UploadItem | None:
        """The oldest item that may leave now of those that `next_items(above_bytes)` passes by, up to `max_bytes`."""
        with self._pool.read() as database:
            allowance = self._consent.within(database)
            if not allowance.state.level.sends_items:
                return None
            found = self._items.ready_large(
                database,
                now_ms=self._clock(),
                above_bytes=above_bytes - _ITEM_OVERHEAD_BYTES,
                max_bytes=max_bytes,
                limit=MAX_ITEMS,
            )
            ready = (item for item in found if allowance.lets_out(item) and not item.goes_masked)
            chosen = next(ready, None)
            return self._items.upload(database, chosen.item_id) if chosen else None

    def mark_sent(self, item_ids: Sequence[str]) -> None:
        """Note that these items' bytes are about to go out; call it before they do. All or nothing.

        Raises:
            ConsentError: a level was lowered or an item taken back meanwhile: do not send.
        """
        if item_ids:
            self._pool.submit(lambda database: self._mark_sent(database, item_ids)).result()
            self._pool.anchor()

    def may_still_leave(self, item_ids: Sequence[str]) -> bool:
        """Whether bytes that are on their way may go on: no level was lowered, no item taken back. Cheap."""
        query = "SELECT count(*) FROM outbox WHERE item_id IN (SELECT value FROM json_each(?)) AND body IS NOT NULL"
        with self._pool.read() as database:
            level = self._consent.state_in(database).level
            if not item_ids or not level.sends_items:
                return not item_ids and level is not Level.OFF
            there = database.conn.execute(query, (msgspec.json.encode(item_ids).decode(),)).fetchone()
            return bool(there[0] == len(set(item_ids)))

    def mark_stopped(self, item_ids: Sequence[str]) -> None:
        """Note that the sending of these was broken off, so that only a part of their bytes went out."""

        def operation(database: "Database") -> None:
            where = " WHERE item_id IN (SELECT value FROM json_each(?))"
            for item in [*self._items.all(database, where, msgspec.json.encode(item_ids).decode())]:
                self._write_down(database, STOPPED, item=item)

        if item_ids:
            self._pool.submit(operation).result()

    def accept(self, receipts: Sequence[ItemReceipt], *, device_id: str, release_key: bytes) -> None:
        """Take the server's word that it has items on its disk, and keep it in the audit log. All or nothing.

        Receipts of items that were not sent, or are not known any more, change nothing: the server's word must not end
        an item that never left.

        Raises:
            SignatureInvalid: a receipt was not signed with the server's release key.
            ReceiptInvalid: one is for another device, or for other bytes than were sent.
        """
        said = [(open_item(receipt, release_key), receipt) for receipt in receipts]
        wrong = next((what for what, _ in said if what.device_id != device_id), None)
        if wrong is not None:
            raise ReceiptInvalid(f"the server's receipt for item {wrong.item_id} is for device {wrong.device_id}")
        known = {what.item_id: (what.sha256, receipt) for what, receipt in said}
        if known:
            self._pool.submit(lambda database: self._accept(database, known, release_key=release_key)).result()

    # Looking, and the owner's word

    def list(self, *, limit: int | None = None) -> Listing:
        """All items, or the `limit` latest; oldest first."""
        with self._pool.read() as database:
            return self._items.latest(database, limit) if limit else [*self._items.all(database)]

    def waiting(self) -> int:
        """How many items the server does not have yet (for `StatusReply.outbox_items`)."""
        totals = self.totals()
        return totals.waiting + totals.unacknowledged

    def totals(self) -> OutboxTotals:
        """Counts, without opening anything."""
        with self._pool.read() as database:
            return self._items.totals(database)

    @classmethod
    def items_with(cls, pool: Pool, record_id: str) -> Listing:
        """The items of a pool's outbox that a step or signal went into, oldest first."""
        own = cls(pool)
        where = " WHERE item_id IN (SELECT item_id FROM outbox_records WHERE record_id = ?)"
        with pool.read() as database:
            return [*own._items.all(database, where, record_id)]

    def telling_of(self, item_id: str) -> Listing:
        """The other items that have yet to leave and hold signals on steps of this one, oldest first."""
        with self._pool.read() as database:
            return [*self._items.all(database, _TELLING, item_id)]

    def find(self, name: str) -> OutboxItem:
        """The item of that id, or of the only id that begins so. Raises PoolError: there is none, or several."""
        with self._pool.read() as database:
            return self._items.find(database, name)

    def get(self, item_id: str) -> UploadItem:
        """An item with the very bytes that are sent.

        Raises:
            PoolError: there is no such item, or its bytes were destroyed.
        """
        with self._pool.read() as database:
            return self._items.upload(database, self._items.find(database, item_id).item_id)

    def drop(self, item_id: str) -> OutboxItem:
        """Take an item back before it leaves; its bytes are destroyed. Gives the item as it was.

        Raises:
            PoolError: there is no such item.
            ConsentError: it has left already.
        """

        def operation(database: "Database") -> OutboxItem:
            item = self._items.find(database, item_id)
            if item.has_left:
                raise ConsentError(f"item {item.item_id} was {item.state} and has left; only its server can delete it")
            if item.has_bytes:
                destroy_item(database, self._pool.keyring, item_id=item.item_id)
            return item

        return self._pool.submit(operation).result()

    def approve(self, item_id: str) -> OutboxItem:
        """Let an item go before its hold time is over. Gives the item as it was.

        Raises:
            PoolError: there is no such item.
            ConsentError: it was dropped, or the server has it already.
        """

        def operation(database: "Database") -> OutboxItem:
            item = self._items.find(database, item_id)
            if item.state is ItemState.DROPPED:
                raise ConsentError(f"item {item.item_id} was dropped, and its bytes are destroyed")
            if item.state is ItemState.RECEIVED:
                raise ConsentError(f"item {item.item_id} has left already: the server has it")
            if item.state is ItemState.QUEUED:
                _set_state(database, item.item_id, state=ItemState.APPROVED)
            return item

        return self._pool.submit(operation).result()

    # Inside a write transaction

    def _mark_sent(self, database: "Database", item_ids: Sequence[str]) -> None:
        allowance = self._consent.within(database)
        if not allowance.state.level.sends_items:
            raise ConsentError(f"the level is {allowance.state.level} now; nothing is sent")
        for item_id in item_ids:
            item = self._items.find(database, item_id)
            if not allowance.lets_out(item) or item.goes_masked or not item.may_leave(self._clock()):
                raise ConsentError(f"item {item_id} is {item.state} at level {item.level} and may not leave now")
            _set_state(database, item_id, state=ItemState.SENT)
            count_release(database, item_id)
            self._write_down(database, SENT, item=item)

    def _accept(self, database: "Database", known: dict[str, tuple[str, ItemReceipt]], *, release_key: bytes) -> None:
        names = (msgspec.json.encode(list(known)).decode(),)
        query = "SELECT item_id FROM outbox WHERE item_id IN (SELECT value FROM json_each(?)) AND state = 'sent'"
        for (item_id,) in database.conn.execute(query, names).fetchall():
            item, (received_sha256, receipt) = self._items.find(database, item_id), known[item_id]
            if received_sha256 != item.sha256:
                raise ReceiptInvalid(f"the server's receipt for item {item_id} is for other bytes than were sent")
            update = "UPDATE outbox SET state = ?, received_ms = ? WHERE item_id = ?"
            database.conn.execute(update, (ItemState.RECEIVED, self._clock(), item_id))
            proof = Proof(receipt.payload, receipt.signature, release_key)
            self._write_down(database, RECEIVED, item=item, proof=proof)

    def _write_down(self, database: "Database", kind: str, *, item: OutboxItem, proof: Proof | None = None) -> None:
        self._audit.append_in(
            database,
            kind,
            size_bytes=item.size_bytes,
            sha256=item.sha256,
            receipt_id=item.receipt_id,
            item_id=item.item_id,
            level=item.level,
            proof=proof,
        )


def _set_state(database: "Database", item_id: str, *, state: ItemState) -> None:
    database.conn.execute("UPDATE outbox SET state = ? WHERE item_id = ?", (state, item_id))
