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
from clawloop_edge.privacy.policy import as_meant
from clawloop_edge.privacy.schema import chain
from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid
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

    With a `doubt` it is no decision of the owner: the device took the level `doubted` back by itself, because of that.
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
    doubt: str = ""
    doubted: Level = Level.OFF

    @property
    def chosen(self) -> Level:
        """What the owner decided last."""
        return self.doubted if self.doubt else self.level

    @property
    def ladder(self) -> Ladder:
        """What it allows of what was kept when."""
        earlier = self.earlier if self.earlier or not self.after_seq else [Rung(0, Level.OFF)]
        return as_meant(Ladder.of([*earlier, Rung(self.after_seq, self.level)]), self.policy_version)


class SignedReceipt(msgspec.Struct, frozen=True):
    """A receipt as it was signed (JSON, sorted keys) and the device's Ed25519 signature."""

    payload: bytes
    signature: bytes

    @property
    def sha256(self) -> str:
        """What the next receipt names as its predecessor."""
        return sha256(self.payload + self.signature)


def device_key(pool: Pool) -> bytes:
    """The Ed25519 private key (32 bytes) that signs this owner's decisions; made on first use. Waits."""

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
        self._insert(database, receipt.receipt_id, signed)

    def _insert(self, database: "Database", receipt_id: str, signed: SignedReceipt) -> None:
        scope = self._pool.keyring.find(database, POOL_SCOPE)
        body = scope.seal("receipts", receipt_id, column="body", plain=msgspec.msgpack.encode(signed))
        insert = "INSERT INTO receipts (receipt_id, body) VALUES (?, ?)"
        database.conn.execute(insert, (receipt_id, body))
        chain(database, self._pool, kind="receipt", record_id=receipt_id, body=body)

    def take_over(self, other: "ReceiptChain") -> bool:
        """Have the receipts of another pool that go on from where these end, signatures unchecked. Waits for the disk.

        False, and nothing is taken, if they are no such receipts.
        """
        with self._pool.read() as database:
            here = list(self._signed(database))
        with other._pool.read() as database:
            there = list(other._signed(database))
        if [signed for _, signed in here] != [signed for _, signed in there[: len(here)]]:
            return False

        def operation(database: "Database") -> None:
            for receipt_id, signed in there[len(here) :]:
                self._insert(database, receipt_id, signed)

        self._pool.submit(operation).result()
        return True

    def all(self, database: "Database") -> Iterator[Receipt]:
        """All receipts, oldest first, with signatures and chain checked.

        Raises:
            SignatureInvalid: a receipt was not signed by the key that it names, or the last one not by this device's.
            ConsentError: a receipt is missing from the chain.
        """
        self.latest(database)  # of this device's key; it vouches for those before it, also of a key that was lost
        previous = ""
        for receipt_id, signed in self._signed(database):
            receipt = _open(signed, _claimed_key(signed))
            if receipt.previous_sha256 != previous:
                raise ConsentError(f"the receipt before {receipt_id} is missing or changed; set the level again")
            previous = signed.sha256
            yield receipt

    def _signed(self, database: "Database") -> Iterator[tuple[str, SignedReceipt]]:
        for receipt_id, body in database.conn.execute(_ALL):
            yield receipt_id, self._unseal(database, receipt_id, body)

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
        try:
            return _open(signed, signing.public_key(private))
        except SignatureInvalid as error:
            raise SignatureInvalid(
                "the latest consent was not signed with this device's key, so it allows nothing; set the level again"
            ) from error


class _Claim(msgspec.Struct, frozen=True):
    device_key: bytes


def _claimed_key(signed: SignedReceipt) -> bytes:
    """The key that a receipt says it was signed with, unproven."""
    return msgspec.json.decode(signed.payload, type=_Claim).device_key


def _open(signed: SignedReceipt, public: bytes) -> Receipt:
    """Raises SignatureInvalid: not signed by this key."""
    signing.verify(public, DOMAIN, payload=signed.payload, signature=signed.signature)
    return msgspec.json.decode(signed.payload, type=Receipt)
