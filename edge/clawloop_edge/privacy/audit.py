"""What has left, and what was forgotten, without content: a chain of hashes, so that no entry can be taken out unseen.
What the server signed for is kept with it. Format: docs/formats/outbox.md.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.privacy.schema import chain, prepare
from clawloop_shared.errors import InvalidError
from clawloop_shared.files import sha256
from clawloop_shared.membership import LEFT_DOMAIN, ROTATED_DOMAIN, LeaveReceipt, RotateReceipt, open_answer
from clawloop_shared.messages import ItemReceipt, SignedAnswer
from clawloop_shared.receipts import open_forgotten, open_item

if TYPE_CHECKING:
    from sqlite_utils import Database

SENT, STOPPED, RECEIVED = "sent", "stopped", "received"
"""kinds of entries: bytes go out; their sending was broken off; the server has them on its disk"""
FORGET, FORGOTTEN = "forget", "forgotten"
"""so many bytes were forgotten here; the server has deleted what the request `item_id` named"""
ROTATED, LEFT = "rotated", "left"
"""the server has taken other keys for this device; it has noted that the device is a member no more"""
RESTORED, ROLLED_BACK = "restored", "rolled-back"
"""a backup of `since_ms` (its size and hash) became the pool; so too, and what came since is not known any more"""
ASKED = "asked"
"""a question went to a model on the machine `item_id` (`[signals]`)"""
_MEMBER_PROOFS: dict[str, tuple[str, type[RotateReceipt | LeaveReceipt]]] = {
    ROTATED: (ROTATED_DOMAIN, RotateReceipt),
    LEFT: (LEFT_DOMAIN, LeaveReceipt),
}
_HEAD = "audit.head"
_PAGE = 500


class Proof(msgspec.Struct, frozen=True):
    """The server's signed word that it has an item (`messages.ItemReceipt`), or that it forgot, took other keys or let
    the device go (`messages.SignedAnswer`), and the key that it signed with."""

    payload: bytes
    signature: bytes
    key: bytes


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that left or was forgotten. `sha256` is of its bytes; `previous_sha256` of the entry before.

    `since_ms`: of when a backup was that was restored.
    """

    seq: int
    at_ms: int
    kind: str
    size_bytes: int
    sha256: str
    receipt_id: str
    item_id: str
    previous_sha256: str
    level: str = ""
    proof: Proof | None = None
    since_ms: int = 0

    @property
    def entry_sha256(self) -> str:
        """What the next entry names as its predecessor."""
        return sha256(msgspec.json.encode(self, order="sorted"))


class AuditReport(msgspec.Struct, frozen=True):
    """What `verify` found whole: entries, how many of them the server signed for, how often a backup was restored, and
    how often that took entries back."""

    entries: int
    signed_by_server: int
    restored: int = 0
    rolled_back: int = 0


