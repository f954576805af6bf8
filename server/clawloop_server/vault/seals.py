"""The devices' keys in the vault: found, made, destroyed. The database has none of them.

Each is wrapped by the master key and lies in a file of its own, so that an older copy of the database does not open
what a device had sent that was deleted since. The database knows which key is the one (`vault_keys`): a row comes after
its file is on disk, and a file goes after its row was marked dead. Secure sums have keys likewise. What a key does is
in `seal`. Format: docs/formats/vault.md.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from clawloop_server.errors import DeviceError, HomeError
from clawloop_server.home import Home, read_secret
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared.errors import StorageError
from clawloop_shared.files import private_folder, publish_secret, sync_folder

_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_DRAFT = re.compile(rf"\.{_ID.pattern}\.[0-9a-f]{{8}}")
_MOVED, _SCRUBBED = "moved", "scrubbed"


def forget_keys(database: ServerDatabase, owners: str, values: list[str]) -> None:
    """Mark the keys of these devices or sums (a condition on `owner_id`) as dead: nothing opens with them from now on,
    and `DeviceSeals.bury` takes their files away. Part of the transaction that is open."""
    database.run(f"UPDATE vault_keys SET digest = NULL WHERE {owners}", values)  # noqa: S608 constant text


class DeviceSeals:
    """The keys of one vault, in the folder `keys/devices` beside its database."""

    def __init__(self, database: ServerDatabase, master_key: bytes) -> None:
        self._database, self._master_key = database, master_key
        self._folder = Home(database.path.parent).device_keys

    def get(self, device_id: str) -> DeviceSeal | None:
        """The seal of a device, or of a secure sum of devices; None if it has none.

        Raises:
            StorageError: the key is not there, another one, or does not open.
        """
        sql = "SELECT digest FROM vault_keys WHERE owner_id = ? AND digest IS NOT NULL"
        row = self._database.row(sql, [device_id])
        if row is None:
            return None
        path = self._path(device_id)
        try:
            wrapped = read_secret(path)
        except HomeError as error:
            if path.exists():
                raise StorageError(str(error)) from error
            raise _not_there(path, device_id) from error
        if _digest(wrapped) != row[0]:
            raise _not_there(path, device_id)
        vault_id = self._database.vault_id
        return DeviceSeal.unwrap(wrapped, self._master_key, vault_id=vault_id, device_id=device_id)

    def open(self, device_id: str) -> DeviceSeal:
        """The seal of a device that has sent something.

        Raises:
            DeviceError: it has none.
            StorageError: the key is not there, another one, or does not open.
        """
        seal = self.get(device_id)
        if seal is None:
            raise DeviceError(f"device {device_id} has no key in the vault; it sent nothing, or was deleted")
        return seal

    def ensure(self, device_id: str) -> DeviceSeal:
        """The seal of a device that may send; made if it has none. Part of the transaction that is open, which must not
        be one that has deleted the device's key: its file would be gone if that is rolled back.

        Raises:
            DeviceError: the device is unknown, revoked or deleted.
            StorageError: its key is not there, or cannot be written.
        """
        row = self._database.row("SELECT state FROM devices WHERE device_id = ?", [device_id])
        if row is None or row[0] != "joined":
            raise DeviceError(f"device {device_id} is {row[0] if row else 'unknown'}; nothing of it is kept")
        return self.get(device_id) or self._make(device_id)

    def make_for_sum(self, sum_id: str) -> DeviceSeal:
        """The seal of a secure sum that is done; destroyed with the first of its members. Part of the transaction that
        is open.

        Raises:
            StorageError: it cannot be written.
        """
        return self._make(sum_id)

    def bury(self) -> None:
        """Take away the files of the keys that are dead. Not part of another transaction: what is dead must stay dead.

        Raises:
            StorageError: a file cannot be removed; it is tried again when the server starts.
        """
        dead = "SELECT owner_id FROM vault_keys WHERE digest IS NULL"
        if self._database.row(f"{dead} LIMIT 1") is None:
            return
        with self._database.write() as database:  # meanwhile nobody makes a key anew
            self._remove([self._path(owner_id) for (owner_id,) in database.rows(dead)])
            database.run("DELETE FROM vault_keys WHERE digest IS NULL")

    def tidy(self) -> None:
        """What a crash left: dead keys, and files of devices that are deleted or unknown. Where a server starts.

        Raises:
            StorageError: a file cannot be removed.
        """
        self.bury()
        if not self._folder.is_dir():
            return
        with self._database.write() as database:
            known = {owner_id for (owner_id,) in database.rows("SELECT owner_id FROM vault_keys")}
            names = [path.name for path in self._folder.iterdir()]
            ours = [name for name in names if _DRAFT.fullmatch(name) or (_ID.fullmatch(name) and name not in known)]
            self._remove([self._folder / name for name in ours])

    def move_out(self) -> None:
        """Move the keys of a database of before there were files out of it, and empty its log. Done once.

        Raises:
            StorageError: a key cannot be written, or the log is being read.
        """
        sql = "SELECT value FROM meta WHERE name = 'device keys'"
        if self._database.row(sql) == (_SCRUBBED,):
            return
        with self._database.write() as database:
            if database.row(sql) is None:
                found = database.rows(
                    "SELECT device_id, wrapped FROM device_secrets UNION ALL"
                    " SELECT sum_id, wrapped FROM secure_sums WHERE wrapped IS NOT NULL"
                )
                for owner_id, wrapped in found:
                    self._keep(owner_id, wrapped)
                database.run("DELETE FROM device_secrets")
                database.run("UPDATE secure_sums SET wrapped = NULL WHERE wrapped IS NOT NULL")
                database.run("INSERT INTO meta VALUES ('device keys', ?)", [_MOVED if found else _SCRUBBED])
                if not found:
                    return
        self._database.scrub()
        with self._database.write() as database:
            database.run("UPDATE meta SET value = ? WHERE name = 'device keys'", [_SCRUBBED])

    def _make(self, owner_id: str) -> DeviceSeal:
        seal = DeviceSeal.new(vault_id=self._database.vault_id, device_id=owner_id)
        self._keep(owner_id, seal.wrap(self._master_key))
        return seal

    def _keep(self, owner_id: str, wrapped: bytes) -> None:
        path = self._path(owner_id)
        if not self._folder.is_dir():
            try:
                sync_folder(private_folder(self._folder).parent)
            except OSError as error:
                raise StorageError(f"cannot make {self._folder}: {error.strerror}; check that it is yours") from error
        publish_secret(path, wrapped)
        sql = "INSERT INTO vault_keys VALUES (?, ?) ON CONFLICT (owner_id) DO UPDATE SET digest = excluded.digest"
        self._database.run(sql, [owner_id, _digest(wrapped)])

    def _path(self, owner_id: str) -> Path:
        if not _ID.fullmatch(owner_id):
            raise StorageError(f"{owner_id!r:.60} is no id that this server made, so no file is named by it")
        return self._folder / owner_id

    def _remove(self, paths: list[Path]) -> None:
        if not paths or not self._folder.is_dir():
            return
        try:
            for path in paths:
                path.unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"cannot remove a key from {self._folder}: {error.strerror}; run it again") from error


def _digest(wrapped: bytes) -> bytes:
    return hashlib.sha256(wrapped).digest()


def _not_there(path: Path, owner_id: str) -> StorageError:
    return StorageError(
        f"the key that {path} had when this server.db was written is gone, and with it what {owner_id} had sent; "
        f"restore keys/ and server.db of one moment, or run: clawloop-server devices delete {owner_id}"
    )
