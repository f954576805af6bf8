"""The devices that were let in, or wait to be: their keys, their model line, their state, and what happened to these.

Knows no HTTP and no Flower; what they sent is the vault's.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_server.errors import DeviceError
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared.signing import key_id

_COLUMNS = (
    "device_id, device_key, node_key_pem, node_id, line_id, state, adapter_version, joined_ms, seen_ms, level, cohort"
    ", approved_ms, held_ms, rival_ms"
)
_RIVAL_NEWS_MS = 3_600_000
"""so often at most it is written down that two edges have a device's keys"""
_SELECT = f"SELECT {_COLUMNS} FROM devices"  # noqa: S608 constant names


class DeviceState(StrEnum):
    """What a device may do."""

    WAITING = "waiting"
    """it joined, and may sync once the operator has approved it"""
    JOINED = "joined"
    """it may sync"""
    LEFT = "left"
    """it said goodbye; what it sent is kept"""
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
    approved_ms: int = 0
    """since when it may sync; 0: it never might"""
    held_ms: int = 0
    """when the edge that has its keys asked how it stands; 0: never"""
    rival_ms: int = 0
    """when an edge was heard that another one with the same keys has taken the place of; 0: never"""

    @property
    def waiting(self) -> bool:
        """Whether the operator must approve it before it may sync."""
        return self.state is DeviceState.WAITING

    def doubled(self, *, now_ms: int) -> bool:
        """Whether two edges have its keys, as was seen within the last hour."""
        return self.state is DeviceState.JOINED and bool(self.rival_ms) and now_ms - self.rival_ms < _RIVAL_NEWS_MS


class DeviceEvent(msgspec.Struct, frozen=True):
    """Something that happened to a device."""

    at_ms: int
    what: str
    detail: str


class Held(msgspec.Struct, frozen=True):
    """Which of the edges with a device's keys serves: whether the one that asked, when that one was heard last, and
    when another."""

    holds: bool
    held_ms: int
    rival_ms: int


