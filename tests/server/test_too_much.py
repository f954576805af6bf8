"""Too much from one device, and a disk that is full: refused or put off, named, and nobody else is affected.

The real vault behind the real dispatcher; the disk is full by SQLite's own limit on the pages of a database.
"""

from collections.abc import Callable

import pytest

from clawloop_server.bases import Base
from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.quota import QuotaSettings
from clawloop_server.hub.devices import Devices
from clawloop_server.hub.members import HubMembers
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.intake import MAX_ITEM_RECORDS
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.messages import STATUS, UPLOAD, AdapterOffer, StatusReply, UploadItem, UploadReply, UploadRequest
from clawloop_shared.receipts import open_item, sign_item
from clawloop_shared.records import Step, StepBatch

MakeStep = Callable[..., Step]


def item(item_id: str, *steps: Step) -> UploadItem:
    return UploadItem(item_id, "receipt", "steps.v1", wire.encode(StepBatch(steps=list(steps))))


class NothingReleased:
    """A registry without an adapter."""

    def current_version(self) -> int:
        return 0

    def offer(self, version: int) -> AdapterOffer:
        raise AssertionError(f"there is no adapter {version}")


class World:
    """Two devices, each with an outbox: what is acknowledged leaves it."""

    def __init__(self, vault: Vault, *, keys: ServerKeys, base: Base, ids: list[str]) -> None:
        self.now_s, self.keys, self.base = 100.0, keys, base
        self.outboxes: dict[int, dict[str, UploadItem]] = {number: {} for number in range(len(ids))}
        devices = Devices(vault.database)
        for number, device_id in enumerate(ids):
            devices.set_node(device_id, number)
        self.nodes = [NodeInfo(number, device_id) for number, device_id in enumerate(ids)]
        self.dispatcher = Dispatcher(
            vault=vault,
            releases=NothingReleased(),
            members=HubMembers(vault.database, line_id=base.line_id),
            sign=lambda received: sign_item(received, keys.release),
            settings=DispatchSettings(quota=QuotaSettings(items_per_hour=20, mib_per_hour=64)),
            clock=lambda: self.now_s,
        )

    async def pass_s(self, seconds: float) -> None:
        """So much time, in which both answer all that they are asked."""
        for _ in range(int(seconds)):
            for order in await self.dispatcher.work(self.nodes):
                await self._answer(order)
            self.now_s += 1.0

    async def _answer(self, order: Outgoing) -> None:
        outbox = self.outboxes[order.node_id]
        if order.type == STATUS:
            reply = StatusReply("full", self.base.line, 0, len(outbox), "1")
            await self.dispatcher.reply(Reply(order.node_id, STATUS, wire.encode(reply)))
        elif order.type == UPLOAD:
            for receipt in wire.decode(order.payload, UploadRequest).receipts:
                outbox.pop(open_item(receipt, self.keys.release_public).item_id, None)
            items = list(outbox.values())[:8]
            reply_ = UploadReply(items, len(outbox) > len(items), 0)
            await self.dispatcher.reply(Reply(order.node_id, UPLOAD, wire.encode(reply_)))


@pytest.fixture
def world(vault: Vault, keys: ServerKeys, base: Base, add_device: Callable[..., str]) -> World:
    return World(vault, keys=keys, base=base, ids=[add_device(), add_device()])


def put(world: World, node_id: int, *items: UploadItem) -> None:
    world.outboxes[node_id] |= {each.item_id: each for each in items}


async def test_a_device_that_floods_is_held_back_by_name_and_the_other_is_served(
    world: World, vault: Vault, make_step: MakeStep
) -> None:
    put(world, 0, *(item(f"flood-{n}", make_step()) for n in range(60)))
    await world.pass_s(60)
    put(world, 1, item("mine", make_step()))
    await world.pass_s(60)
    assert world.outboxes[1] == {}
    assert 40 <= len(world.outboxes[0]) <= 44  # the receipts for the last of twenty come with the next question
    assert list(world.dispatcher.held_back) == [world.nodes[0].name]
    await world.pass_s(3 * 3600)
    assert world.outboxes[0] == {}
    assert world.dispatcher.held_back == {}
    assert vault.stats().items == 61


async def test_a_full_disk_loses_nothing_ends_nothing_and_is_named(
    world: World, vault: Vault, make_step: MakeStep
) -> None:
    put(world, 1, item("before", make_step()))
    await world.pass_s(30)
    pages = vault.database.count("PRAGMA page_count")
    vault.database.run(f"PRAGMA max_page_count = {pages + 2}")
    large = [item(f"large-{n}", make_step(prompt_ids=list(range(1, 900)) * 40)) for n in range(8)]
    put(world, 0, *large)
    await world.pass_s(60)
    assert len(world.outboxes[0]) == 8
    assert "full" in world.dispatcher.trouble
    assert vault.stats().items == 1
    vault.database.run("PRAGMA max_page_count = 1000000")
    await world.pass_s(200)
    assert world.outboxes == {0: {}, 1: {}}
    assert world.dispatcher.trouble == ""
    assert vault.stats().items == 9


async def test_an_item_of_very_many_tiny_steps_is_set_aside_whole(
    world: World, vault: Vault, make_step: MakeStep
) -> None:
    put(world, 0, item("tiny", *(make_step() for _ in range(MAX_ITEM_RECORDS + 1))))
    put(world, 1, item("mine", make_step()))
    await world.pass_s(60)
    assert world.outboxes == {0: {}, 1: {}}
    assert vault.stats().set_aside == {"too large": 1}
    assert vault.stats().steps == 1
