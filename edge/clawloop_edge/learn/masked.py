"""Noised deltas that leave in a secure sum alone: the outbox item of one becomes the masked bytes that go out, in the
transaction that lets them leave. What it was before is destroyed then, and leaves no other way.

Also the devices that this one was in a sum with. Knows no sum; formats: docs/formats/secure.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.learn.sums import Summand
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import SENT, AuditLog
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.deltas import SealedBody, seal_body
from clawloop_edge.privacy.items import Facts, Items, OutboxItem
from clawloop_edge.privacy.schema import ItemState, count_release, item_scope
from clawloop_shared import wire
from clawloop_shared.deltas import DELTA_KIND, MAX_DELTA_BYTES, LoraDelta
from clawloop_shared.secure import MASKED_KIND

if TYPE_CHECKING:
    from sqlite_utils import Database

_KNOWN = "secure.members"
_MOST_KNOWN = 10_000


class MaskedItems:
    """The `Summands` of a pool's outbox."""

    def __init__(self, pool: Pool, consent: ConsentLog, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._consent, self._clock, self._settled = pool, consent, clock, False
        self._audit, self._items = AuditLog(pool, clock=clock), Items(pool.keyring)

    def summand(self, task_id: str) -> Summand | None:
        """What was learned for that task, if it may leave now; None: not yet.

        Raises:
            ConsentError: it has left, or was taken back, or is too private now.
        """
        if not self._settled:
            self._pool.submit(self._settle).result()
            self._settled = True
        with self._pool.read() as database:
            item = self._of_task(database, task_id)
            if item is None:
                return None
            if item.kind != DELTA_KIND or not item.has_bytes:
                raise ConsentError(f"what was learned for task {task_id} is {item.state} and leaves no more")
            if not self._consent.within(database).lets_out(item):
                raise ConsentError(f"what was learned for task {task_id} may not leave at the level that it has now")
            if not item.may_leave(self._clock()):
                return None
            body = self._items.upload(database, item.item_id).body
        return Summand(item_id=item.item_id, delta=wire.decode(body, LoraDelta, max_bytes=MAX_DELTA_BYTES))

    def leaving(self, item_id: str, body: bytes) -> None:
        """Put these bytes in the place of the delta, as sent. Waits for the disk; nothing may go out before.

        Raises:
            ConsentError: a level was lowered, or the item taken back or sent meanwhile.
        """
        sealed = seal_body(self._pool.keyring, item_id, body)
        self._pool.submit(lambda database: self._leaving(database, sealed)).result()
        self._pool.anchor()

    def arrived(self, item_id: str) -> None:
        """The server counts this device among those whose values came. Waits for the disk."""

        def operation(database: Database) -> None:
            update = "UPDATE outbox SET state = ?, received_ms = ? WHERE item_id = ? AND kind = ? AND state = ?"
            facts = (ItemState.RECEIVED, self._clock(), item_id, MASKED_KIND, ItemState.SENT)
            database.conn.execute(update, facts)

        self._pool.submit(operation).result()

    def _of_task(self, database: Database, task_id: str) -> OutboxItem | None:
        """The latest item that goes masked of that task."""
        where = f" WHERE kind IN ('{DELTA_KIND}', '{MASKED_KIND}')"
        found = [item for item in self._items.all(database, where) if item.goes_masked and item.delta is not None]
        of_task = [item for item in found if item.delta is not None and item.delta.task_id == task_id]
        return of_task[-1] if of_task else None

    # Inside a write transaction

    def _leaving(self, database: Database, masked: SealedBody) -> None:
        item_id = masked.item_id
        item, now_ms = self._items.find(database, item_id), self._clock()
        waits = item.state in (ItemState.QUEUED, ItemState.APPROVED) and item.kind == DELTA_KIND and item.goes_masked
        if not waits or not self._consent.within(database).lets_out(item) or not item.may_leave(now_ms):
            raise ConsentError(f"item {item_id} is {item.state} at level {item.level} and may not leave now")
        keyring = self._pool.keyring
        facts = Facts(
            sha256=masked.sha256,
            steps=item.steps,
            signals=item.signals,
            created_ms=item.created_ms,
            delta=item.delta,
        )
        plain = msgspec.msgpack.encode(facts)
        sealed = keyring.find(database, POOL_SCOPE).seal("outbox", item_id, column="facts", plain=plain)
        masked.keep_key(database, keyring)  # and that of the delta is gone
        database.conn.execute(
            "UPDATE outbox SET kind = ?, state = ?, size = ?, facts = ?, body = ? WHERE item_id = ?",
            (MASKED_KIND, ItemState.SENT, masked.size, sealed, masked.body, item_id),
        )
        count_release(database, item_id)
        self._audit.append_in(
            database,
            SENT,
            size_bytes=masked.size,
            sha256=facts.sha256,
            receipt_id=item.receipt_id,
            item_id=item_id,
            level=item.level,
        )

    def _settle(self, database: Database) -> None:
        """Wait no more for what was sent into sums that this device forgot when it started."""
        query = "SELECT item_id FROM outbox WHERE kind = ? AND state = ? AND body IS NOT NULL"
        for (item_id,) in database.conn.execute(query, (MASKED_KIND, ItemState.SENT)).fetchall():
            self._pool.keyring.destroy(database, item_scope(item_id))
            database.conn.execute("UPDATE outbox SET body = NULL WHERE item_id = ?", (item_id,))


class PoolMembers:
    """The `KnownMembers` of a pool: trusted when first seen, the latest 10,000 of them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def known(self) -> set[bytes]:
        """Their public keys."""
        return set(self._listed())

    def keep(self, keys: set[bytes]) -> None:
        """Remember these too. Waits for the disk."""
        listed = [*dict.fromkeys([*self._listed(), *sorted(keys)])][-_MOST_KNOWN:]
        self._pool.set_state(_KNOWN, msgspec.msgpack.encode(listed)).result()

    def _listed(self) -> list[bytes]:
        found = self._pool.get_state(_KNOWN)
        return msgspec.msgpack.decode(found, type=list[bytes]) if found else []
