"""What is too large for a message: items of devices that come in parts, and files of adapters that devices fetch.

    PUT /v1/blobs/SHA256                     a part, signed by its device; the answer says how far the server is
    GET /v1/blobs/SHA256?device&expires&sig  a file of a released adapter, in ranges, by an address that the hub made

Parts lie sealed under their device's own key in blobs/, 0600, one file an item, until the item is whole; then the vault
gets it like any other. An item is counted whole, as one of what its device may send in an hour, before any byte is
taken. Nothing in a request names a file: names here are keyed hashes (`vault.parts`), those of adapters are looked up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from clawloop_server.errors import DeviceError
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Device, DeviceState
from clawloop_server.vault.intake import MAX_ITEM_BYTES
from clawloop_server.vault.parts import part_name, parts_folder
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared import wire
from clawloop_shared.blobs import (
    MAX_PART_REQUEST_BYTES,
    PART_BYTES,
    BlobPart,
    BlobState,
    PartHead,
    check_address,
    claimed_sender,
    open_part,
)
from clawloop_shared.deltas import DELTA_KIND
from clawloop_shared.errors import ClawloopError, SignatureInvalid, StorageError, WireError
from clawloop_shared.files import private_folder, publish_secret, sha256
from clawloop_shared.messages import ItemReceipt, ItemReceived, UploadItem

_log = logging.getLogger(__name__)

SKEW_MS = 300_000
_HEAD = struct.Struct(">II")
"""before each sealed part: its length unsealed, and sealed"""
_MAX_ITEMS = 4
"""of one device that may be incomplete"""
_MAX_DONE = 16
_STALE_S = 7 * 86_400.0
_DONE = ".done"
_OVER = "this device sends more than [fleet] items_per_hour or mib_per_hour; go on later"
_UNPROVEN = "this part is not signed by a device that may sync here"


class Vault(Protocol):
    """Where a whole item goes."""

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        """Keep it."""
        ...


class BlobDesk:
    """Takes parts, and lets files be found."""

    def __init__(
        self,
        folder: Path,
        vault: Vault,
        *,
        device: Callable[[str], Device],
        seal: Callable[[str], DeviceSeal],
        sign: Callable[[ItemReceived], ItemReceipt],
        files: Callable[[str], Path | None],
        address_key: bytes,
        max_bytes: int,
        admit: Callable[[str, int], float] = lambda device_id, size_bytes: 0.0,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`seal`: that of a device that may send (DeviceError: it may not); `files`: the file of a released adapter
        that has a hash; `max_bytes`: of one item, and of all that one device has incomplete; `admit`: counts an item of
        a device and its bytes as taken, or says for how many seconds it is not to be taken (called in the loop)."""
        self._folder, self._vault, self._device, self._seal = private_folder(folder), vault, device, seal
        self._sign, self._files, self._key = sign, files, address_key
        self._max_bytes, self._admit, self._now_s = max_bytes, admit, now_s
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._whole = asyncio.Lock()
        """one item at a time is put together: it is in memory then"""

    def sweep(self) -> int:
        """Remove what was begun long ago and never ended; how many files."""
        count = 0
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # it was ended, or forgotten, meanwhile
                if self._now_s() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
                    count += 1
        return count

    # files for devices

    async def find(self, name: str, query: str) -> Path | None:
        """The file of that hash, if the address is good and its device may sync; None: there is nothing here."""
        try:
            device_id = check_address(name, query, now_s=self._now_s(), key=self._key)
            device = await asyncio.to_thread(self._device, device_id)
        except (SignatureInvalid, DeviceError) as error:
            _log.info("an address of a file was refused: %s", error)
            return None
        if device.state is not DeviceState.JOINED:
            return None
        return await asyncio.to_thread(self._files, name)

    # parts of devices

    async def answer(self, name: str, body: bytes) -> DeskAnswer:
        """Take one part."""
        try:
            part = wire.decode(body, BlobPart, max_bytes=MAX_PART_REQUEST_BYTES)
            device = await asyncio.to_thread(self._device, claimed_sender(part))
            head = open_part(part, device.device_key)
        except (DeviceError, SignatureInvalid):
            return DeskAnswer(403, message=_UNPROVEN)
        except (WireError, RecursionError) as error:
            return DeskAnswer(400, message=str(error))
        if device.state is not DeviceState.JOINED:
            return DeskAnswer(403, message=_UNPROVEN)
        return self._refusal(name, head) or await self._take(head, part.data)

    def _refusal(self, name: str, head: PartHead) -> DeskAnswer | None:
        behind_ms = int(1000 * self._now_s()) - head.at_ms
        if head.sha256 != name:
            return DeskAnswer(400, message="the part is of another item than the address names")
        if abs(behind_ms) > SKEW_MS:
            return DeskAnswer(
                400, message=f"this part was signed {behind_ms // 1000} s before the clock here; set yours"
            )
        most = self._max_bytes if head.kind == DELTA_KIND else min(self._max_bytes, MAX_ITEM_BYTES)
        if head.size_bytes > most:
            return DeskAnswer(413, message=f"such an item may have {most} bytes, this one has {head.size_bytes}")
        return None

    async def _take(self, head: PartHead, data: bytes) -> DeskAnswer:
        async with self._locks[head.device_id]:
            try:
                partial = await asyncio.to_thread(self._open, head)
                if partial.is_new and data:
                    wait_s = self._admit(head.device_id, head.size_bytes)
                    if wait_s > 0:
                        return DeskAnswer(429, message=_OVER, retry_after_s=math.ceil(wait_s))
                    await asyncio.to_thread(self._make_room, partial.path.parent, head)
                state = await asyncio.to_thread(partial.add, data) if partial.state is None else partial.state
                if state.receipt is None and state.offset == head.size_bytes:
                    async with self._whole:
                        return await asyncio.to_thread(self._finish, partial)
            except DeviceError:
                return DeskAnswer(403, message=_UNPROVEN)
            except WireError as error:
                return DeskAnswer(400, message=str(error))
            except (ClawloopError, OSError) as error:
                _log.error("a part of device %s could not be kept: %s", head.device_id, error)
                return DeskAnswer(503, message="the server cannot keep this now; send it again", retry_after_s=10)
        return DeskAnswer(200, wire.encode(state))

    def _open(self, head: PartHead) -> _Partial:
        seal = self._seal(head.device_id)
        return _Partial(private_folder(parts_folder(self._folder, seal)), head, seal)

    def _make_room(self, folder: Path, head: PartHead) -> None:
        """Of what this device has begun, the oldest gives way: it can send that anew."""
        begun = sorted((p for p in folder.iterdir() if p.suffix != _DONE), key=lambda p: p.stat().st_mtime)
        room = self._max_bytes - head.size_bytes
        while begun and (len(begun) >= _MAX_ITEMS or sum(p.stat().st_size for p in begun) > room):
            begun.pop(0).unlink()

    def _finish(self, partial: _Partial) -> DeskAnswer:
        """Put the item together, hand it on, and remember the receipt in case the answer is lost."""
        head = partial.head
        body = partial.whole()
        if sha256(body) != head.sha256:
            partial.path.unlink()
            return DeskAnswer(409, message="the parts together are not the item that was named; it must be sent anew")
        item = UploadItem(head.item_id, head.receipt_id, head.kind, body)
        (received,) = self._vault.receive(head.device_id, [item])
        state = BlobState(head.size_bytes, self._sign(received))
        done = partial.keep_receipt(state)
        others = sorted(done.parent.glob(f"*{_DONE}"), key=lambda p: p.stat().st_mtime)
        for old in others[:-_MAX_DONE]:
            old.unlink()
        _log.info("device %s sent an item of %d bytes in parts", head.device_id, head.size_bytes)
        return DeskAnswer(200, wire.encode(state))


