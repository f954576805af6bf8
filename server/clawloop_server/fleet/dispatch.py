"""What each device is asked next: the difference between what it should have and what it told.

Holds only what can be asked again (versions told, receipts to hand over, messages under way). What counts is on disk
before it is acknowledged: the vault's items, the registry's releases. Knows no Flower and no socket.

Its work grows with what happens and not with how many devices there are: only those are looked at whose turn it is
(`pacing`), the database is asked about a node once in a while (`roster`), and the questions that recur, how it is and
what may leave, are as many a second as a server can bear; with many devices each has its turn more seldom.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.pacing import Budget, Due
from clawloop_server.fleet.ports import Members, NoTasks, Releases, Sums, Tasks, Vault
from clawloop_server.fleet.quota import Quota, QuotaSettings
from clawloop_server.fleet.roster import Roster
from clawloop_server.fleet.standing import Standing
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.errors import ClawloopError, StorageError, WireError
from clawloop_shared.log_head import LogProof
from clawloop_shared.manifest import SignedManifest
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
_ENVELOPE_BYTES = 1 << 20
_MAX_ORDERS = 64
"""of one exchange: the bridge hands them to Flower one by one, and hears of no answer meanwhile"""
_MAX_OFFERED_BYTES = 128 << 20
"""of adapters in one exchange: it is one frame, in memory on both sides; the others have their turn in the next"""
_FEW = 16
_LOOKUPS_PER_S = 200.0
"""how often a second at most somebody's tasks are looked up"""
_MAX_LOOKUPS = 256
_COHORT_S = 5.0
_OVERDUE_S = 30.0
_MAX_PACKED = 4
"""offers that are kept ready: one a cohort and size of the log that its devices know, mostly"""
_MAX_ITEMS = 1024
"""of one answer that are taken: their receipts fit one small message. The others come again, as long as they wait"""
_MAX_VERSION = 1 << 31
"""no server releases as many; a number that a device made up must not reach the database"""


class DispatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How often devices are asked, and how long a question stands."""

    upload_every_s: float = 15.0
    status_every_s: float = 300.0
    max_upload_bytes: int = 8 << 20
    max_blob_bytes: int = 256 << 20
    """items over `max_upload_bytes` come in parts, up to this; 0: not at all"""
    fetching_s: float = 30.0
    """after a device said that it fetches an adapter's files, how long until it is offered that again"""
    ttl_s: float = 120.0
    adapter_ttl_s: float = 600.0
    refused_again_s: float = 3600.0
    """after a device refused a version, how long until it is offered that one again"""
    exchanges_per_s: float = 5.0
    """how many devices a second are asked how they are or for their items, at most; a few are asked whenever due"""
    ask_every_s: float = 2.0
    """how often it is looked up whether a device is to learn something or to take part in a sum"""
    quota: QuotaSettings = QuotaSettings()


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
        apart: Callable[[], dict[str, int]] = dict,
        links: Callable[[SignedManifest, str], dict[str, str]] | None = None,
        prove: Callable[[int, int], LogProof | None] = lambda version, from_size: None,
        settings: DispatchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sign`: makes the server's word of what it has on disk; `links`: the addresses under which a device may fetch
        the files of an adapter that is too large for a message; `apart`: devices that should have another version than
        the others, each with that (called in a thread); `prove`: that a version is in the log of adapters, for a device
        that knows the log of so many entries (called in a thread)."""
        self._apart_now, self._apart = apart, dict[str, int]()
        self._links, self._prove = links, prove
        self._tasks, self._sums = tasks or NoTasks(), sums or NoTasks()
        self._vault, self._releases, self._members, self._sign = vault, releases, members, sign
        self._settings, self._clock = settings or DispatchSettings(), clock
        self._devices: dict[int, Standing] = {}
        self._roster = Roster(members, clock=clock)
        self._since: dict[int, str] = {}
        self._turns, self._offers, self._lookups = Due(), Due(), Due()
        per_s = self._settings.exchanges_per_s
        self._budget = Budget(per_s, burst=max(per_s, _MAX_ORDERS / 2), clock=clock)
        self._quota = Quota(self._settings.quota, clock=clock)
        self._released = 0
        self._packed: dict[tuple[int, int], bytes | AdapterOffer] = {}
        self._cohort, self._cohort_due_s = 0, float("-inf")
        self._trouble = ""
        self._news = asyncio.Event()

    @property
    def online(self) -> list[str]:
        """Device ids that the bridge reported last."""
        return list(self._roster.known.values())

    @property
    def held_back(self) -> dict[str, str]:
        """Devices of which nothing is taken for now, and why."""
        return self._quota.over

    @property
    def trouble(self) -> str:
        """Why nothing that devices send can be kept; empty: the last could."""
        return self._trouble

    def admit_large(self, device_id: str, size_bytes: int) -> float:
        """Count an item that comes in parts as taken from a device; or in how many seconds there is room for it."""
        return self._quota.admit_large(device_id, size_bytes)

    def notify(self) -> None:
        """Something was released: look at once. (Call from the hub's loop.)"""
        self._cohort_due_s = float("-inf")
        self._news.set()

    async def connected(self) -> None:
        """Forget what an earlier bridge had under way, and whom it saw."""
        for device in self._devices.values():
            device.lost()
        for node_id in self._roster.set([]):
            self._rest(node_id)

    def nothing_for(self, node_id: int) -> bool:
        """Whether it is certain that no message waits for a node: it is a device that may sync, and was sent none."""
        return node_id in self._roster.known and not self._devices[node_id].awaits(self._clock())

    async def wait(self, timeout_s: float) -> None:
        """Until news, the next question that is due, or `timeout_s`."""
        turn_s = self._turns.next_s() if self._few else max(self._turns.next_s(), self._budget.ready_s())
        due_s = min(turn_s, self._offers.next_s(), self._lookups.next_s()) - self._clock()
        try:
            async with asyncio.timeout(min(timeout_s, max(due_s, 0.01))):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()

    async def work(self, online: list[NodeInfo] | None) -> list[Outgoing]:
        """What devices should be asked now, so many at once as can be handed on soon; None: those that are online are
        the same as before."""
        try:
            await self._see(online)
        except ClawloopError as error:  # the bridge must not end for it: it comes again in a moment
            _log.error("it cannot be seen what devices should be asked: %s", error)
            return []
        out = await self._offering()
        out += await self._looking_up()
        while len(out) < _MAX_ORDERS and self._turns.next_s() <= self._clock() and (self._few or self._budget.take()):
            node_id = self._turns.pop(self._clock())
            if node_id is not None:
                out += self._turn(node_id, self._devices[node_id])
                self._plan(node_id)
        return out

    async def reply(self, reply: Reply) -> None:
        """Keep what a device answered. What cannot be read or kept is that device's failure alone: it is not
        acknowledged, and asked for again later."""
        device = self._devices.get(reply.node_id)
        if device is None:
            return
        device.under_way.pop(reply.type, None)
        try:
            await self._heard(device, reply)
        finally:
            self._plan(reply.node_id)

    async def _heard(self, device: Standing, reply: Reply) -> None:
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
        except Exception as error:  # noqa: BLE001
            _log.exception("what device %s sent could not be taken", device.device_id)
            self._failed(device, reply.type, f"{type(error).__name__} here")

    # whose turn it is

    async def _see(self, online: list[NodeInfo] | None) -> None:
        """Take note of who came, who went, and what was released."""
        for node_id in self._roster.set(online) if online is not None else ():
            self._rest(node_id)
        if online is not None:
            self._since = {node.node_id: node.since for node in online}
        for node in online or ():
            self._began(node)
        if self._roster.is_due():
            came, gone = await asyncio.to_thread(self._roster.look)
            for node_id in gone:
                self._rest(node_id)
            for node_id in came:
                device = self._devices.setdefault(node_id, Standing(self._roster.known[node_id], self._clock()))
                device.since = device.since or self._since.get(node_id, "")
                self._plan(node_id)
        if self._cohort_due_s <= self._clock():
            self._cohort = await asyncio.to_thread(self._members.cohort)
            self._cohort_due_s = self._clock() + _COHORT_S
            await self._part()
        released = await asyncio.to_thread(self._releases.current_version)
        if released != self._released:
            self._released = released
            for node_id in self._roster.known:
                self._plan(node_id)

    async def _part(self) -> None:
        """Take note of which devices should have another version than the others."""
        before, self._apart = self._apart, await asyncio.to_thread(self._apart_now)
        changed = {name for name, _ in before.items() ^ self._apart.items()}
        for node_id, device_id in self._roster.known.items() if changed else ():
            if device_id in changed:
                self._plan(node_id)

    def _wanted(self, node_id: int) -> int:
        """The version that a device should have."""
        return self._apart.get(self._devices[node_id].device_id, self._released)

    def _began(self, node: NodeInfo) -> None:
        """A device that connected anew (it died, slept, or broke off what it was sending) knows nothing of what was
        under way to it. Without this it would be asked again only when those questions run out, after minutes."""
        device = self._devices.get(node.node_id)
        if device is not None and device.since != node.since:
            if device.since:
                device.lost()
                self._plan(node.node_id)
            device.since = node.since

    @property
    def _few(self) -> bool:
        return len(self._roster.known) <= _FEW

    def _plan(self, node_id: int) -> None:
        """Note when a device is to be looked at next."""
        if node_id in self._roster.known:
            device = self._devices[node_id]
            self._turns.put(node_id, device.turn_s())
            self._offers.put(node_id, device.offer_s(self._wanted(node_id)))
            self._lookups.put(node_id, device.task_s())

    def _rest(self, node_id: int) -> None:
        for due in (self._turns, self._offers, self._lookups):
            due.remove(node_id)

    def _due(self, due: Due, most: int) -> list[int]:
        """The nodes that are due, so many at most, removed: each is planned anew when it was looked at."""
        found = list[int]()
        while len(found) < most and (node_id := due.pop(self._clock())) is not None:
            found.append(node_id)
        return found

    # questions

    def _turn(self, node_id: int, device: Standing) -> list[Outgoing]:
        """How it is, or what may leave."""
        now_s, settings = self._clock(), self._settings
        if device.may_ask(STATUS, now_s):
            device.status_due_s = now_s + settings.status_every_s
            return [self._send(node_id, STATUS, StatusRequest(cohort=self._cohort))]
        if not device.may_ask(UPLOAD, now_s):
            return []
        device.told = len(device.receipts)
        request = UploadRequest(
            receipts=device.receipts, max_bytes=settings.max_upload_bytes, max_blob_bytes=settings.max_blob_bytes
        )
        return [self._send(node_id, UPLOAD, request)]

    async def _offering(self) -> list[Outgoing]:
        """The released adapter, for those that do not have it."""
        alike: dict[tuple[int, int], list[int]] = {}
        for node_id in self._due(self._offers, _MAX_ORDERS):
            alike.setdefault((self._wanted(node_id), self._devices[node_id].log_size), []).append(node_id)
        return [message for which, due in alike.items() for message in await self._offers_of(*which, due=due)]

    async def _offers_of(self, version: int, log_size: int, *, due: list[int]) -> list[Outgoing]:
        try:
            payload = await asyncio.to_thread(self._packed_offer, version, log_size)
            size = len(payload) if isinstance(payload, bytes) else _ENVELOPE_BYTES
            messages = [self._offer_to(node_id, payload) for node_id in due[: max(1, _MAX_OFFERED_BYTES // size)]]
        except Exception as error:  # noqa: BLE001
            _log.error("adapter %d cannot be sent: %s", version, error, exc_info=not isinstance(error, ClawloopError))
            for node_id in due:
                self._devices[node_id].refused = {version: self._clock() + _MAX_BACK_OFF_S}
            return []
        else:
            for message in messages:
                self._devices[message.node_id].offered = version
            return [self._sent(message) for message in messages]
        finally:
            for node_id in due:
                self._plan(node_id)

    async def _looking_up(self) -> list[Outgoing]:
        """Tasks, and parts in secure sums, for those that are due for any."""
        due = self._due(self._lookups, _MAX_LOOKUPS)
        try:
            return await asyncio.to_thread(self._look_up, due) if due else []
        finally:
            for node_id in due:
                self._plan(node_id)

    def _look_up(self, due: list[int]) -> list[Outgoing]:
        """What these devices are to learn, and their parts in secure sums; one for which that cannot be told has its
        next turn. Blocks."""
        out, errors = list[Outgoing](), list[tuple[str, Exception]]()
        again_s = max(self._settings.ask_every_s, len(self._roster.known) / _LOOKUPS_PER_S)
        for node_id in due:
            device = self._devices[node_id]
            for kind in (LEARN, SECURE):
                if not device.may_ask(kind, self._clock()):
                    continue
                device.asked_due_s[kind] = self._clock() + again_s
                try:
                    request = self._asked(kind, device)
                except Exception as error:  # noqa: BLE001 told below, once for all
                    errors.append((device.device_id, error))
                    continue
                if request is not None:
                    out.append(self._send(node_id, kind, request))
        for device_id, first in errors[:1]:
            known, others = isinstance(first, ClawloopError), len(errors) - 1
            text = "what device %s is to do cannot be looked up (nor for %d others): %s"
            _log.error(text, device_id, others, first, exc_info=None if known else first)
        return out

    def _asked(self, kind: str, device: Standing) -> LearnTask | SecureRequest | None:
        if kind == LEARN:
            return self._tasks.due(device.device_id, adapter_version=device.version or 0)
        return self._sums.due(device.device_id)

    def _send(self, node_id: int, kind: str, request: msgspec.Struct) -> Outgoing:
        return self._sent(Outgoing(node_id, kind, wire.encode(request), self._settings.ttl_s))

    def _sent(self, message: Outgoing) -> Outgoing:
        until_s = self._clock() + message.ttl_s + _OVERDUE_S
        self._devices[message.node_id].under_way[message.type] = until_s
        return message

    def _packed_offer(self, version: int, log_size: int) -> bytes | AdapterOffer:
        """The message with the files, or the offer without them if no message holds them."""
        if (version, log_size) not in self._packed:
            offer = msgspec.structs.replace(self._releases.offer(version), log=self._prove(version, log_size))
            size = sum(map(len, offer.files.values()))
            fits = size <= MAX_PAYLOAD_BYTES - _ENVELOPE_BYTES
            if not fits and self._links is None:
                raise WireError(f"adapter {version} has {size} bytes; a message holds {MAX_PAYLOAD_BYTES}")
            if len(self._packed) == _MAX_PACKED:
                del self._packed[next(iter(self._packed))]
            bare = msgspec.structs.replace(offer, files={})
            self._packed[version, log_size] = wire.encode(offer) if fits else bare
        return self._packed[version, log_size]

    def _offer_to(self, node_id: int, packed: bytes | AdapterOffer) -> Outgoing:
        if isinstance(packed, AdapterOffer) and self._links is not None:
            links = self._links(packed.manifest, self._devices[node_id].device_id)
            packed = wire.encode(msgspec.structs.replace(packed, links=links))
        assert isinstance(packed, bytes)
        return Outgoing(node_id, ADAPTER, packed, self._settings.adapter_ttl_s)

    async def _take(self, device: Standing, reply: Reply) -> None:
        if reply.type == STATUS:
            status = wire.decode(reply.payload, StatusReply)
            if device.version is None:  # not before others that wait to be greeted
                device.upload_due_s = self._clock()
            if status.log_size != device.log_size:  # what it refused for that, its owner may have accepted since
                device.log_size, device.refused = status.log_size, {}
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

    async def _take_upload(self, device: Standing, upload: UploadReply) -> None:
        """Keep what is within the device's quota; the rest is not acknowledged, and asked for when there is room."""
        items, device_id = upload.items[:_MAX_ITEMS], device.device_id
        items = items[: self._quota.admit(device_id, items)]
        kept = await asyncio.to_thread(self._keep, device_id, items) if items else []
        device.receipts = device.receipts[device.told :] + kept
        device.told = 0
        wait_s = 0.0 if upload.more and items else self._settings.upload_every_s
        device.upload_due_s = self._clock() + max(wait_s, self._quota.wait_s(device_id))
        await self._seen(device, upload.adapter_version)

    def _keep(self, device_id: str, items: list[UploadItem]) -> list[ItemReceipt]:
        try:
            received = self._vault.receive(device_id, items)
        except ClawloopError as error:
            self._quota.give_back(device_id, items)
            self._trouble = str(error) if isinstance(error, StorageError) else self._trouble
            raise
        self._trouble = ""
        return [self._sign(each) for each in received]

    async def _take_adapter(self, device: Standing, answer: AdapterReply) -> None:
        knew, device.log_size = device.log_size, answer.log_size
        if answer.installed:
            await self._seen(device, answer.version)
            return
        if answer.fetching:
            device.refused = {device.offered: self._clock() + self._settings.fetching_s}
            return
        again_s = self._settings.refused_again_s if answer.log_size == knew else self._settings.fetching_s
        device.refused = {device.offered: self._clock() + again_s}
        _log.warning("device %s refused adapter %d: %.200r", device.device_id, device.offered, answer.reason)

    async def _seen(self, device: Standing, version: int, status: StatusReply | None = None) -> None:
        if status is None and version == device.version:
            return
        if not 0 <= version < _MAX_VERSION:
            raise WireError(f"it says that it uses adapter {version}, which no server ever made")
        device.version = version
        await asyncio.to_thread(self._members.seen, device.device_id, adapter_version=version, status=status)

    def _failed(self, device: Standing, kind: str, error: str) -> None:
        device.failures += 1
        wait_s = min(_MAX_BACK_OFF_S, max(self._settings.upload_every_s, 0.5) * 2 ** min(device.failures - 1, 10))
        _log.info("device %s, %s: %.500r; asking again in %.1f s", device.device_id, kind, error, wait_s)
        if kind == UPLOAD:
            device.upload_due_s = self._clock() + wait_s
        elif kind == STATUS:
            device.status_due_s = self._clock() + wait_s
        elif kind == ADAPTER:
            device.refused = {device.offered: self._clock() + wait_s}
        else:
            device.asked_due_s[kind] = self._clock() + wait_s
