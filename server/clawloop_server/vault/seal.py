"""One device's key in the vault: what it seals, and the keyed names under which its records are found again.

Destroying the wrapped key shreds all that the device sent. Format: docs/formats/vault.md. Knows no database.
"""

from __future__ import annotations

import hashlib
import hmac

from clawloop_shared.envelope import derive_key, new_data_key, seal, unseal, unwrap_key, wrap_key

NAME_BYTES = 16


def _key_aad(vault_id: str, device_id: str) -> bytes:
    return f"vault-key.v1|{vault_id}|{device_id}".encode()


class DeviceSeal:
    """Seals, opens and names the records of one device."""

    def __init__(self, data_key: bytes, *, vault_id: str, device_id: str) -> None:
        self.device_id = device_id
        self._vault_id = vault_id
        self._key = data_key
        self._name_key = derive_key(data_key, "vault names")

    @classmethod
    def new(cls, *, vault_id: str, device_id: str) -> DeviceSeal:
        """A seal under a fresh key."""
        return cls(new_data_key(), vault_id=vault_id, device_id=device_id)

    @classmethod
    def unwrap(cls, wrapped: bytes, master_key: bytes, *, vault_id: str, device_id: str) -> DeviceSeal:
        """The seal whose key was wrapped.

        Raises:
            StorageError: another master key, or the key of another device.
        """
        key = unwrap_key(master_key, wrapped, aad=_key_aad(vault_id, device_id))
        return cls(key, vault_id=vault_id, device_id=device_id)

    def wrap(self, master_key: bytes) -> bytes:
        """The key under the master key, bound to this vault and device."""
        return wrap_key(master_key, self._key, aad=_key_aad(self._vault_id, self.device_id))

    def name(self, kind: str, text: str) -> bytes:
        """The keyed hash under which a name of the device's own is stored (16 bytes)."""
        return self._mac(f"{kind}\0{text}".encode())[:NAME_BYTES]

    def digest(self, data: bytes) -> bytes:
        """The keyed hash of a record's bytes, which tells a repeat from a change (16 bytes)."""
        return self._mac(b"record\0" + data)[:NAME_BYTES]

    def _mac(self, data: bytes) -> bytes:
        return hmac.new(self._name_key, data, hashlib.sha256).digest()

    def _aad(self, table: str, key: bytes) -> bytes:
        return f"vault.v1|{table}|{self._vault_id}|{self.device_id}|{key.hex()}".encode()

    def seal(self, table: str, key: bytes, *, plain: bytes) -> bytes:
        """`plain`, readable only as that row of that table."""
        return seal(self._key, plain, aad=self._aad(table, key))

    def unseal(self, table: str, key: bytes, *, sealed: bytes) -> bytes:
        """What `seal` was given.

        Raises:
            StorageError: moved from another row, or changed.
        """
        return unseal(self._key, sealed, aad=self._aad(table, key))
