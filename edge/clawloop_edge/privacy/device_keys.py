"""The private keys by which servers know this device, one pair a membership: so that two servers cannot tell that it is
the same device, and so that what was sent to a server that was left can still be deleted.

A pair is found by the device's name at its server. Kept sealed, and kept after leaving. Sends nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.privacy.receipts import device_key
from clawloop_shared import signing
from clawloop_shared.errors import KeyMissing

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

_KEYS = "device.keys"
ROTATING, GOODBYES = "device.rotating", "membership.goodbyes"
"""names of what is not known to be done yet: a rotation, and goodbyes"""


class DeviceKeys(msgspec.Struct, frozen=True, tag="device-keys.v1"):
    """What a device proves itself with: an Ed25519 key (32 bytes) for requests and an EC P-384 key (PEM) for Flower.
    Both private."""

    device_key: bytes
    node_key_pem: str

    def __repr__(self) -> str:
        return f"DeviceKeys({signing.key_id(self.public)})"

    @property
    def public(self) -> bytes:
        """The public half of the device key: what six words are compared of."""
        return signing.public_key(self.device_key)

    @property
    def node_public_pem(self) -> str:
        """The public half of the node key.

        Raises:
            KeyMissing: it is no EC key.
        """
        key = serialization.load_pem_private_key(self.node_key_pem.encode(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise KeyMissing("the node key is no EC key; leave and join again")
        public = key.public_key()
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def new_keys() -> DeviceKeys:
    """A fresh pair."""
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return DeviceKeys(signing.new_key(), pem.decode())


def keys_in(database: Database, pool: Pool) -> dict[str, DeviceKeys]:
    """All pairs by device id, inside any transaction or snapshot."""
    raw = read_state(database, pool.keyring, name=_KEYS)
    return msgspec.msgpack.decode(raw, type=dict[str, DeviceKeys]) if raw else {}


def keep_in(database: Database, pool: Pool, *, device_id: str, keys: DeviceKeys) -> None:
    """Have these be the device's keys there. Needs a write transaction."""
    kept = keys_in(database, pool) | {device_id: keys}
    write_state(database, pool.keyring, name=_KEYS, value=msgspec.msgpack.encode(kept))


def request_key(pool: Pool, device_id: str) -> bytes:
    """The private key to sign requests of that device with: its own pair's, or the one that older versions had for all
    servers."""
    with pool.read() as database:
        found = keys_in(database, pool).get(device_id)
    return found.device_key if found else device_key(pool)


def take_over(pool: Pool, other: Pool) -> None:
    """Have the keys of another pool, whose place this one takes, and what that had begun with them: they are the later
    ones, and perhaps the only ones that a server still knows. Waits for the disk."""
    with other.read() as database:
        later = keys_in(database, other)
        begun = {name: read_state(database, other.keyring, name=name) for name in (ROTATING, GOODBYES)}

    def operation(database: Database) -> None:
        kept = keys_in(database, pool) | later
        write_state(database, pool.keyring, name=_KEYS, value=msgspec.msgpack.encode(kept))
        for name, value in begun.items():
            if value:
                write_state(database, pool.keyring, name=name, value=value)

    if later or any(begun.values()):
        pool.submit(operation).result()