class _Partial:
    """The file of one item: its parts so far, each sealed by itself. What a crash left half written is cut off."""

    def __init__(self, folder: Path, head: PartHead, seal: DeviceSeal) -> None:
        self.head, self._seal = head, seal
        name = part_name(seal, item_id=head.item_id, sha256=head.sha256, size_bytes=head.size_bytes)
        self.path, self._name = folder / name, name.encode()
        self.state: BlobState | None = None
        with contextlib.suppress(FileNotFoundError):
            sealed = self.path.with_suffix(_DONE).read_bytes()
            self.state = wire.decode(seal.unseal("blobs", self._name, sealed=sealed), BlobState)
        self.is_new = self.state is None and not self.path.exists()
        """whether nothing of it came yet"""

    def add(self, data: bytes) -> BlobState:
        """Keep the part if it is the next one; how far it is now, on the disk."""
        if not data and not self.path.exists():
            return BlobState(0)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "r+b") as file:
            count, offset, end = self._walk(file.fileno())
            if not data or self.head.offset != offset:
                return BlobState(offset)
            wanted = min(PART_BYTES, self.head.size_bytes - offset)
            if len(data) != wanted:
                raise WireError(f"a part of {len(data)} bytes at {offset}; it must have {wanted}")
            sealed = self._seal.seal("blobs", self._key(count), plain=data)
            file.truncate(end)
            file.seek(end)
            file.write(_HEAD.pack(len(data), len(sealed)) + sealed)
            file.flush()
            os.fsync(file.fileno())
            return BlobState(offset + len(data))

    def keep_receipt(self, state: BlobState) -> Path:
        """It is with the vault: only the receipt stays, sealed."""
        done = self.path.with_suffix(_DONE)
        publish_secret(done, self._seal.seal("blobs", self._name, plain=wire.encode(state)))
        self.path.unlink()
        return done

    def whole(self) -> bytes:
        """All that was kept, unsealed.

        Raises:
            StorageError: it was changed on the disk.
        """
        parts = list[bytes]()
        with self.path.open("rb") as file:
            while head := file.read(_HEAD.size):
                _, sealed_bytes = _HEAD.unpack(head)
                parts.append(self._seal.unseal("blobs", self._key(len(parts)), sealed=file.read(sealed_bytes)))
        return b"".join(parts)

    def _walk(self, handle: int) -> tuple[int, int, int]:
        """How many whole parts there are, their bytes unsealed, and where in the file they end."""
        size, count, offset, end = os.fstat(handle).st_size, 0, 0, 0
        while len(head := os.pread(handle, _HEAD.size, end)) == _HEAD.size:
            plain_bytes, sealed_bytes = _HEAD.unpack(head)
            if end + _HEAD.size + sealed_bytes > size:
                break
            count, offset, end = count + 1, offset + plain_bytes, end + _HEAD.size + sealed_bytes
        if offset > self.head.size_bytes:
            raise StorageError(f"{self.path} is longer than its item; remove it")
        return count, offset, end

    def _key(self, number: int) -> bytes:
        return self._name + number.to_bytes(4, "big")
