"""What servers were asked to delete, kept until each has signed that it did. Format: docs/formats/outbox.md.

The names to be deleted are sealed under a key of their own, which goes as soon as the server has answered; that a
request was made, and what came of it, stays. Sends nothing itself.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError, ReceiptInvalid
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import SealedColumn
from clawloop_edge.privacy.audit import FORGOTTEN, AuditLog, Proof
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_edge.privacy.device_keys import request_key
from clawloop_shared import wire
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.messages import MAX_FORGET_IDS, ForgetRequest, SignedAnswer
from clawloop_shared.receipts import open_forgotten, sign_forget

if TYPE_CHECKING:
    from sqlite_utils import Database

FIRST_WAIT_MS, LONGEST_WAIT_MS = 30_000, 6 * 3_600_000
_ALL = "SELECT request_id, due_ms, facts FROM deletions ORDER BY seq"
_WAITING = "SELECT request_id, due_ms, facts FROM deletions WHERE body IS NOT NULL ORDER BY seq"
_DUE = "SELECT request_id FROM deletions WHERE body IS NOT NULL AND due_ms <= ? ORDER BY seq"


class DeletionState(StrEnum):
    """How far a request has come."""

    WAITING = "waiting"
    """the server has not answered yet; it is asked again"""
    DONE = "done"
    """the server signed that it is deleted"""
    GONE = "gone"
    """the server signed that it has deleted this whole device, and with it all that it had sent"""
    STRANDED = "stranded"
    """this device does not know any more how to reach that server; only its operator can delete it"""


class Server(msgspec.Struct, frozen=True, kw_only=True, tag="deletion-server.v1"):
    """Where something was sent to, and who this device is there. No `ca_pem`: it is not known how to reach it."""

    url: str
    root_key: bytes
    device_id: str = ""
    ca_pem: str = ""
    release_key: bytes = b""


class Deletion(msgspec.Struct, frozen=True, kw_only=True):
    """One request as it is listed. `adapters` are the versions that the server says had learned from any of it."""

    request_id: str
    state: DeletionState
    server: Server
    records: int
    everything: bool
    asked_ms: int
    due_ms: int = 0
    tries: int = 0
    problem: str = ""
    done_ms: int = 0
    deleted: int = 0
    unknown: int = 0
    adapters: list[int] = []


def deletion_tables(database: "Database") -> None:
    """Requests to servers to delete what was sent."""
    for statement in (
        """CREATE TABLE deletions (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, due_ms INTEGER NOT NULL,
            facts BLOB NOT NULL, body BLOB
        ) STRICT""",
        "CREATE INDEX deletions_due ON deletions (due_ms) WHERE body IS NOT NULL",
    ):
        database.execute(statement)


_SEALED = (
    SealedColumn("deletions", "facts", "request_id"),
    SealedColumn("deletions", "body", "request_id", "'deletion/' || request_id"),
)


class Deletions:
    """The requests of a pool. What writes waits for the disk."""

    def __init__(self, pool: Pool, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._clock = pool, clock
        self._audit = AuditLog(pool, clock=clock)
        pool.adopt("deletions", (deletion_tables,), sealed=_SEALED)

    def add_in(
        self, database: "Database", server: Server, *, names: Sequence[str], everything: bool = False
    ) -> list[str]:
        """Ask a server to delete these records, or everything; gives the requests' ids. Needs a write transaction."""
        state = DeletionState.WAITING if server.ca_pem else DeletionState.STRANDED
        starts = [0] if everything else range(0, len(names), MAX_FORGET_IDS)
        made, asked_ms = [], self._clock()
        for start in starts:
            part = [] if everything else list(names[start : start + MAX_FORGET_IDS])
            deletion = Deletion(
                request_id=new_id(),
                state=state,
                server=server,
                records=len(names) if everything else len(part),
                everything=everything,
                asked_ms=asked_ms,
                due_ms=asked_ms,
            )
            self._insert(database, deletion, names=part if state is DeletionState.WAITING else None)
            made.append(deletion.request_id)
        return made

    def waiting(self) -> list[Deletion]:
        """The requests that no server has answered yet, oldest first."""
        with self._pool.read() as database:
            return [self._open(database, row) for row in database.conn.execute(_WAITING).fetchall()]

    def count_waiting(self) -> int:
        """How many these are, without opening anything."""
        with self._pool.read() as database:
            count: int = database.conn.execute("SELECT count(*) FROM deletions WHERE body IS NOT NULL").fetchone()[0]
        return count

    def all(self) -> list[Deletion]:
        """All requests, oldest first."""
        with self._pool.read() as database:
            return [self._open(database, row) for row in database.conn.execute(_ALL).fetchall()]

    def get(self, request_id: str) -> Deletion:
        """One request. Raises PoolError: there is none of that id."""
        with self._pool.read() as database:
            return self._find(database, request_id)

    def due(self) -> list[str]:
        """The requests that should be sent now, oldest first."""
        with self._pool.read() as database:
            return [row[0] for row in database.conn.execute(_DUE, (self._clock(),))]

    def message(self, request_id: str) -> tuple[Server, bytes] | None:
        """Where a request goes and its bytes, signed now; None if it was answered meanwhile."""
        with self._pool.read() as database:
            found = self._find(database, request_id)
            names = self._names(database, request_id)
        if names is None:
            return None
        private = request_key(self._pool, found.server.device_id)
        request = ForgetRequest(
            request_id=request_id,
            device_id=found.server.device_id,
            at_ms=self._clock(),
            record_ids=names,
            everything=found.everything,
        )
        return found.server, wire.encode(sign_forget(request, private))

    def failed(self, request_id: str, problem: str, *, wait_ms: int = 0) -> None:
        """Note why a try came to nothing; the next one comes after `wait_ms`, or after twice as long as the last, and
        at the latest after `LONGEST_WAIT_MS`: a server must not put it off for good."""

        def operation(database: "Database") -> None:
            found = self._find(database, request_id)
            if found.state is DeletionState.WAITING:
                backoff_ms = FIRST_WAIT_MS << min(found.tries, 20)
                due_ms = self._clock() + min(max(wait_ms, backoff_ms), LONGEST_WAIT_MS)
                changed = msgspec.structs.replace(found, tries=found.tries + 1, problem=problem, due_ms=due_ms)
                self._update(database, changed)

        self._pool.submit(operation).result()

    def answered(self, request_id: str, answer: SignedAnswer) -> Deletion:
        """Take the server's word that it deleted, and keep it in the audit log; what was to be deleted is not named
        here any more.

        Raises:
            SignatureInvalid: it was not signed with the server's release key.
            WireError: it is no answer of ours.
            ReceiptInvalid: it is for another request or device.
        """
        found = self.get(request_id)
        said = open_forgotten(answer, found.server.release_key)
        if (said.request_id, said.device_id) != (request_id, found.server.device_id):
            raise ReceiptInvalid(
                f"the server's receipt for deletion {request_id} is for request {said.request_id} of {said.device_id}"
            )
        done = msgspec.structs.replace(
            found,
            state=DeletionState.GONE if said.device_deleted else DeletionState.DONE,
            tries=found.tries + 1,
            problem="",
            due_ms=0,
            done_ms=said.at_ms,
            deleted=said.deleted,
            unknown=said.unknown,
            adapters=said.adapters,
        )

        def operation(database: "Database") -> None:
            if self._find(database, request_id).state is not DeletionState.WAITING:
                return
            self._update(database, done)
            self._audit.append_in(
                database,
                FORGOTTEN,
                size_bytes=len(answer.payload),
                sha256=sha256(answer.payload),
                receipt_id="",
                item_id=request_id,
                proof=Proof(answer.payload, answer.signature, found.server.release_key),
            )

        self._pool.submit(operation).result()
        return done

    def take_over(self, other: "Deletions") -> None:
        """Ask on for what another pool has asked for, whose place this one takes. Waits for the disk."""
        known = {deletion.request_id for deletion in self.all()}
        for deletion in other.all():
            if deletion.request_id not in known:
                with other._pool.read() as database:
                    names = other._names(database, deletion.request_id)
                self._pool.submit(partial(self._insert, deletion=deletion, names=names)).result()

    # Inside any transaction or snapshot

    def _insert(self, database: "Database", deletion: Deletion, *, names: Sequence[str] | None) -> None:
        database.conn.execute(
            "INSERT INTO deletions (request_id, due_ms, facts, body) VALUES (?, ?, ?, ?)",
            (deletion.request_id, deletion.due_ms, self._seal(database, deletion), None),
        )
        if names is not None:
            self._put_names(database, deletion.request_id, names=names)

    def _find(self, database: "Database", request_id: str) -> Deletion:
        query = "SELECT request_id, due_ms, facts FROM deletions WHERE request_id = ?"
        row = database.conn.execute(query, (request_id,)).fetchone()
        if row is None:
            raise PoolError(f"no deletion {request_id}; see `clawloop-edge privacy deletions`")
        return self._open(database, row)

    def _open(self, database: "Database", row: tuple[str, int, bytes]) -> Deletion:
        request_id, due_ms, sealed = row
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        plain = scope.unseal("deletions", request_id, column="facts", sealed=sealed)
        return msgspec.structs.replace(msgspec.msgpack.decode(plain, type=Deletion), due_ms=due_ms)

    def _seal(self, database: "Database", deletion: Deletion) -> bytes:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        plain = msgspec.msgpack.encode(deletion)
        return scope.seal("deletions", deletion.request_id, column="facts", plain=plain)

    def _update(self, database: "Database", deletion: Deletion) -> None:
        facts = self._seal(database, deletion)
        update = "UPDATE deletions SET due_ms = ?, facts = ? WHERE request_id = ?"
        database.conn.execute(update, (deletion.due_ms, facts, deletion.request_id))
        if deletion.state is not DeletionState.WAITING:
            self._pool.keyring.destroy(database, _scope(deletion.request_id))
            database.conn.execute("UPDATE deletions SET body = NULL WHERE request_id = ?", (deletion.request_id,))

    def _put_names(self, database: "Database", request_id: str, *, names: Sequence[str]) -> None:
        scope = self._pool.keyring.ensure(database, _scope(request_id))
        body = scope.seal("deletions", request_id, column="body", plain=msgspec.msgpack.encode(names))
        database.conn.execute("UPDATE deletions SET body = ? WHERE request_id = ?", (body, request_id))

    def _names(self, database: "Database", request_id: str) -> list[str] | None:
        row = database.conn.execute("SELECT body FROM deletions WHERE request_id = ?", (request_id,)).fetchone()
        if row is None or row[0] is None:
            return None
        scope = self._pool.keyring.find(database, _scope(request_id))
        plain = scope.unseal("deletions", request_id, column="body", sealed=row[0])
        return msgspec.msgpack.decode(plain, type=list[str])


def _scope(request_id: str) -> str:
    return f"deletion/{request_id}"
