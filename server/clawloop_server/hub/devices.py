"""The devices that were let in: their keys, their model line, their state.

Knows no HTTP and no Flower; what they sent is the vault's.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_server.errors import DeviceError
from clawloop_server.vault.database import ServerDatabase

_COLUMNS = (
    "device_id, device_key, node_key_pem, node_id, line_id, state, adapter_version, joined_ms, seen_ms, level, cohort"
)
_SELECT = f"SELECT {_COLUMNS} FROM devices"  # noqa: S608 constant names


class DeviceState(StrEnum):
    """What a device may do."""

    JOINED = "joined"
    """it may sync"""
    REVOKED = "revoked"
    """it may not; what it sent is kept"""
    DELETED = "deleted"
    """it may not, and what it sent was shredded; only its id is left"""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device. `node_id` is its number in Flower's SuperLink, None until it is registered there."""

    device_id: str
    device_key: bytes
    node_key_pem: str
    node_id: int | None
    line_id: str
    state: DeviceState
    adapter_version: int
    joined_ms: int
    seen_ms: int
    level: str = ""
    """what it last said that it lets out; empty: it never did"""
    cohort: str = ""
    """which devices it learns with; empty: all that are in no other"""


def _device(row: tuple[Any, ...]) -> Device:
    device_id, key, pem, node_id, line_id, state, version, joined_ms, seen_ms, level, cohort = row
    return Device(
        device_id=device_id,
        device_key=key or b"",
        node_key_pem=pem or "",
        node_id=None if node_id is None else int(node_id),
        line_id=line_id,
        state=DeviceState(state),
        adapter_version=version,
        joined_ms=joined_ms,
        seen_ms=seen_ms,
        level=level,
        cohort=cohort,
    )


class Devices:
    """The table of devices."""

    def __init__(self, database: ServerDatabase) -> None:
        self._database = database

    def add(self, device: Device) -> None:
        """Let a device in.

        Raises:
            DeviceError: one of its keys is another device's.
        """
        with self._database.write() as database:
            taken = database.row(
                "SELECT device_id FROM devices WHERE device_key = ? OR node_key_pem = ?",
                [device.device_key, device.node_key_pem],
            )
            if taken:
                raise DeviceError(f"a key of this device is already that of device {taken[0]}; make new keys")
            node_id = None if device.node_id is None else str(device.node_id)  # uint64 does not fit SQLite's integer
            fields = {**msgspec.structs.asdict(device), "node_id": node_id}
            sql = f"INSERT INTO devices ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 constant names
            database.run(sql, [fields[name] for name in _COLUMNS.split(", ")])

    def all(self) -> list[Device]:
        """Every device, oldest first."""
        return [_device(row) for row in self._database.rows(f"{_SELECT} ORDER BY joined_ms, device_id")]

    def get(self, device_id: str) -> Device:
        """The device of that id.

        Raises:
            DeviceError: there is none.
        """
        row = self._database.row(f"{_SELECT} WHERE device_id = ?", [device_id])
        if row is None:
            raise DeviceError(f"no device {device_id}; `clawloop-server devices list` shows them")
        return _device(row)

    def by_node(self, node_id: int) -> Device | None:
        """The device that Flower knows by this number."""
        row = self._database.row(f"{_SELECT} WHERE node_id = ?", [str(node_id)])
        return _device(row) if row else None

    def count_joined(self, line_id: str) -> int:
        """How many devices of a model line may sync."""
        sql = "SELECT count(*) FROM devices WHERE state = ? AND line_id = ?"
        return self._database.count(sql, [DeviceState.JOINED, line_id])

    def set_node(self, device_id: str, node_id: int | None) -> None:
        """Note the device's number in Flower (None: it is registered no more)."""
        value = None if node_id is None else str(node_id)
        self._change("UPDATE devices SET node_id = ? WHERE device_id = ?", [value, device_id])

    def mark_seen(self, device_id: str, adapter_version: int, *, level: str = "", now_ms: int | None = None) -> None:
        """Note that the device answered, which adapter it uses, and what it lets out if it said so."""
        now_ms = now_ms or time.time_ns() // 1_000_000
        sql = (
            "UPDATE devices SET adapter_version = ?, seen_ms = ?, level = coalesce(nullif(?, ''), level)"
            " WHERE device_id = ?"
        )
        self._change(sql, [adapter_version, now_ms, level, device_id])

    def revoke(self, device_id: str) -> None:
        """Let the device in no more; what it sent is kept.

        Raises:
            DeviceError: no such device, or it was deleted.
        """
        if self.get(device_id).state is DeviceState.DELETED:
            raise DeviceError(f"device {device_id} was deleted; there is nothing to revoke")
        self._change("UPDATE devices SET state = ? WHERE device_id = ?", [DeviceState.REVOKED, device_id])

    def bury(self, device_id: str) -> None:
        """Leave only the id of the device, so that it is known to have been; the vault shreds what it sent.

        Raises:
            DeviceError: no such device.
        """
        self.get(device_id)
        sql = "UPDATE devices SET state = ?, device_key = NULL, node_key_pem = NULL WHERE device_id = ?"
        self._change(sql, [DeviceState.DELETED, device_id])

    def _change(self, sql: str, values: list[Any]) -> None:
        with self._database.write() as database:
            if database.run(sql, values) != 1:
                raise DeviceError(f"no device {values[-1]}; `clawloop-server devices list` shows them")
