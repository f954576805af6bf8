"""One-time invitations: a 128-bit code that lets one device in, kept only as its hash.

Knows no HTTP. The text that a person copies is the shared `Invitation`, one line.
"""

from __future__ import annotations

import hashlib
import secrets
import time

import msgspec

from clawloop_server.errors import FleetError, InvitationError
from clawloop_server.fleet.control import canonical_key
from clawloop_server.hub.devices import Device, Devices, DeviceState
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared.ids import new_id
from clawloop_shared.messages import JoinRequest

DEFAULT_EXPIRES_S = 24 * 3600.0
MAX_EXPIRES_S = 30 * 24 * 3600.0
_MAX_PEM_CHARACTERS = 4096


class InvitationRecord(msgspec.Struct, frozen=True):
    """What the server keeps of an invitation."""

    created_ms: int
    expires_ms: int
    used_ms: int | None
    device_id: str | None


def _hash(code: str) -> bytes:
    return hashlib.sha256(b"clawloop invitation\0" + code.encode()).digest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Invitations:
    """The table of invitations."""

    def __init__(self, database: ServerDatabase) -> None:
        self._database = database
        self._devices = Devices(database)

    def create(self, *, expires_s: float = DEFAULT_EXPIRES_S, now_ms: int | None = None) -> str:
        """A fresh code, valid once and for `expires_s` seconds. It is not stored and cannot be shown again.

        Raises:
            InvitationError: a time that is not in (0, 30 days].
        """
        if not 0 < expires_s <= MAX_EXPIRES_S:
            raise InvitationError(f"an invitation cannot be valid for {expires_s} seconds; give up to 30 days")
        code, now_ms = secrets.token_urlsafe(16), now_ms or _now_ms()
        with self._database.write() as database:
            values = [_hash(code), now_ms, now_ms + int(expires_s * 1000)]
            database.run("INSERT INTO invitations (code_sha256, created_ms, expires_ms) VALUES (?, ?, ?)", values)
        return code

    def redeem(self, request: JoinRequest, *, lines: set[str], now_ms: int | None = None) -> Device:
        """Let the device in and use the code up, in one transaction. Asking again with the same keys gives the same
        device, so that a lost answer does no harm.

        Raises:
            InvitationError: the code is unknown, used or expired, or the device is not one for this server.
            DeviceError: its keys are another device's.
        """
        request = _checked(request, lines)
        now_ms = now_ms or _now_ms()
        with self._database.write() as database:
            row = database.row(
                "SELECT expires_ms, device_id FROM invitations WHERE code_sha256 = ?", [_hash(request.code)]
            )
            if row is None:
                raise InvitationError("this invitation is not known here; ask the operator for a new one")
            if row[1] is not None:
                return self._same_device(row[1], request)
            if row[0] <= now_ms:
                raise InvitationError("this invitation has expired; ask the operator for a new one")
            device = _new_device(request, now_ms)
            self._devices.add(device)
            values = [now_ms, device.device_id, _hash(request.code)]
            database.run("UPDATE invitations SET used_ms = ?, device_id = ? WHERE code_sha256 = ?", values)
        return device

    def _same_device(self, device_id: str, request: JoinRequest) -> Device:
        device = self._devices.get(device_id)
        same = (device.device_key, device.node_key_pem) == (request.device_key, request.node_key_pem)
        if not same or device.state is not DeviceState.JOINED:
            raise InvitationError("this invitation was used; ask the operator for a new one")
        return device

    def all(self) -> list[InvitationRecord]:
        """Every invitation, oldest first."""
        rows = self._database.rows(
            "SELECT created_ms, expires_ms, used_ms, device_id FROM invitations ORDER BY created_ms"
        )
        return [InvitationRecord(*row) for row in rows]


def _new_device(request: JoinRequest, now_ms: int) -> Device:
    return Device(
        device_id=new_id(),
        device_key=request.device_key,
        node_key_pem=request.node_key_pem,
        node_id=None,
        line_id=request.line.line_id,
        state=DeviceState.JOINED,
        adapter_version=0,
        joined_ms=now_ms,
        seen_ms=now_ms,
    )


def _checked(request: JoinRequest, lines: set[str]) -> JoinRequest:
    """The request with its node key in the one spelling that Flower compares, so that a key counts once however it is
    written."""
    if request.line.line_id not in lines:
        served = ", ".join(sorted(lines)) or "none"
        raise InvitationError(
            f"the device serves model line {request.line.line_id}, this server trains {served}; use the same model"
        )
    if len(request.device_key) != 32:
        raise InvitationError(f"the device's key has {len(request.device_key)} bytes, not 32; update the device")
    try:
        return msgspec.structs.replace(request, node_key_pem=canonical_key(request.node_key_pem[:_MAX_PEM_CHARACTERS]))
    except FleetError as error:
        raise InvitationError(f"{error}; update the device") from error
