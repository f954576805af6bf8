"""Who allowed what, when, and to whom: signed receipts in a chain. The level is read from the database at each use, so
that one process may lower it while another uploads. Format: docs/formats/outbox.md.

Off is the default, and what everything doubtful means: an expired receipt, another server, a changed policy text.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.policy import DATA, POLICY_VERSION, VALID_MS, policy_sha256, policy_text
from clawloop_edge.privacy.schema import prepare, purge_queue
from clawloop_shared import signing
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database

DOMAIN = "consent-receipt"
PURPOSES = ["improve the model that this device uses"]
_DEVICE_KEY = "device.key"
_RECIPIENT = "consent.recipient"


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Recipient(msgspec.Struct, frozen=True):
    """The server that a device joined. Empty: none is named."""

    url: str = ""
    key: bytes = b""


class Receipt(msgspec.Struct, frozen=True, kw_only=True, tag="receipt.v1"):
    """One decision of the device's owner (after ISO/IEC TS 27560 and Kantara's consent receipt).

    Steps and signals up to the change `after_seq` were kept before the level was raised, and do not leave under it.
    `previous_sha256` is the hash of the signed receipt before it; empty for the first.
    """

    receipt_id: str
    level: Level
    device_key: bytes
    recipient: Recipient
    purposes: list[str]
    data: list[str]
    policy_version: int
    policy_sha256: str
    given_ms: int
    expires_ms: int
    after_seq: int
    previous_sha256: str


class SignedReceipt(msgspec.Struct, frozen=True):
    """A receipt as it was signed (JSON, sorted keys) and the device's Ed25519 signature."""

    payload: bytes
    signature: bytes

    @property
    def sha256(self) -> str:
        """What the next receipt names as its predecessor."""
        return sha256(self.payload + self.signature)


class ConsentState(msgspec.Struct, frozen=True):
    """What holds now. `level` obeys `chosen` unless `reason` tells why it is off."""

    level: Level
    chosen: Level
    reason: str
    receipt: Receipt | None


def device_key(pool: Pool) -> bytes:
    """The Ed25519 private key (32 bytes) that is this device's name to the server; made on first use. Waits."""

    def operation(database: "Database") -> bytes:
        found = read_state(database, pool.keyring, name=_DEVICE_KEY)
        if found is None:
            found = signing.new_key()
            write_state(database, pool.keyring, name=_DEVICE_KEY, value=found)
        return found

    return pool.get_state(_DEVICE_KEY) or pool.submit(operation).result()


