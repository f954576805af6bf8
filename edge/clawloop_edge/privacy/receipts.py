"""The chain of consent receipts: each one signed by the device's key and naming the one before. Format:
docs/formats/outbox.md. Knows what a receipt is, not what it allows.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.ladder import Ladder, Rung
from clawloop_edge.privacy.schema import chain
from clawloop_shared import signing
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database

DOMAIN = "consent-receipt"
_DEVICE_KEY = "device.key"
_ALL = "SELECT receipt_id, body FROM receipts ORDER BY seq"


class Recipient(msgspec.Struct, frozen=True):
    """The server that a device joined. Empty: none is named."""

    url: str = ""
    key: bytes = b""


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="receipt.v1"):
    """One decision of the device's owner (after ISO/IEC TS 27560 and Kantara's consent receipt).

    `level` holds for what was kept after the change `after_seq`; what was kept before it leaves at most as the rungs of
    `earlier` say. `previous_sha256` is the hash of the signed receipt before it; empty for the first.
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
    earlier: list[Rung] = []

    @property
    def ladder(self) -> Ladder:
        """What it allows of what was kept when."""
        earlier = self.earlier if self.earlier or not self.after_seq else [Rung(0, Level.OFF)]
        return Ladder.of([*earlier, Rung(self.after_seq, self.level)])


class SignedReceipt(msgspec.Struct, frozen=True):
    """A receipt as it was signed (JSON, sorted keys) and the device's Ed25519 signature."""

    payload: bytes
    signature: bytes

    @property
    def sha256(self) -> str:
        """What the next receipt names as its predecessor."""
        return sha256(self.payload + self.signature)


def device_key(pool: Pool) -> bytes:
    """The Ed25519 private key (32 bytes) that is this device's name to the server; made on first use. Waits."""

    def operation(database: "Database") -> bytes:
        found = read_state(database, pool.keyring, name=_DEVICE_KEY)
        if found is None:
            found = signing.new_key()
            write_state(database, pool.keyring, name=_DEVICE_KEY, value=found)
        return found

    return pool.get_state(_DEVICE_KEY) or pool.submit(operation).result()


class ReceiptChain:
    """The receipts in a pool. Its methods work inside any transaction or snapshot."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def latest(self, database: "Database") -> Receipt | None:
        """The decision that was made last; None if none was ever made.

        Raises:
            SignatureInvalid: it is not one that this device signed.
            ConsentError: this device's key is gone, so it cannot be checked.
        """
        signed = self._latest(database)
        return None if signed is None else self._open(database, signed)

    def last_sha256(self, database: "Database") -> str:
        """What the next receipt must name; empty for the first."""
        signed = self._latest(database)
        return "" if signed is None else signed.sha256

    def append(self, database: "Database", receipt: Receipt, *, private: bytes) -> None:
        """Sign and keep a receipt. Needs a write transaction."""
        payload = msgspec.json.encode(receipt, order="sorted")
        signed = SignedReceipt(payload, signing.sign(private, DOMAIN, payload=payload))
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("receipts", receipt.receipt_id, column="body", plain=msgspec.msgpack.encode(signed))
        insert = "INSERT INTO receipts (receipt_id, body) VALUES (?, ?)"
        database.conn.execute(insert, (receipt.receipt_id, body))
        chain(database, self._pool, kind="receipt", record_id=receipt.receipt_id, body=body)

    def all(self, database: "Database") -> Iterator[Receipt]:
        """All receipts, oldest first, with signatures and chain checked.

        Raises:
            SignatureInvalid: a receipt was not signed by this device.
            ConsentError: a receipt is missing from the chain.
        """
        previous = ""
        for receipt_id, body in database.conn.execute(_ALL):
            signed = self._unseal(database, receipt_id, body)
            receipt = self._open(database, signed)
            if receipt.previous_sha256 != previous:
                raise ConsentError(f"the receipt before {receipt_id} is missing or changed; set the level again")
            previous = signed.sha256
            yield receipt

    def _latest(self, database: "Database") -> SignedReceipt | None:
        row = database.conn.execute(f"{_ALL} DESC LIMIT 1").fetchone()
        return None if row is None else self._unseal(database, *row)

    def _unseal(self, database: "Database", receipt_id: str, body: bytes) -> SignedReceipt:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        plain = scope.unseal("receipts", receipt_id, column="body", sealed=body)
        return msgspec.msgpack.decode(plain, type=SignedReceipt)

    def _open(self, database: "Database", signed: SignedReceipt) -> Receipt:
        private = read_state(database, self._pool.keyring, name=_DEVICE_KEY)
        if private is None:
            raise ConsentError("this device's key is gone, so its consent cannot be checked; set the level again")
        public = signing.public_key(private)
        signing.verify(public, DOMAIN, payload=signed.payload, signature=signed.signature)
        return msgspec.json.decode(signed.payload, type=Receipt)