def _device(row: tuple[Any, ...]) -> Device:
    facts = dict(zip(_COLUMNS.split(", "), row, strict=True))
    node_id = facts["node_id"]
    facts |= {
        "device_key": facts["device_key"] or b"",
        "node_key_pem": facts["node_key_pem"] or "",
        "node_id": None if node_id is None else int(node_id),
        "state": DeviceState(facts["state"]),
    }
    return Device(**facts)


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
            names = _COLUMNS.split(", ")
            sql = f"INSERT INTO devices ({_COLUMNS}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608 constant names
            database.run(sql, [fields[name] for name in names])
            self._note(device.device_id, "joined", _key_name(device.device_key), at_ms=device.joined_ms)

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

    def apart(self, line_id: str) -> dict[str, str]:
        """The devices of a model line that may sync and are in a cohort, each with its name."""
        sql = "SELECT device_id, cohort FROM devices WHERE line_id = ? AND cohort != '' AND state = ?"
        return dict(self._database.rows(sql, [line_id, DeviceState.JOINED]))

    def set_cohort(self, device_id: str, cohort: str) -> None:
        """Have the device learn with those of a cohort from now on; the empty name: with all that are in none.

        Raises:
            DeviceError: no such device.
        """
        self._change("UPDATE devices SET cohort = ? WHERE device_id = ?", [cohort, device_id])

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
        now_ms = now_ms or _now_ms()
        sql = (
            "UPDATE devices SET adapter_version = ?, seen_ms = ?, level = coalesce(nullif(?, ''), level)"
            " WHERE device_id = ?"
        )
        self._change(sql, [adapter_version, now_ms, level, device_id])

    def approve(self, device_id: str) -> None:
        """Let a device that waits sync.

        Raises:
            DeviceError: no such device, or it does not wait.
        """
        self._decide(device_id, DeviceState.JOINED, what="approved")

    def reject(self, device_id: str) -> None:
        """Do not let a device in that waits.

        Raises:
            DeviceError: no such device, or it does not wait.
        """
        self._decide(device_id, DeviceState.REVOKED, what="rejected")

    def _decide(self, device_id: str, state: DeviceState, *, what: str) -> None:
        with self._database.write() as database:
            found, now_ms = self.get(device_id), _now_ms()
            if found.state is not DeviceState.WAITING:
                raise DeviceError(f"device {device_id} is {found.state} and waits for nothing; see `devices list`")
            approved_ms = now_ms if state is DeviceState.JOINED else 0
            sql = "UPDATE devices SET state = ?, approved_ms = ? WHERE device_id = ?"
            database.run(sql, [state, approved_ms, device_id])
            self._note(device_id, what, _key_name(found.device_key), at_ms=now_ms)

    def revoke(self, device_id: str) -> None:
        """Let the device in no more; what it sent is kept.

        Raises:
            DeviceError: no such device, or it was deleted.
        """
        with self._database.write():
            if self.get(device_id).state is DeviceState.DELETED:
                raise DeviceError(f"device {device_id} was deleted; there is nothing to revoke")
            self._change("UPDATE devices SET state = ? WHERE device_id = ?", [DeviceState.REVOKED, device_id])
            self._note(device_id, "revoked")

    def leave(self, device_id: str) -> None:
        """Note that the device said goodbye; said again it changes nothing. One that was revoked stays that.

        Raises:
            DeviceError: no such device.
        """
        with self._database.write():
            if self.get(device_id).state not in (DeviceState.JOINED, DeviceState.WAITING):
                return
            self._change("UPDATE devices SET state = ? WHERE device_id = ?", [DeviceState.LEFT, device_id])
            self._note(device_id, "left")

    def replace_keys(self, device_id: str, *, device_key: bytes, node_key_pem: str) -> bool:
        """Give the device other keys, all or none; whether they were others. Its old ones are worth nothing from then
        on, and Flower's number of it is taken away until the new one is registered.

        Raises:
            DeviceError: one of them is another device's, or one is new and the other is not.
        """
        with self._database.write() as database:
            found = self.get(device_id)
            if (found.device_key, found.node_key_pem) == (device_key, node_key_pem):
                return False
            if found.device_key == device_key or found.node_key_pem == node_key_pem:
                raise DeviceError("both keys of a device change together; make two new ones")
            sql = "SELECT 1 FROM devices WHERE device_key = ? OR node_key_pem = ?"
            if database.row(sql, [device_key, node_key_pem]):
                raise DeviceError("one of these keys is another device's; make new ones")
            sql = "UPDATE devices SET device_key = ?, node_key_pem = ?, node_id = NULL WHERE device_id = ?"
            database.run(sql, [device_key, node_key_pem, device_id])
            self._note(device_id, "keys rotated", f"{_key_name(found.device_key)} to {_key_name(device_key)}")
        return True

    def hold(self, device_id: str, instance: str, *, takes_at_ms: int, now_ms: int) -> Held:
        """Note that a running edge with this device's keys was heard, and tell which one serves: the one that took it
        last. `takes_at_ms`: when the asker signed that it takes it (0: it does not); an older word takes nothing.
        """
        with self._database.write() as database:
            sql = "SELECT instance, taken_at_ms, held_ms, rival_ms FROM devices WHERE device_id = ?"
            holder, taken_at_ms, held_ms, rival_ms = database.row(sql, [device_id]) or ("", 0, 0, 0)
            if instance == holder or takes_at_ms > taken_at_ms:
                taken_at_ms = taken_at_ms if instance == holder else takes_at_ms
                sql = "UPDATE devices SET instance = ?, taken_at_ms = ?, held_ms = ? WHERE device_id = ?"
                database.run(sql, [instance, taken_at_ms, now_ms, device_id])
                return Held(True, now_ms, rival_ms)
            if not holder or takes_at_ms:
                return Held(False, held_ms, rival_ms)
            database.run("UPDATE devices SET rival_ms = ? WHERE device_id = ?", [now_ms, device_id])
            if now_ms - rival_ms > _RIVAL_NEWS_MS:
                self._note(device_id, "two edges", "a second edge has this device's keys", at_ms=now_ms)
        return Held(False, held_ms, now_ms)

    def events(self, device_id: str) -> list[DeviceEvent]:
        """What happened to a device, oldest first."""
        sql = "SELECT at_ms, what, detail FROM device_events WHERE device_id = ? ORDER BY event_id"
        return [DeviceEvent(*row) for row in self._database.rows(sql, [device_id])]

    def bury(self, device_id: str) -> None:
        """Leave only the id of the device, so that it is known to have been; the vault shreds what it sent.

        Raises:
            DeviceError: no such device.
        """
        with self._database.write() as database:
            self.get(device_id)
            sql = "UPDATE devices SET state = ?, device_key = NULL, node_key_pem = NULL, instance = ''"
            database.run(f"{sql} WHERE device_id = ?", [DeviceState.DELETED, device_id])
            database.run("DELETE FROM device_events WHERE device_id = ?", [device_id])
            self._note(device_id, "deleted")

    def _note(self, device_id: str, what: str, detail: str = "", *, at_ms: int | None = None) -> None:
        sql = "INSERT INTO device_events (device_id, at_ms, what, detail) VALUES (?, ?, ?, ?)"
        self._database.run(sql, [device_id, _now_ms() if at_ms is None else at_ms, what, detail])

    def _change(self, sql: str, values: list[Any]) -> None:
        with self._database.write() as database:
            if database.run(sql, values) != 1:
                raise DeviceError(f"no device {values[-1]}; `clawloop-server devices list` shows them")


def _key_name(public: bytes) -> str:
    return f"key {key_id(public)}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
