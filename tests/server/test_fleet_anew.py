"""A device or a bridge that began anew is asked again at once, not when what was under way has run out."""

from types import SimpleNamespace
from typing import Any

import pytest

from clawloop_server.fleet.bridge import Bridge
from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher
from clawloop_server.fleet.replies import Arrived
from clawloop_shared import wire
from clawloop_shared.messages import (
    RECORD,
    STATUS,
    UPLOAD,
    AdapterOffer,
    ItemReceipt,
    ItemReceived,
    StatusReply,
    UploadItem,
    UploadReply,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
FIRST, AGAIN = NodeInfo(7, "device", "10:00"), NodeInfo(7, "device", "10:05")


class World:
    """One device, no adapter, and a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.dispatcher = Dispatcher(
            vault=self, releases=self, members=self, sign=lambda _: ItemReceipt(b"", b""), clock=lambda: self.now_s
        )

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        return []

    def current_version(self) -> int:
        return 0

    def offer(self, version: int) -> AdapterOffer:
        raise AssertionError("nothing is released")

    def device_of(self, node_id: int) -> str | None:
        return "device"

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        pass

    def cohort(self) -> int:
        return 1

    async def asked(self, node: NodeInfo | None, after_s: float = 0.0) -> list[Outgoing]:
        self.now_s += after_s
        return await self.dispatcher.work([node] if node else None)

    async def greeted(self) -> None:
        assert [sent.type for sent in await self.asked(FIRST)] == [STATUS]
        await self.dispatcher.reply(Reply(7, STATUS, wire.encode(StatusReply("full", LINE, 0, 0, "0"))))


@pytest.fixture
def world() -> World:
    return World()


async def test_an_upload_that_a_device_died_in_is_asked_for_when_it_is_back(world: World) -> None:
    await world.greeted()
    assert [sent.type for sent in await world.asked(FIRST, 1)] == [UPLOAD]
    assert await world.asked(FIRST, 1) == []
    assert [sent.type for sent in await world.asked(AGAIN, 1)] == [UPLOAD]
    assert await world.asked(AGAIN, 1) == []


async def test_a_greeting_that_a_device_died_in_is_said_again_though_who_is_there_was_told_once(world: World) -> None:
    assert [sent.type for sent in await world.asked(FIRST)] == [STATUS]
    assert await world.asked(None, 1) == []
    assert [sent.type for sent in await world.asked(AGAIN, 1)] == [STATUS]


async def test_a_greeting_that_died_with_its_bridge_is_said_again_to_the_next_one(world: World) -> None:
    assert [sent.type for sent in await world.asked(FIRST)] == [STATUS]
    await world.dispatcher.connected()
    assert [sent.type for sent in await world.asked(FIRST, 1)] == [STATUS]


async def test_a_greeting_that_nobody_answers_is_said_again_when_it_has_run_out(world: World) -> None:
    assert [sent.type for sent in await world.asked(FIRST)] == [STATUS]
    assert await world.asked(None, 100) == []
    assert [sent.type for sent in await world.asked(None, 60)] == [STATUS]


async def test_a_rest_after_an_answer_is_kept_by_a_device_that_began_anew(world: World) -> None:
    await world.greeted()
    await world.asked(FIRST, 1)
    await world.dispatcher.reply(Reply(7, UPLOAD, wire.encode(UploadReply([], False, 0))))
    assert await world.asked(AGAIN, 1) == []


class Grid:
    """Flower's grid with answers put in by hand."""

    soon = False

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.asked: list[str] = []
        self._count = 0

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=7, name="device", last_activated_at="10:00")]

    def push_messages(self, messages: list[Any]) -> list[str]:
        self._count += len(messages)
        return [f"m{self._count}"]

    def pull(self, ids: list[str]) -> list[Arrived]:
        self.asked = ids
        ready, self.answers = [i for i in self.answers if i in ids], []
        return [_answer(message_id) for message_id in ready]


def _answer(message_id: str) -> Arrived:
    content = SimpleNamespace(config_records={RECORD: {RECORD: message_id.encode()}}, array_records={})
    return Arrived(message_id, SimpleNamespace(content=content, has_error=lambda: False))


class Hub:
    """Orders what it is told to, and keeps what it is given."""

    def __init__(self) -> None:
        self.orders: list[Outgoing] = []
        self.online: list[NodeInfo] | None = None
        self.replies: list[bytes] = []

    def exchange(self, online: list[NodeInfo] | None, replies: list[Reply], *, wait_s: float) -> list[Outgoing]:
        self.online = online or self.online
        self.replies += [reply.payload for reply in replies]
        orders, self.orders = self.orders, []
        return orders


def test_of_two_questions_of_a_kind_the_latest_counts_and_the_other_is_fetched_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clawloop_server.fleet.bridge._message", lambda order: order)
    grid, hub = Grid(), Hub()
    bridge = Bridge(grid, hub)
    for _ in range(2):
        hub.orders = [Outgoing(7, UPLOAD, b"")]
        bridge.turn()
    assert hub.online == [NodeInfo(7, "device", "10:00")]
    bridge._pull_due_s = 0.0
    grid.answers = ["m1", "m2"]
    bridge.turn()
    assert grid.asked == ["m1", "m2"]
    bridge.turn()
    assert hub.replies == [b"m2"]
    bridge._pull_due_s, grid.asked = 0.0, []
    bridge.turn()
    assert grid.asked == [], "nothing is under way any more"
