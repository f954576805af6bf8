"""Forgetting at a device's word: whose request it is, how fresh it is and how many came is checked; the vault deletes.

A device that may sync no more may still ask: what it sent is its owner's. Of one that was deleted no key is left to
check a request with, so whoever asks is told that nothing of it is here. Answers are signed by the release key, so that
the owner can prove them. Knows no HTTP beyond the status that an answer should have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from clawloop_server.errors import DeviceError, VaultError
from clawloop_server.hub.allowance import Allowance
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Device, DeviceState
from clawloop_shared import wire
from clawloop_shared.errors import ClawloopError, SignatureInvalid, WireError
from clawloop_shared.messages import MAX_FORGET_BYTES, ForgetReceipt, ForgetRequest, SignedRequest
from clawloop_shared.receipts import claimed_device, claimed_forget, open_forget, sign_forgotten

_log = logging.getLogger(__name__)

SKEW_MS = 300_000
PER_MINUTE = 30.0
"""requests of one device, and as many at once; one of 10,000 ids counts as eleven"""
_IDS_PER_REQUEST = 1000
_UNPROVEN = "this request is not signed by a device that this server knows"


class Records(Protocol):
    """Where what devices sent is kept."""

    def forget(self, request: ForgetRequest) -> ForgetReceipt:
        """Delete what is asked for; asked again, answer the same.

        Raises:
            VaultError: another request of this device had this id.
            StorageError: it is not all gone from the disk; ask again.
        """
        ...

    def delete_device(self, device_id: str) -> object:
        """Shred all that a device sent; harmless where nothing of it is left.

        Raises:
            StorageError: it is not all gone from the disk.
        """
        ...


class ForgetDesk:
    """Answers forget requests, one at a time."""

    def __init__(
        self,
        records: Records,
        *,
        device: Callable[[str], Device],
        release_key: bytes,
        per_minute: float = PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """`device`: the device of an id (DeviceError: there is none); `release_key`: the private key for answers."""
        self._records, self._device, self._release_key = records, device, release_key
        self._allowance = Allowance(per_minute, clock=clock)
        self._now_ms = now_ms
        self._one = asyncio.Lock()

    async def answer(self, body: bytes) -> DeskAnswer:
        """The answer to one request."""
        try:
            signed = wire.decode(body, SignedRequest, max_bytes=MAX_FORGET_BYTES)
            device = await asyncio.to_thread(self._device, claimed_device(signed))
            deleted = device.state is DeviceState.DELETED
            request = claimed_forget(signed) if deleted else open_forget(signed, device.device_key)
        except (DeviceError, SignatureInvalid):
            return DeskAnswer(403, message=_UNPROVEN)
        except (WireError, RecursionError) as error:
            return DeskAnswer(400, message=str(error))
        return self._refusal(request) or await self._forget(request, device_deleted=deleted)

    def _refusal(self, request: ForgetRequest) -> DeskAnswer | None:
        """Why a request that is the device's own is not done; None if it is."""
        behind_ms = self._now_ms() - request.at_ms
        if abs(behind_ms) > SKEW_MS:
            told = f"this request was signed {behind_ms / 1000:.0f} s ago by this server's clock"
            return DeskAnswer(400, message=f"{told}, which may be {SKEW_MS // 1000}; set the clock and sign it anew")
        if not request.everything and not request.record_ids:
            return DeskAnswer(400, message="this request names nothing to forget")
        wait_s = self._allowance.take(request.device_id, 1 + len(request.record_ids) / _IDS_PER_REQUEST)
        if wait_s:
            return DeskAnswer(429, message="too many forget requests of this device", retry_after_s=wait_s)
        return None

    async def _forget(self, request: ForgetRequest, *, device_deleted: bool) -> DeskAnswer:
        device_id, do = request.device_id, self._nothing_left if device_deleted else self._records.forget
        try:
            async with self._one:
                receipt = await asyncio.to_thread(do, request)
        except VaultError as error:
            return DeskAnswer(409, message=str(error))
        except ClawloopError as error:
            _log.error("device %s: what it asked to forget is not all gone yet: %s", device_id, error)
            return DeskAnswer(503, message="the server cannot forget this now; ask again", retry_after_s=10)
        what = "everything" if request.everything else f"{len(request.record_ids)} names"
        _log.info(
            "device %s asked to forget %s: %d records deleted, %d names unknown; adapters that had learned: %s",
            device_id,
            what,
            receipt.deleted,
            receipt.unknown,
            ", ".join(map(str, receipt.adapters)) or "none",
        )
        return DeskAnswer(200, wire.encode(sign_forgotten(receipt, self._release_key)))

    def _nothing_left(self, request: ForgetRequest) -> ForgetReceipt:
        """The word that nothing of a deleted device is here, once that is so: its deletion may have ended halfway."""
        self._records.delete_device(request.device_id)
        return ForgetReceipt(
            request_id=request.request_id,
            device_id=request.device_id,
            deleted=0,
            unknown=len(request.record_ids),
            adapters=[],
            at_ms=self._now_ms(),
            device_deleted=True,
        )
