"""What has left and what has come, without content: a chain of hashes, so that no entry can be taken out unseen."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.privacy.schema import prepare
from clawloop_shared.files import sha256

if TYPE_CHECKING:
    from sqlite_utils import Database

_HEAD = "audit.head"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that left or came. `sha256` is that of the bytes; `previous_sha256` that of the entry before."""

    seq: int
    at_ms: int
    kind: str
    size_bytes: int
    sha256: str
    receipt_id: str
    item_id: str
    previous_sha256: str

    @property
    def entry_sha256(self) -> str:
        """What the next entry names as its predecessor."""
        return sha256(msgspec.json.encode(self, order="sorted"))


class AuditLog:
    """The audit log of a pool."""

    def __init__(self, pool: Pool, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._clock = pool, clock
        prepare(pool)

    def append(self, kind: str, size_bytes: int, *, sha256: str, receipt_id: str = "", item_id: str = "") -> AuditEntry:
        """Write down that `size_bytes` bytes left or came. Waits for the disk.

        The outbox writes its own entries (`sent`, `received`) in the transactions that change its items.
        """
        return self._pool.submit(
            lambda database: self.append_in(
                database, kind, size_bytes=size_bytes, sha256=sha256, receipt_id=receipt_id, item_id=item_id
            )
        ).result()

    def append_in(
        self, database: "Database", kind: str, *, size_bytes: int, sha256: str, receipt_id: str, item_id: str
    ) -> AuditEntry:
        """The same inside a write transaction."""
        seq, previous = self._head(database)
        entry = AuditEntry(
            seq=seq + 1,
            at_ms=self._clock(),
            kind=kind,
            size_bytes=size_bytes,
            sha256=sha256,
            receipt_id=receipt_id,
            item_id=item_id,
            previous_sha256=previous,
        )
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("audit", str(entry.seq), column="body", plain=msgspec.msgpack.encode(entry))
        database.conn.execute("INSERT INTO audit (seq, body) VALUES (?, ?)", (entry.seq, body))
        head = msgspec.msgpack.encode((entry.seq, entry.entry_sha256))
        write_state(database, self._pool.keyring, name=_HEAD, value=head)
        return entry

    def entries(self) -> list[AuditEntry]:
        """All entries, oldest first."""
        with self._pool.read() as database:
            return self._entries(database)

    def verify(self) -> int:
        """Check the chain from end to end; gives the number of entries.

        Raises:
            PoolError: an entry is missing, changed or out of order.
            StorageError: an entry was changed in the file.
        """
        with self._pool.read() as database:
            entries, head = self._entries(database), self._head(database)
        seq, previous = 0, ""
        for entry in entries:
            seq += 1
            if (entry.seq, entry.previous_sha256) != (seq, previous):
                raise PoolError(f"the audit log is broken at entry {seq}: an entry was taken out or changed")
            previous = entry.entry_sha256
        if (seq, previous) != head:
            raise PoolError(f"the audit log is broken at its end: it has {seq} of {head[0]} entries")
        return seq

    def _entries(self, database: "Database") -> list[AuditEntry]:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        rows = database.conn.execute("SELECT seq, body FROM audit ORDER BY seq")
        opened = (scope.unseal("audit", str(seq), column="body", sealed=body) for seq, body in rows)
        return [msgspec.msgpack.decode(plain, type=AuditEntry) for plain in opened]

    def _head(self, database: "Database") -> tuple[int, str]:
        found = read_state(database, self._pool.keyring, name=_HEAD)
        return msgspec.msgpack.decode(found, type=tuple[int, str]) if found else (0, "")
