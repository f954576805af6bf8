"""What each device is asked next: the difference between what it should have and what it told.

Holds only what can be asked again (versions told, receipts to hand over, messages under way). What counts is on disk
before it is acknowledged: the vault's items, the registry's releases. Knows no Flower and no socket.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.errors import ClawloopError, WireError
from clawloop_shared.messages import (
    ADAPTER,
    LEARN,
    MAX_PAYLOAD_BYTES,
    SECURE,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    ItemReceipt,
    ItemReceived,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
)

_log = logging.getLogger(__name__)

_MAX_BACK_OFF_S = 60.0
_OVERDUE_S = 30.0
_MAX_ITEMS = 1024
"""of one answer that are taken: their receipts fit one small message. The others come again, as long as they wait"""
_MAX_VERSION = 1 << 31
"""no server releases as many; a number that a device made up must not reach the database"""


class DispatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How often devices are asked, and how long a question stands."""

    upload_every_s: float = 15.0
    status_every_s: float = 300.0
    max_upload_bytes: int = 8 << 20
    ttl_s: float = 120.0
    adapter_ttl_s: float = 600.0
    refused_again_s: float = 3600.0
    """after a device refused a version, how long until it is offered that one again"""


class Vault(Protocol):
    """Where what devices send is kept."""

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        """Keep the items; what can be said of each that is on disk now."""
        ...


class Releases(Protocol):
    """Which adapter devices should have."""

    def current_version(self) -> int:
        """The released version; 0 if there is none."""
        ...

    def offer(self, version: int) -> AdapterOffer:
        """That version with its manifest and files."""
        ...


class Members(Protocol):
    """Which nodes are devices that may sync."""

    def device_of(self, node_id: int) -> str | None:
        """The device id of a node, or None if it may not sync (unknown, revoked, deleted)."""
        ...

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        """A device answered."""
        ...

    def cohort(self) -> int:
        """How many devices may sync."""
        ...


class Tasks(Protocol):
    """What devices are asked to learn at home. Called in threads."""

    def due(self, device_id: str, *, adapter_version: int) -> LearnTask | None:
        """What that device should be asked to learn now; None: nothing, or it has answered."""
        ...

    def answered(self, device_id: str, reply: LearnReply) -> None:
        """Keep whether it will."""
        ...


class Sums(Protocol):
    """Secure sums that are under way. Called in threads."""

    def due(self, device_id: str) -> SecureRequest | None:
        """What that device is to be asked now; None: nothing, or it has answered."""
        ...

    def answered(self, device_id: str, reply: SecureReply) -> None:
        """Keep its part.

        Raises:
            ClawloopError: it is none.
        """
        ...


class NoTasks:
    """No learning at home, no secure sums."""

    def due(self, device_id: str, *, adapter_version: int = 0) -> None:
        """Nothing, ever."""

    def answered(self, device_id: str, reply: LearnReply | SecureReply) -> None:
        """Nobody was asked."""