class AuditLog:
    """The audit log of a pool."""

    def __init__(self, pool: Pool, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._clock = pool, clock
        prepare(pool)

    def append(self, kind: str, size_bytes: int, *, sha256: str, receipt_id: str = "", item_id: str = "") -> AuditEntry:
        """Write down that `size_bytes` bytes left or were forgotten. Waits for the disk.

        The outbox writes its own entries (`sent`, `received`, `stopped`) in the transactions that change its items.
        """
        return self._pool.submit(
            lambda database: self.append_in(
                database, kind, size_bytes=size_bytes, sha256=sha256, receipt_id=receipt_id, item_id=item_id
            )
        ).result()

    def append_in(
        self,
        database: "Database",
        kind: str,
        *,
        size_bytes: int,
        sha256: str,
        receipt_id: str,
        item_id: str,
        level: str = "",
        proof: Proof | None = None,
        since_ms: int = 0,
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
            level=level,
            proof=proof,
            since_ms=since_ms,
        )
        self._insert(database, entry)
        return entry

    def take_over(self, other: "AuditLog") -> bool:
        """Have the entries of another pool's log that goes on from where this one ends. Waits for the disk.

        False, and nothing is taken, if it is no such log.
        """
        with self._pool.read() as database:
            seq, last = self._head(database)
        before = other.page(after_seq=seq - 1, limit=1) if seq else []
        if seq and (not before or before[0].entry_sha256 != last):
            return False

        def operation(database: "Database") -> None:
            for entry in other.after(seq):
                self._insert(database, entry)

        self._pool.submit(operation).result()
        return True

    def _insert(self, database: "Database", entry: AuditEntry) -> None:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("audit", str(entry.seq), column="body", plain=msgspec.msgpack.encode(entry))
        database.conn.execute("INSERT INTO audit (seq, body) VALUES (?, ?)", (entry.seq, body))
        chain(database, self._pool, kind="audit", record_id=str(entry.seq), body=body)
        head = msgspec.msgpack.encode((entry.seq, entry.entry_sha256))
        write_state(database, self._pool.keyring, name=_HEAD, value=head)

    def page(self, *, after_seq: int = 0, limit: int = _PAGE) -> list[AuditEntry]:
        """Up to `limit` entries after `after_seq`, oldest first."""
        with self._pool.read() as database:
            return self._page(database, after_seq, limit=limit)

    def entries(self, *, since_ms: int = 0, item_id: str = "") -> Iterator[AuditEntry]:
        """All entries, or those since a time, or of one item; oldest first, read a page at a time."""
        yield from (e for e in self.after(0) if e.at_ms >= since_ms and item_id in ("", e.item_id))

    def after(self, seq: int) -> Iterator[AuditEntry]:
        """The entries after `seq`, oldest first, read a page at a time."""
        while found := self.page(after_seq=seq):
            yield from found
            seq = found[-1].seq

    def verify(self) -> AuditReport:
        """Check the chain from end to end, and each signature of the server in it.

        Raises:
            PoolError: an entry is missing, changed or out of order, or has a receipt that the server did not sign.
            StorageError: an entry was changed in the file.
        """
        seq, previous, signed, kinds = 0, "", 0, Counter[str]()
        with self._pool.read() as database:
            head = self._head(database)
            while found := self._page(database, seq, limit=_PAGE):
                for entry in found:
                    seq += 1
                    if (entry.seq, entry.previous_sha256) != (seq, previous):
                        raise PoolError(f"the audit log is broken at entry {seq}: an entry was taken out or changed")
                    previous = entry.entry_sha256
                    signed += _check_proof(entry)
                    kinds[entry.kind] += 1
        if (seq, previous) != head:
            raise PoolError(f"the audit log is broken at its end: it has {seq} of {head[0]} entries")
        return AuditReport(seq, signed, kinds[RESTORED] + kinds[ROLLED_BACK], kinds[ROLLED_BACK])

    def _page(self, database: "Database", after_seq: int, *, limit: int) -> list[AuditEntry]:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        query = "SELECT seq, body FROM audit WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = database.conn.execute(query, (after_seq, limit)).fetchall()
        opened = (scope.unseal("audit", str(seq), column="body", sealed=body) for seq, body in rows)
        return [msgspec.msgpack.decode(plain, type=AuditEntry) for plain in opened]

    def _head(self, database: "Database") -> tuple[int, str]:
        found = read_state(database, self._pool.keyring, name=_HEAD)
        return msgspec.msgpack.decode(found, type=tuple[int, str]) if found else (0, "")


def _check_proof(entry: AuditEntry) -> bool:
    """Whether the server signed for an entry. Raises PoolError: it did not, though the entry says so."""
    if entry.proof is None:
        return False
    try:
        named = _signed_for(entry.kind, entry.proof)
    except InvalidError as error:
        raise PoolError(f"entry {entry.seq} of the audit log: {error}") from error
    if named != (entry.item_id, entry.sha256):
        raise PoolError(f"entry {entry.seq} of the audit log has the server's receipt for something else: {named[0]}")
    return True


def _signed_for(kind: str, proof: Proof) -> tuple[str, str]:
    """The id and the hash that a proof is of. Raises InvalidError: the server did not sign it."""
    if kind == FORGOTTEN:
        forgotten = open_forgotten(SignedAnswer(proof.payload, proof.signature), proof.key)
        return forgotten.request_id, sha256(proof.payload)
    if kind in _MEMBER_PROOFS:
        domain, of = _MEMBER_PROOFS[kind]
        said = open_answer(SignedAnswer(proof.payload, proof.signature), domain, kind=of, public_key=proof.key)
        return said.request_id, sha256(proof.payload)
    received = open_item(ItemReceipt(proof.payload, proof.signature), proof.key)
    return received.item_id, received.sha256
