"""One-time invitations: a 128-bit code that lets one device in, kept only as its hash.

Knows no HTTP. The text that a person copies is the shared `Invitation`, one line.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import unicodedata
from enum import StrEnum

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
_MAX_LABEL = 100
_ID_DIGITS = 12


class InvitationState(StrEnum):
    """What an invitation is good for."""

    OPEN = "open"
    """it lets one device in"""
    USED = "used"
    """it let one in"""
    EXPIRED = "expired"
    """its time is over"""
    REVOKED = "revoked"
    """the operator took it back"""


class InvitationRecord(msgspec.Struct, frozen=True):
    """What the server keeps of an invitation. `invitation_id` is the beginning of its code's hash."""

    invitation_id: str
    created_ms: int
    expires_ms: int
    used_ms: int | None
    device_id: str | None
    label: str = ""
    revoked_ms: int | None = None

    def state(self, now_ms: int) -> InvitationState:
        """What it is good for at that time."""
        if self.device_id is not None:
            return InvitationState.USED
        if self.revoked_ms is not None:
            return InvitationState.REVOKED
        return InvitationState.EXPIRED if self.expires_ms <= now_ms else InvitationState.OPEN


def _hash(code: str) -> bytes:
    return hashlib.sha256(b"clawloop invitation\0" + code.encode()).digest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Invitations:
    """The table of invitations."""

    def __init__(self, database: ServerDatabase) -> None:
        self._database = database
        self._devices = Devices(database)

    def create(self, *, expires_s: float = DEFAULT_EXPIRES_S, label: str = "", now_ms: int | None = None) -> str:
        """A fresh code, valid once and for `expires_s` seconds. It is not stored and cannot be shown again. `label` is
        for the operator alone.

        Raises:
            InvitationError: a time that is not in (0, 30 days], or a label that is no line of text.
        """
        if not 0 < expires_s <= MAX_EXPIRES_S:
            raise InvitationError(f"an invitation cannot be valid for {expires_s} seconds; give up to 30 days")
        if len(label) > _MAX_LABEL or any(unicodedata.category(c).startswith("C") for c in label):
            raise InvitationError(f"a label is one line of at most {_MAX_LABEL} characters, not {label[:40]!r}")
        code, now_ms = secrets.token_urlsafe(16), now_ms or _now_ms()
        with self._database.write() as database:
            sql = "INSERT INTO invitations (code_sha256, created_ms, expires_ms, label) VALUES (?, ?, ?, ?)"
            database.run(sql, [_hash(code), now_ms, now_ms + int(expires_s * 1000), label])
        return code

    def revoke(self, invitation_id: str, *, now_ms: int | None = None) -> InvitationRecord:
        """Take back an invitation that nobody used; its beginning is enough of its id.

        Raises:
            InvitationError: there is none of that id, or several, or it was used.
        """
        with self._database.write() as database:
            found = [each for each in self.all() if invitation_id and each.invitation_id.startswith(invitation_id)]
            if len(found) != 1:
                how = "no invitation" if not found else "several invitations"
                raise InvitationError(f"{how} {invitation_id}; `clawloop-server invitations list` shows them")
            if found[0].device_id is not None:
                raise InvitationError(
                    f"invitation {found[0].invitation_id} let device {found[0].device_id} in; "
                    f"`clawloop-server devices revoke {found[0].device_id}` puts it out"
                )
            revoked_ms = found[0].revoked_ms or now_ms or _now_ms()
            sql = "UPDATE invitations SET revoked_ms = ? WHERE substr(lower(hex(code_sha256)), 1, ?) = ?"
            database.run(sql, [revoked_ms, _ID_DIGITS, found[0].invitation_id])
        return msgspec.structs.replace(found[0], revoked_ms=revoked_ms)

    def redeem(
        self, request: JoinRequest, *, lines: set[str], approve: bool = False, now_ms: int | None = None
    ) -> Device:
        """Let the device in, or have it wait to be approved, and use the code up, in one transaction. Asking again with
        the same keys gives the same device, so that a lost answer does no harm.

        Raises:
            InvitationError: the code is unknown, used or expired, or the device is not one for this server.
            DeviceError: its keys are another device's.
        """
        request = _checked(request, lines)
        now_ms = now_ms or _now_ms()
        with self._database.write() as database:
            row = database.row(
                "SELECT expires_ms, device_id, revoked_ms FROM invitations WHERE code_sha256 = ?", [_hash(request.code)]
            )
            if row is None:
                raise InvitationError("this invitation is not known here; ask the operator for a new one")
            if row[1] is not None:
                return self._same_device(row[1], request)
            if row[2] is not None:
                raise InvitationError("the operator took this invitation back; ask for a new one")
            if row[0] <= now_ms:
                raise InvitationError("this invitation has expired; ask the operator for a new one")
            device = _new_device(request, now_ms, approve=approve)
            self._devices.add(device)
            values = [now_ms, device.device_id, _hash(request.code)]
            database.run("UPDATE invitations SET used_ms = ?, device_id = ? WHERE code_sha256 = ?", values)
        return device

    def _same_device(self, device_id: str, request: JoinRequest) -> Device:
        device = self._devices.get(device_id)
        same = (device.device_key, device.node_key_pem) == (request.device_key, request.node_key_pem)
        if not same or device.state not in (DeviceState.JOINED, DeviceState.WAITING):
            raise InvitationError("this invitation was used; ask the operator for a new one")
        return device

    def all(self) -> list[InvitationRecord]:
        """Every invitation, oldest first."""
        rows = self._database.rows(
            "SELECT substr(lower(hex(code_sha256)), 1, ?), created_ms, expires_ms, used_ms, device_id, label,"
            " revoked_ms FROM invitations ORDER BY created_ms, code_sha256",
            [_ID_DIGITS],
        )
        return [InvitationRecord(*row) for row in rows]


def invitation_id(code: str) -> str:
    """The id of the invitation with that code."""
    return _hash(code).hex()[:_ID_DIGITS]


def _new_device(request: JoinRequest, now_ms: int, *, approve: bool) -> Device:
    return Device(
        device_id=new_id(),
        device_key=request.device_key,
        node_key_pem=request.node_key_pem,
        node_id=None,
        line_id=request.line.line_id,
        state=DeviceState.WAITING if approve else DeviceState.JOINED,
        adapter_version=0,
        joined_ms=now_ms,
        seen_ms=now_ms,
        approved_ms=0 if approve else now_ms,
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
