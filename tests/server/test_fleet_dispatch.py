"""The dispatcher asks each device for the difference between what it should have and what it told."""

import asyncio

import pytest
import zstandard

from clawloop_server.errors import DeviceError
from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_shared import wire
from clawloop_shared.errors import StorageError
from clawloop_shared.log_head import LogProof, SignedHead
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import (
    ADAPTER,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    ItemReceipt,
    ItemReceived,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
NODE = NodeInfo(7, "device")


class World:
    """Vault, releases and members in memory, and a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s, self.version = 100.0, 0
        self.kept: list[str] = []
        self.members = {7: "device"}
        self.seen_versions: list[int] = []
        self.broken_offer = False
        self.apart: dict[str, int] = {}
        self.dispatcher = Dispatcher(
            vault=self,
            releases=self,
            members=self,
            sign=lambda received: ItemReceipt(received.item_id.encode(), b"signed"),
            apart=lambda: dict(self.apart),
            settings=DispatchSettings(upload_every_s=10, refused_again_s=1000),
            clock=lambda: self.now_s,
        )

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        self.kept += [item.item_id for item in items]
        return [ItemReceived(device_id=device_id, item_id=i.item_id, received_ms=1, sha256="") for i in items]

    def current_version(self) -> int:
        return self.version

    def offer(self, version: int) -> AdapterOffer:
        if self.broken_offer:
            raise StorageError("a file is missing")
        return AdapterOffer(SignedManifest(b"%d" % version, "key", b"signature"), {"file": b"bytes"})

    def device_of(self, node_id: int) -> str | None:
        return self.members.get(node_id)

    def cohort(self) -> int:
        return len(self.members)

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        self.seen_versions.append(adapter_version)

    async def asked(self) -> list[str]:
        return sorted(out.type for out in await self.work())

    async def work(self) -> list[Outgoing]:
        return await self.dispatcher.work([NODE])

    async def says(self, kind: str, value: StatusReply | UploadReply | AdapterReply) -> None:
        await self.dispatcher.reply(Reply(7, kind, wire.encode(value)))

    async def says_status(self, version: int = 0) -> None:
        await self.says(STATUS, StatusReply("full", LINE, version, 0, "1"))

    async def says_upload(self, *ids: str, more: bool = False, version: int = 0) -> None:
        await self.says(UPLOAD, UploadReply([UploadItem(i, "r", "steps", b"x") for i in ids], more, version))


@pytest.fixture
def world() -> World:
    return World()


def acknowledged(sent: Outgoing) -> list[str]:
    return [receipt.payload.decode() for receipt in wire.decode(sent.payload, UploadRequest).receipts]


async def greeted(world: World, *, version: int = 0) -> None:
    assert await world.asked() == [STATUS]
    await world.says_status(version)


async def test_a_device_is_greeted_first_and_then_asked_for_its_items(world: World) -> None:
    await greeted(world)
    assert await world.asked() == [UPLOAD]


async def test_one_message_of_a_type_is_under_way_at_most(world: World) -> None:
    await greeted(world)
    await world.work()
    world.version = 1
    assert await world.asked() == [ADAPTER]
    assert await world.asked() == []


async def test_items_are_acknowledged_in_the_next_request_and_only_once(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.says_upload("a", "b", more=True)
    (second,) = await world.work()
    assert acknowledged(second) == ["a", "b"]
    await world.says_upload("c", more=True)
    (third,) = await world.work()
    assert acknowledged(third) == ["c"]
    assert world.kept == ["a", "b", "c"]


async def test_an_acknowledgement_that_was_lost_is_sent_again(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.says_upload("a", more=True)
    await world.work()
    await world.dispatcher.reply(Reply(7, UPLOAD, error="5 gone"))
    world.now_s += 100
    (again,) = await world.work()
    assert acknowledged(again) == ["a"]


async def test_of_an_answer_with_very_many_items_as_many_are_taken_as_can_be_acknowledged(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.says_upload(*map(str, range(3000)), more=True)
    (again,) = await world.work()
    assert acknowledged(again) == world.kept == [str(n) for n in range(1024)]


async def test_a_device_is_told_how_many_devices_there_are(world: World) -> None:
    world.members[8] = "another"
    (question,) = await world.work()
    assert wire.decode(question.payload, StatusRequest).cohort == 2


async def test_without_more_the_device_rests_until_the_next_upload_is_due(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.says_upload("a")
    assert await world.asked() == []
    world.now_s += 10
    assert await world.asked() == [UPLOAD]


async def test_a_release_is_offered_at_once_and_not_again_when_it_is_installed(world: World) -> None:
    await greeted(world, version=2)
    world.version = 3
    assert ADAPTER in await world.asked()
    await world.says(ADAPTER, AdapterReply(3, installed=True))
    assert ADAPTER not in await world.asked()
    assert world.seen_versions[-1] == 3


async def test_a_refused_version_is_not_offered_again_soon_but_the_next_one_is(world: World) -> None:
    await greeted(world)
    world.version = 1
    await world.work()
    await world.says(ADAPTER, AdapterReply(0, installed=False, reason="wrong base"))
    world.now_s += 500
    assert ADAPTER not in await world.asked()
    world.version = 2
    assert ADAPTER in await world.asked()


def proved(sent: list[Outgoing]) -> int | None:
    """From which size on the offer among these proves the log; None: there is none."""
    for each in sent:
        if each.type == ADAPTER:
            log = wire.decode(each.payload, AdapterOffer).log
            assert log
            assert log.index == world_version(each)
            return log.from_size
    return None


def world_version(sent: Outgoing) -> int:
    return int(wire.decode(sent.payload, AdapterOffer).manifest.body)


async def test_an_offer_proves_the_log_from_where_the_device_is(world: World) -> None:
    head = SignedHead(b"", "key", b"signature")
    world.dispatcher._prove = lambda version, size: LogProof(head, version, [], size)
    await world.asked()
    await world.says(STATUS, StatusReply("full", LINE, 0, 0, "1", log_size=4))
    world.version = 1
    assert proved(await world.work()) == 4
    await world.says(ADAPTER, AdapterReply(1, installed=True, log_size=5))
    world.version = 2
    assert proved(await world.work()) == 5
    await world.says(ADAPTER, AdapterReply(1, installed=False, reason="not from 7", log_size=7))
    assert proved(await world.work()) is None
    world.now_s += 31
    assert proved(await world.work()) == 7, "it was only told of another size: it is asked again soon"
    await world.says(ADAPTER, AdapterReply(1, installed=False, reason="forked", log_size=7))
    world.now_s += 301
    assert STATUS in [each.type for each in await world.work()]
    await world.says(STATUS, StatusReply("full", LINE, 1, 0, "1", log_size=7))
    assert proved(await world.work()) is None
    world.now_s += 301
    await world.work()
    await world.says(STATUS, StatusReply("full", LINE, 1, 0, "1", log_size=3))
    assert proved(await world.work()) == 3, "its owner accepted another log"


async def test_a_version_that_a_device_told_in_an_upload_is_believed(world: World) -> None:
    await greeted(world)
    world.version = 4
    await world.work()
    await world.says_upload(version=4)
    await world.dispatcher.reply(Reply(7, ADAPTER, error="3 lost"))
    world.now_s += 100
    assert ADAPTER not in await world.asked()


async def test_failures_are_retried_more_and_more_slowly(world: World) -> None:
    await greeted(world)
    await world.work()
    waits = []
    for _ in range(4):
        await world.dispatcher.reply(Reply(7, UPLOAD, error="2 broken"))
        began = world.now_s
        while UPLOAD not in await world.asked():
            world.now_s += 1
        waits.append(world.now_s - began)
    assert waits == [10, 20, 40, 60]


async def test_a_reply_that_is_not_ours_is_a_failure_and_not_a_crash(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.dispatcher.reply(Reply(7, UPLOAD, b"rubbish"))
    assert await world.asked() == []
    assert world.kept == []


async def test_an_adapter_whose_files_are_missing_stops_nothing_else(world: World) -> None:
    await greeted(world)
    world.version, world.broken_offer = 1, True
    assert await world.asked() == [UPLOAD]


async def test_strangers_and_revoked_devices_are_asked_nothing(world: World) -> None:
    world.members.clear()
    assert await world.asked() == []


async def test_a_new_bridge_forgets_what_the_old_one_had_under_way(world: World) -> None:
    await greeted(world)
    assert await world.asked() == [UPLOAD]
    await world.dispatcher.connected()
    assert await world.asked() == [UPLOAD]


async def test_waiting_ends_when_something_was_released(world: World) -> None:
    await greeted(world)
    await world.work()
    waiting = asyncio.create_task(world.dispatcher.wait(30))
    await asyncio.sleep(0)
    world.dispatcher.notify()
    await asyncio.wait_for(waiting, 5)


async def waited_s(world: World, timeout_s: float = 0.3) -> float:
    began = asyncio.get_running_loop().time()
    await world.dispatcher.wait(timeout_s)
    return asyncio.get_running_loop().time() - began


async def test_the_hub_rests_while_a_device_is_away_or_was_only_greeted(world: World) -> None:
    assert await world.asked() == [STATUS]
    assert await waited_s(world) > 0.2
    await world.says_status()
    await world.work()
    await world.says_upload()
    assert await world.dispatcher.work([]) == []
    world.now_s += 1000
    assert await waited_s(world) > 0.2


async def test_a_device_that_always_says_more_and_sends_nothing_is_not_asked_at_once(world: World) -> None:
    await greeted(world)
    await world.work()
    await world.says_upload(more=True)
    assert await world.asked() == []


@pytest.mark.parametrize("version", [-1, 2**63])
async def test_a_made_up_version_reaches_no_database_and_is_that_devices_failure_alone(
    world: World, version: int
) -> None:
    assert await world.asked() == [STATUS]
    await world.says_status(version)
    assert world.seen_versions == []
    assert await world.asked() == []


@pytest.mark.parametrize("error", [StorageError("disk full"), DeviceError("revoked")])
async def test_what_cannot_be_kept_is_not_acknowledged_and_ends_no_bridge(
    world: World, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    await greeted(world)
    await world.work()

    def receive(device_id: str, items: list[UploadItem]) -> list[str]:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(world, "receive", receive)
        await world.says_upload("a")
    world.now_s += 100
    (again,) = await world.work()
    assert acknowledged(again) == []
    await world.says_upload("a")
    assert world.kept == ["a"]


async def test_an_answer_that_is_nested_too_deeply_is_that_devices_failure_alone(world: World) -> None:
    await greeted(world)
    await world.work()
    deep = b"\x82\xa4type\xa9upload.v1\xa1x" + b"\x91" * 200_000 + b"\xc0"
    packed = zstandard.ZstdCompressor().compress(deep)
    await world.dispatcher.reply(Reply(7, UPLOAD, b"CLW\x01\x09upload.v1" + packed))
    world.now_s += 100
    assert await world.asked() == [UPLOAD]


async def test_a_device_of_a_cohort_is_offered_that_cohorts_version_and_no_other(world: World) -> None:
    world.version, world.apart = 5, {"device": 3}
    await greeted(world, version=3)
    assert await world.asked() == [UPLOAD], "the version of the others is not its own"
    world.apart = {"device": 6}
    assert await world.asked() == [], "it is looked at again in a moment, or when something was released"
    world.dispatcher.notify()
    (offered,) = [out for out in await world.work() if out.type == ADAPTER]
    assert wire.decode(offered.payload, AdapterOffer).manifest.body == b"6"
    await world.says(ADAPTER, AdapterReply(6, installed=True))
    world.apart = {}
    world.dispatcher.notify()
    assert ADAPTER not in await world.asked(), "versions only grow on a device"
