"""The devices' keys in the vault, each wrapped by the master key: found, made, destroyed.

A device without a key has nothing in the vault. What a key does is in `seal`.
"""

from __future__ import annotations

from clawloop_server.errors import DeviceError
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal


class DeviceSeals:
    """The table of keys."""

    def __init__(self, database: ServerDatabase, master_key: bytes) -> None:
        self._database, self._master_key = database, master_key

    def get(self, device_id: str) -> DeviceSeal | None:
        """The seal of a device, or of a secure sum of devices; None if it has none.

        Raises:
            StorageError: the key does not open.
        """
        row = self._database.row(
            "SELECT wrapped FROM device_secrets WHERE device_id = ?1"
            " UNION ALL SELECT wrapped FROM secure_sums WHERE sum_id = ?1 AND wrapped IS NOT NULL",
            [device_id],
        )
        if row is None:
            return None
        vault_id = self._database.vault_id
        return DeviceSeal.unwrap(row[0], self._master_key, vault_id=vault_id, device_id=device_id)

    def open(self, device_id: str) -> DeviceSeal:
        """The seal of a device that has sent something.

        Raises:
            DeviceError: it has none.
            StorageError: the key does not open.
        """
        seal = self.get(device_id)
        if seal is None:
            raise DeviceError(f"device {device_id} has no key in the vault; it sent nothing, or was deleted")
        return seal

    def ensure(self, device_id: str) -> DeviceSeal:
        """The seal of a device that may send; made if it has none. Part of the transaction that is open.

        Raises:
            DeviceError: the device is unknown, revoked or deleted.
        """
        row = self._database.row("SELECT state FROM devices WHERE device_id = ?", [device_id])
        if row is None or row[0] != "joined":
            raise DeviceError(f"device {device_id} is {row[0] if row else 'unknown'}; nothing of it is kept")
        seal = self.get(device_id)
        if seal is None:
            seal = DeviceSeal.new(vault_id=self._database.vault_id, device_id=device_id)
            self._database.run("INSERT INTO device_secrets VALUES (?, ?)", [device_id, seal.wrap(self._master_key)])
        return seal

    def make_for_sum(self, sum_id: str) -> DeviceSeal:
        """The seal of a secure sum that is done; destroyed with the first of its members. Part of the transaction that
        is open."""
        seal = DeviceSeal.new(vault_id=self._database.vault_id, device_id=sum_id)
        self._database.run("UPDATE secure_sums SET wrapped = ? WHERE sum_id = ?", [seal.wrap(self._master_key), sum_id])
        return seal

    def destroy(self, device_id: str) -> None:
        """Shred all that is under the device's key. Part of the transaction that is open."""
        self._database.run("DELETE FROM device_secrets WHERE device_id = ?", [device_id])
