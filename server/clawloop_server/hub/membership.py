"""What a member may ask of the hub itself: how it stands, to have other keys, to leave.

Each request is signed by the device that it is of, names when it was signed, and is counted. Standing is told at any
time of the asker's clock, since it is how a device learns that its clock is wrong; what changes something is not.
Knows no HTTP beyond the status that an answer should have, and Flower only by a function.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from clawloop_server.errors import DeviceError, FleetError
from clawloop_server.fleet.control import canonical_key
from clawloop_server.hub.allowance import Allowance
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Device, Devices, DeviceState, Held
from clawloop_shared import wire
from clawloop_shared.errors import ClawloopError, KeyMissing, SignatureInvalid, WireError
from clawloop_shared.membership import (
    LEAVE_DOMAIN,
    LEFT_DOMAIN,
    MAX_MEMBER_BYTES,
    ROTATED_DOMAIN,
    STANDING_ANSWER_DOMAIN,
    STANDING_DOMAIN,
    LeaveReceipt,
    LeaveRequest,
    RotateReceipt,
    RotateRequest,
    SignedRotation,
    Stand,
    Standing,
    StandingRequest,
    claimed_device,
    open_request,
    open_rotation,
    sign_answer,
)
from clawloop_shared.messages import SignedAnswer, SignedRequest

_log = logging.getLogger(__name__)

SKEW_MS = 300_000
PER_MINUTE = 30.0
"""questions of one device how it stands, and as many at once; and the same of requests that change something"""
_UNPROVEN = "this request is not signed by a device that this server knows"

T = TypeVar("T", bound=msgspec.Struct)
Register = Callable[[str], Awaitable[int]]
"""has Flower let in the key that a device has now, and no other of it; Flower's number of it, which is noted"""