class _Device:
    """What is known of one device since the hub started."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.under_way: dict[str, float] = {}
        self.version: int | None = None
        self.refused: dict[int, float] = {}
        self.offered = 0
        self.status_due_s = self.upload_due_s = float("-inf")
        self.receipts: list[ItemReceipt] = []
        self.told = 0
        self.failures = 0
        self.asked_due_s: dict[str, float] = {}
        """when a kind of question that failed may be asked again"""


class Dispatcher:
    """The `FleetPort` of a real hub."""

    def __init__(
        self,
        *,
        vault: Vault,
        releases: Releases,
        members: Members,
        sign: Callable[[ItemReceived], ItemReceipt],
        tasks: Tasks | None = None,
        sums: Sums | None = None,
        settings: DispatchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sign`: makes the server's word of what it has on disk."""
        self._tasks, self._sums = tasks or NoTasks(), sums or NoTasks()
        self._vault, self._releases, self._members, self._sign = vault, releases, members, sign
        self._settings, self._clock = settings or DispatchSettings(), clock
        self._devices: dict[int, _Device] = {}
        self._known_nodes: dict[int, str] = {}
        self._offer: tuple[int, bytes] = (0, b"")
        self._news = asyncio.Event()

    @property
    def online(self) -> list[str]:
        """Device ids that the bridge reported last."""
        return list(self._known_nodes.values())

    def notify(self) -> None:
        """Something was released: look at once. (Call from the hub's loop.)"""
        self._news.set()

    async def connected(self) -> None:
        """Forget what an earlier bridge had under way."""
        for device in self._devices.values():
            device.under_way.clear()

    async def wait(self, timeout_s: float) -> None:
        """Until news, the next upload of a device that is there, or `timeout_s`."""
        there = (self._devices[node_id] for node_id in self._known_nodes if node_id in self._devices)
        asked = (d for d in there if d.version is not None and UPLOAD not in d.under_way)
        due_s = min((d.upload_due_s for d in asked), default=float("inf"))
        timeout_s = min(timeout_s, max(due_s - self._clock(), 0.01))
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    async def work(self, online: list[NodeInfo]) -> list[Outgoing]:
        """What each device should be asked now."""
        out: list[Outgoing] = []
        released = await asyncio.to_thread(self._releases.current_version)
        self._known_nodes = known = await asyncio.to_thread(self._known, online)
        for node_id, device_id in known.items():
            device = self._devices.setdefault(node_id, _Device(device_id))
            out += await self._for_device(node_id, device, released)
        return out

    async def reply(self, reply: Reply) -> None:
        """Keep what a device answered. What cannot be read or kept is that device's failure alone: it is not
        acknowledged, and asked for again later."""
        device = self._devices.get(reply.node_id)
        if device is None:
            return
        device.under_way.pop(reply.type, None)
        if reply.error:
            self._failed(device, reply.type, reply.error)
            return
        try:
            await self._take(device, reply)
            device.failures = 0
        except RecursionError:
            self._failed(device, reply.type, "its answer is nested too deeply")
        except ClawloopError as error:
            _log.error("what device %s sent could not be kept", device.device_id)
            self._failed(device, reply.type, str(error))

    def _known(self, online: list[NodeInfo]) -> dict[int, str]:
        found = {node.node_id: self._members.device_of(node.node_id) for node in online}
        return {node_id: device_id for node_id, device_id in found.items() if device_id is not None}

    async def _for_device(self, node_id: int, device: _Device, released: int) -> list[Outgoing]:
        now_s, settings = self._clock(), self._settings
        device.under_way = {kind: until for kind, until in device.under_way.items() if until > now_s}
        out = []
        if STATUS not in device.under_way and now_s >= device.status_due_s:
            device.status_due_s = now_s + settings.status_every_s
            cohort = await asyncio.to_thread(self._members.cohort)
            out.append(self._send(node_id, STATUS, StatusRequest(cohort=cohort)))
        if self._wants(device, released):
            out += await self._offering(node_id, device, released)
        if UPLOAD not in device.under_way and device.version is not None and now_s >= device.upload_due_s:
            device.told = len(device.receipts)
            request = UploadRequest(receipts=device.receipts, max_bytes=settings.max_upload_bytes)
            out.append(self._send(node_id, UPLOAD, request))
        if device.version is not None:
            out += await self._asking(node_id, device)
        for message in out:
            device.under_way[message.type] = now_s + message.ttl_s + _OVERDUE_S
        return out

    async def _asking(self, node_id: int, device: _Device) -> list[Outgoing]:
        """What it is to learn, and its part in a secure sum."""
        out = []
        if self._may_ask(device, LEARN):
            version = device.version or 0
            task = await asyncio.to_thread(self._tasks.due, device.device_id, adapter_version=version)
            out += [self._send(node_id, LEARN, task)] if task is not None else []
        if self._may_ask(device, SECURE):
            request = await asyncio.to_thread(self._sums.due, device.device_id)
            out += [self._send(node_id, SECURE, request)] if request is not None else []
        return out

    def _may_ask(self, device: _Device, kind: str) -> bool:
        return kind not in device.under_way and device.asked_due_s.get(kind, float("-inf")) <= self._clock()

    def _wants(self, device: _Device, released: int) -> bool:
        if device.version is None or ADAPTER in device.under_way or released <= device.version:
            return False
        return device.refused.get(released, float("-inf")) <= self._clock()

    def _send(self, node_id: int, kind: str, request: msgspec.Struct) -> Outgoing:
        return Outgoing(node_id, kind, wire.encode(request), self._settings.ttl_s)

    async def _offering(self, node_id: int, device: _Device, released: int) -> list[Outgoing]:
        device.offered = released
        try:
            payload = await asyncio.to_thread(self._packed_offer, released)
        except ClawloopError as error:
            _log.error("adapter %d cannot be sent: %s", released, error)
            device.refused[released] = self._clock() + _MAX_BACK_OFF_S
            return []
        return [Outgoing(node_id, ADAPTER, payload, self._settings.adapter_ttl_s)]

    def _packed_offer(self, version: int) -> bytes:
        if self._offer[0] != version:
            payload = wire.encode(self._releases.offer(version))
            if len(payload) > MAX_PAYLOAD_BYTES:
                raise WireError(
                    f"adapter {version} is a message of {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}"
                )
            self._offer = (version, payload)
        return self._offer[1]

    async def _take(self, device: _Device, reply: Reply) -> None:
        if reply.type == STATUS:
            status = wire.decode(reply.payload, StatusReply)
            await self._seen(device, status.adapter_version, status)
        elif reply.type == UPLOAD:
            await self._take_upload(device, wire.decode(reply.payload, UploadReply))
        elif reply.type == ADAPTER:
            await self._take_adapter(device, wire.decode(reply.payload, AdapterReply))
        elif reply.type == LEARN:
            answer = wire.decode(reply.payload, LearnReply)
            await asyncio.to_thread(self._tasks.answered, device.device_id, answer)
        elif reply.type == SECURE:
            part = wire.decode(reply.payload, SecureReply)
            await asyncio.to_thread(self._sums.answered, device.device_id, part)

    async def _take_upload(self, device: _Device, upload: UploadReply) -> None:
        items = upload.items[:_MAX_ITEMS]
        kept = await asyncio.to_thread(self._keep, device.device_id, items) if items else []
        device.receipts = device.receipts[device.told :] + kept
        device.told = 0
        device.upload_due_s = self._clock() + (0.0 if upload.more and items else self._settings.upload_every_s)
        await self._seen(device, upload.adapter_version)

    def _keep(self, device_id: str, items: list[UploadItem]) -> list[ItemReceipt]:
        return [self._sign(received) for received in self._vault.receive(device_id, items)]

    async def _take_adapter(self, device: _Device, answer: AdapterReply) -> None:
        if answer.installed:
            await self._seen(device, answer.version)
            return
        device.refused[device.offered] = self._clock() + self._settings.refused_again_s
        _log.warning("device %s refused adapter %d: %.200r", device.device_id, device.offered, answer.reason)

    async def _seen(self, device: _Device, version: int, status: StatusReply | None = None) -> None:
        if status is None and version == device.version:
            return
        if not 0 <= version < _MAX_VERSION:
            raise WireError(f"it says that it uses adapter {version}, which no server ever made")
        device.version = version
        await asyncio.to_thread(self._members.seen, device.device_id, adapter_version=version, status=status)

    def _failed(self, device: _Device, kind: str, error: str) -> None:
        device.failures += 1
        wait_s = min(_MAX_BACK_OFF_S, max(self._settings.upload_every_s, 0.5) * 2 ** min(device.failures - 1, 10))
        _log.info("device %s, %s: %.500r; asking again in %.1f s", device.device_id, kind, error, wait_s)
        if kind == UPLOAD:
            device.upload_due_s = self._clock() + wait_s
        elif kind == STATUS:
            device.status_due_s = self._clock() + wait_s
        elif kind == ADAPTER:
            device.refused[device.offered] = self._clock() + wait_s
        else:
            device.asked_due_s[kind] = self._clock() + wait_s