class ConsentLog:
    """The chain of receipts in a pool, and the level that follows from it."""

    def __init__(self, pool: Pool, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._clock = pool, clock
        prepare(pool)

    def level(self) -> Level:
        """What may leave now. Cheap; reads the database each time."""
        return self.state().level

    def state(self) -> ConsentState:
        """What may leave now, and why."""
        with self._pool.read() as database:
            return self.state_in(database)

    def state_in(self, database: "Database") -> ConsentState:
        """The same inside a transaction or snapshot.

        Raises:
            SignatureInvalid: the latest receipt is not one that this device signed; nothing may leave.
        """
        row = database.conn.execute("SELECT receipt_id, body FROM receipts ORDER BY seq DESC LIMIT 1").fetchone()
        if row is None:
            return ConsentState(Level.OFF, Level.OFF, "never asked", None)
        receipt = self._open(self._unseal(database, *row), database)
        reason = self._doubt(receipt, database)
        return ConsentState(Level.OFF if reason else receipt.level, receipt.level, reason, receipt)

    def set_level(self, level: Level) -> Receipt:
        """Write down the owner's decision. It holds at once: what waits in the outbox is destroyed when less may leave
        than before, and what was kept before more may leave stays at home. Waits for the disk.

        Raises:
            ConsentError: the level is not built yet.
        """
        policy_text(level)
        private = device_key(self._pool)
        return self._pool.submit(lambda database: self._append(database, level, private=private)).result()

    def set_recipient(self, recipient: Recipient) -> None:
        """Name the server that this device has joined. A receipt that names another one no longer holds. Waits."""
        self._pool.set_state(_RECIPIENT, msgspec.msgpack.encode(recipient)).result()

    def receipts(self) -> list[Receipt]:
        """All receipts, oldest first, after checking signatures and chain.

        Raises:
            SignatureInvalid: a receipt was not signed by this device.
            ConsentError: a receipt is missing from the chain.
        """
        found, previous = [], ""
        with self._pool.read() as database:
            for receipt_id, body in database.conn.execute("SELECT receipt_id, body FROM receipts ORDER BY seq"):
                signed = self._unseal(database, receipt_id, body)
                receipt = self._open(signed, database)
                if receipt.previous_sha256 != previous:
                    raise ConsentError(f"the receipt before {receipt_id} is missing or changed; set the level again")
                previous = signed.sha256
                found.append(receipt)
        return found

    def _append(self, database: "Database", level: Level, *, private: bytes) -> Receipt:
        before = self.state_in(database)
        continues = before.level.sends_steps and level.rank <= before.level.rank
        last = database.conn.execute("SELECT receipt_id, body FROM receipts ORDER BY seq DESC LIMIT 1").fetchone()
        receipt = Receipt(
            receipt_id=new_id(),
            level=level,
            device_key=signing.public_key(private),
            recipient=self._recipient(database),
            purposes=PURPOSES if level is not Level.OFF else [],
            data=DATA[level],
            policy_version=POLICY_VERSION,
            policy_sha256=policy_sha256(level),
            given_ms=self._clock(),
            expires_ms=self._clock() + VALID_MS,
            after_seq=before.receipt.after_seq if continues and before.receipt else _last_seq(database),
            previous_sha256=self._unseal(database, *last).sha256 if last else "",
        )
        payload = msgspec.json.encode(receipt, order="sorted")
        signed = SignedReceipt(payload, signing.sign(private, DOMAIN, payload=payload))
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("receipts", receipt.receipt_id, column="body", plain=msgspec.msgpack.encode(signed))
        insert = "INSERT INTO receipts (receipt_id, body) VALUES (?, ?)"
        database.conn.execute(insert, (receipt.receipt_id, body))
        if level.rank < before.level.rank or not before.level.sends_steps:
            purge_queue(database, self._pool.keyring)
        return receipt

    def _doubt(self, receipt: Receipt, database: "Database") -> str:
        """Why a receipt no longer holds; empty if it does."""
        if receipt.level is Level.OFF:
            return ""
        if self._clock() >= receipt.expires_ms:
            return "the consent is over a year old"
        if receipt.recipient.key != self._recipient(database).key:
            return "the consent was given for another server"
        if receipt.policy_sha256 != policy_sha256(receipt.level):
            return "what the level means has changed"
        return ""

    def _recipient(self, database: "Database") -> Recipient:
        found = read_state(database, self._pool.keyring, name=_RECIPIENT)
        return msgspec.msgpack.decode(found, type=Recipient) if found else Recipient()

    def _unseal(self, database: "Database", receipt_id: str, body: bytes) -> SignedReceipt:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        plain = scope.unseal("receipts", receipt_id, column="body", sealed=body)
        return msgspec.msgpack.decode(plain, type=SignedReceipt)

    def _open(self, signed: SignedReceipt, database: "Database") -> Receipt:
        private = read_state(database, self._pool.keyring, name=_DEVICE_KEY)
        if private is None:
            raise ConsentError("this device's key is gone, so its consent cannot be checked; set the level again")
        public = signing.public_key(private)
        signing.verify(public, DOMAIN, payload=signed.payload, signature=signed.signature)
        return msgspec.json.decode(signed.payload, type=Receipt)


def _last_seq(database: "Database") -> int:
    row = database.conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'changes'").fetchone()
    return row[0] if row else 0