class MemberDesk:
    """Answers members, each about itself."""

    def __init__(
        self,
        devices: Devices,
        *,
        register: Register,
        release_key: bytes,
        statement: Callable[[], SignedAnswer],
        per_minute: float = PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`release_key`: the private key for answers; `statement`: the root key's word for it."""
        self._devices, self._register = devices, register
        self._release_key, self._statement = release_key, statement
        self._asking = Allowance(per_minute, clock=clock)
        self._changing = Allowance(per_minute, clock=clock)
        self._now_ms = now_ms

    async def standing(self, body: bytes) -> DeskAnswer:
        """How the device stands, and whether it is the edge that asks that serves."""
        return await self._answered(self._standing, body)

    async def rotate(self, body: bytes) -> DeskAnswer:
        """Other keys for the device. Asked again by the same request, the answer is the same."""
        return await self._answered(self._rotate, body)

    async def leave(self, body: bytes) -> DeskAnswer:
        """The device is a member no more. Asked again, the answer is the same."""
        return await self._answered(self._leave, body)

    async def _answered(self, do: Callable[[bytes], Awaitable[DeskAnswer]], body: bytes) -> DeskAnswer:
        try:
            return await do(body)
        except (SignatureInvalid, KeyMissing):
            return DeskAnswer(403, message=_UNPROVEN)
        except (WireError, RecursionError) as error:
            return DeskAnswer(400, message=str(error))
        except DeviceError as error:
            return DeskAnswer(409, message=str(error))
        except ClawloopError as error:
            _log.error("a member could not be answered: %s", error)
            return DeskAnswer(503, message="the server cannot do this now; ask again", retry_after_s=5)

    async def _standing(self, body: bytes) -> DeskAnswer:
        device, request = await self._opened(body, STANDING_DOMAIN, StandingRequest)
        wait_s = self._asking.take(device.device_id, 1)
        if wait_s:
            return _too_many(wait_s)
        answer = await asyncio.to_thread(self._stand, device, request)
        return self._signed(answer, STANDING_ANSWER_DOMAIN)

    def _stand(self, device: Device, request: StandingRequest) -> Standing:
        now_ms = self._now_ms()
        held = Held(False, now_ms, 0)  # an old word (one that was played again, or a wrong clock) says nothing of today
        if device.state is DeviceState.JOINED and abs(now_ms - request.at_ms) <= SKEW_MS:
            takes_at_ms = request.at_ms if request.takes else 0
            held = self._devices.hold(device.device_id, request.instance, takes_at_ms=takes_at_ms, now_ms=now_ms)
        return Standing(
            device_id=device.device_id,
            instance=request.instance,
            at_ms=now_ms,
            state=Stand(device.state.value),
            holds=held.holds,
            held_ms=held.held_ms,
            rival_ms=held.rival_ms,
            statement=self._statement(),
        )

    async def _rotate(self, body: bytes) -> DeskAnswer:
        signed = wire.decode(body, SignedRotation, max_bytes=MAX_MEMBER_BYTES)
        device = await self._device(signed.payload)
        request = open_rotation(signed, device.device_key)
        refusal = self._refusal(device, request.at_ms)
        if refusal is not None:
            return refusal
        if device.state not in (DeviceState.JOINED, DeviceState.WAITING):
            return DeskAnswer(403, message=f"this device is {device.state} and needs no other keys")
        return await self._replace(device, request)

    async def _replace(self, device: Device, request: RotateRequest) -> DeskAnswer:
        try:
            node_key_pem = canonical_key(request.node_key_pem)
        except FleetError as error:
            return DeskAnswer(400, message=str(error))
        replace = self._devices.replace_keys
        changed = await asyncio.to_thread(
            replace, device.device_id, device_key=request.device_key, node_key_pem=node_key_pem
        )
        if changed:
            _log.info("device %s has new keys", device.device_id)
        receipt = RotateReceipt(
            request_id=request.request_id,
            device_id=device.device_id,
            device_key=request.device_key,
            node_id=await self._registered(device),
            at_ms=self._now_ms(),
        )
        return self._signed(receipt, ROTATED_DOMAIN)

    async def _registered(self, device: Device) -> int:
        """Flower's number of the new key; 0 if Flower is not there: the hub's look registers it then."""
        if device.state is not DeviceState.JOINED:
            return 0
        try:
            return await self._register(device.device_id)
        except FleetError as error:
            _log.warning("the new key of device %s is not registered yet: %s", device.device_id, error)
            return 0

    async def _leave(self, body: bytes) -> DeskAnswer:
        device, request = await self._opened(body, LEAVE_DOMAIN, LeaveRequest)
        refusal = self._refusal(device, request.at_ms)
        if refusal is not None:
            return refusal
        await asyncio.to_thread(self._devices.leave, device.device_id)
        _log.info("device %s has left", device.device_id)
        receipt = LeaveReceipt(request_id=request.request_id, device_id=device.device_id, at_ms=self._now_ms())
        return self._signed(receipt, LEFT_DOMAIN)

    async def _opened(self, body: bytes, domain: str, kind: type[T]) -> tuple[Device, T]:
        signed = wire.decode(body, SignedRequest, max_bytes=MAX_MEMBER_BYTES)
        device = await self._device(signed.payload)
        return device, open_request(signed, domain, kind=kind, public_key=device.device_key)

    async def _device(self, payload: bytes) -> Device:
        """The device that a request says it is of. One that was deleted has no key, so nothing it says can be checked.

        Raises:
            SignatureInvalid: there is no such device, or not any more.
        """
        try:
            device = await asyncio.to_thread(self._devices.get, claimed_device(payload))
        except DeviceError as error:
            raise SignatureInvalid(_UNPROVEN) from error
        if device.state is DeviceState.DELETED:
            raise SignatureInvalid(_UNPROVEN)
        return device

    def _refusal(self, device: Device, at_ms: int) -> DeskAnswer | None:
        behind_ms = self._now_ms() - at_ms
        if abs(behind_ms) > SKEW_MS:
            told = f"this request was signed {behind_ms / 1000:.0f} s ago by this server's clock"
            return DeskAnswer(400, message=f"{told}, which may be {SKEW_MS // 1000}; set the clock and sign it anew")
        wait_s = self._changing.take(device.device_id, 1)
        return _too_many(wait_s) if wait_s else None

    def _signed(self, answer: msgspec.Struct, domain: str) -> DeskAnswer:
        return DeskAnswer(200, wire.encode(sign_answer(answer, domain, private_key=self._release_key)))


def _too_many(wait_s: int) -> DeskAnswer:
    return DeskAnswer(429, message="too many requests of this device", retry_after_s=wait_s)
