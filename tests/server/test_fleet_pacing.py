"""Whose turn it is: what one question costs does not grow with how many devices there are, and nobody is forgotten."""

from collections import Counter

from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.pacing import Budget, Due
from clawloop_server.fleet.quota import Quota, QuotaSettings
from clawloop_server.fleet.roster import Roster
from clawloop_shared import wire
from clawloop_shared.deltas import LearnReply
from clawloop_shared.errors import StorageError
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
    UploadItem,
    UploadReply,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
DEVICES = 1000


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Many:
    """Vault, releases, members and tasks of many devices, which count how often they are asked."""

    def __init__(self, devices: int = DEVICES, **settings: float) -> None:
        self.clock, self.asked = Clock(), Counter[str]()
        self.version, self.full = 0, False
        self.kept: list[str] = []
        self.has: dict[int, int] = {}
        self.nodes = [NodeInfo(number, f"device-{number}") for number in range(devices)]
        self.revoked: set[int] = set()
        self.dispatcher = Dispatcher(
            vault=self,
            releases=self,
            members=self,
            sign=lambda received: ItemReceipt(received.item_id.encode(), b"signed"),
            tasks=self,
            settings=DispatchSettings(**{"exchanges_per_s": 10.0, **settings}),  # type: ignore[arg-type]
            clock=self.clock,
        )

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        if self.full:
            raise StorageError("the disk is full")
        self.kept += [item.item_id for item in items]
        return [ItemReceived(device_id=device_id, item_id=i.item_id, received_ms=1, sha256="") for i in items]

    def current_version(self) -> int:
        self.asked["version"] += 1
        return self.version

    def offer(self, version: int) -> AdapterOffer:
        return AdapterOffer(SignedManifest(b"%d" % version, "key", b"signature"), {"file": b"bytes"})

    def device_of(self, node_id: int) -> str | None:
        self.asked["member"] += 1
        return None if node_id in self.revoked else f"device-{node_id}"

    def cohort(self) -> int:
        self.asked["cohort"] += 1
        return len(self.nodes)

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        self.asked["seen"] += 1

    def due(self, device_id: str, *, adapter_version: int) -> None:
        self.asked["task"] += 1

    def answered(self, device_id: str, reply: LearnReply) -> None:
        raise AssertionError("nobody was asked")

    async def answer(self, order: Outgoing) -> None:
        if order.type == ADAPTER:
            self.has[order.node_id] = self.version
        has = self.has.get(order.node_id, 0)
        answers = {
            STATUS: StatusReply("full", LINE, has, 0, "1"),
            UPLOAD: UploadReply([], False, has),
            ADAPTER: AdapterReply(self.version, installed=True),
        }
        await self.dispatcher.reply(Reply(order.node_id, order.type, wire.encode(answers[order.type])))

    async def pass_s(self, seconds: float, *, online: list[NodeInfo] | None = None) -> list[Outgoing]:
        """So much time in turns of half a second, in which everybody answers at once."""
        out: list[Outgoing] = []
        for _ in range(int(seconds * 2)):
            orders = await self.dispatcher.work(online)
            for order in orders:
                await self.answer(order)
            out += orders
            online = None
            self.clock.now_s += 0.5
        return out


async def test_what_recurs_is_paced_and_everybody_has_a_turn() -> None:
    many = Many()
    await many.pass_s(120, online=many.nodes)
    asked = Counter(order.node_id for order in await many.pass_s(200) if order.type in (STATUS, UPLOAD))
    assert sum(asked.values()) <= 200 * 10 + 40
    assert len(asked) == DEVICES
    assert max(asked.values()) <= 4


async def test_a_second_costs_no_more_questions_to_the_database_with_a_thousand_devices_than_they_need() -> None:
    many = Many()
    await many.pass_s(150, online=many.nodes)
    many.asked.clear()
    await many.pass_s(10)
    assert many.asked["member"] <= 1.2 * DEVICES
    assert many.asked["task"] <= 10 * 200 * 1.2
    assert many.asked["cohort"] <= 3
    assert many.asked["version"] <= 20


async def test_a_release_passes_everything_else_and_reaches_all() -> None:
    many = Many()
    await many.pass_s(150, online=many.nodes)
    many.version = 1
    orders = await many.pass_s(DEVICES / 64 / 2 + 2)
    assert {order.node_id for order in orders if order.type == ADAPTER} == set(range(DEVICES))


async def test_who_goes_is_asked_no_more_and_who_comes_back_is() -> None:
    many = Many(3)
    await many.pass_s(5, online=many.nodes)
    assert {o.node_id for o in await many.pass_s(60, online=many.nodes[:2])} == {0, 1}
    assert {o.node_id for o in await many.pass_s(60, online=many.nodes)} == {0, 1, 2}
    assert many.dispatcher.online == ["device-0", "device-1", "device-2"]


async def test_a_revoked_device_is_asked_no_more_and_an_approved_one_soon() -> None:
    many = Many(2)
    many.revoked = {1}
    assert {o.node_id for o in await many.pass_s(5, online=many.nodes)} == {0}
    many.revoked = {0}
    await many.pass_s(11)
    assert {o.node_id for o in await many.pass_s(60)} == {1}


async def test_one_that_sends_without_end_is_taken_what_its_quota_allows_and_nobody_else_notices() -> None:
    many = Many(2, quota=QuotaSettings(items_per_hour=300, mib_per_hour=0))  # type: ignore[arg-type]
    await many.pass_s(5, online=many.nodes)
    number = 0
    for _ in range(4 * 3600):
        for order in await many.dispatcher.work(None):
            if order.type == UPLOAD and order.node_id == 0:
                items = [UploadItem(f"flood-{number + n}", "r", "steps", b"x") for n in range(50)]
                answer = UploadReply(items, True, 0)
                received = wire.decode(order.payload, UploadRequest).receipts
                number += len(received)
                await many.dispatcher.reply(Reply(0, UPLOAD, wire.encode(answer)))
            elif order.type == UPLOAD:
                one = [UploadItem(f"own-{many.clock.now_s}", "r", "steps", b"x")]
                await many.dispatcher.reply(Reply(1, UPLOAD, wire.encode(UploadReply(one, False, 0))))
            else:
                await many.answer(order)
        many.clock.now_s += 0.5
    flood = {item for item in many.kept if item.startswith("flood")}
    own = {item for item in many.kept if item.startswith("own")}
    assert 800 <= len(flood) <= 950  # an hour's worth saved up, and two hours
    assert len(own) > 400  # once every 15 s
    assert list(many.dispatcher.held_back) == ["device-0"]
    assert "[fleet] items_per_hour = 300" in many.dispatcher.held_back["device-0"]


async def test_a_full_disk_is_named_and_what_came_meanwhile_is_taken_later() -> None:
    many = Many(1)
    await many.pass_s(1, online=many.nodes)
    many.full = True
    many.clock.now_s += 20

    async def offered() -> None:
        orders = [o for o in await many.dispatcher.work(None) if o.type == UPLOAD]
        reply = UploadReply([UploadItem("a", "r", "steps", b"x")], False, 0)
        for order in orders:
            await many.dispatcher.reply(Reply(order.node_id, UPLOAD, wire.encode(reply)))

    await offered()
    assert many.kept == []
    assert many.dispatcher.trouble == "the disk is full"
    many.full = False
    many.clock.now_s += 60
    await offered()
    assert many.kept == ["a"]
    assert many.dispatcher.trouble == ""


async def test_a_database_that_cannot_be_read_for_a_moment_ends_nothing() -> None:
    many = Many(1)
    many.version = -1

    def broken() -> int:
        raise StorageError("the database is locked")

    real, many.current_version = many.current_version, broken  # type: ignore[method-assign]
    assert await many.dispatcher.work(many.nodes) == []
    many.current_version = real  # type: ignore[method-assign]
    many.version = 0
    assert [order.type for order in await many.dispatcher.work(None)] == [STATUS]


def test_nodes_come_in_the_order_in_which_they_are_due_and_the_last_word_counts() -> None:
    due = Due()
    for node_id, at_s in ((1, 5.0), (2, 3.0), (3, 4.0), (1, 1.0), (3, float("inf"))):
        due.put(node_id, at_s)
    assert (due.next_s(), due.pop(0.5)) == (1.0, None)
    assert [due.pop(10.0) for _ in range(3)] == [1, 2, None]


def test_a_budget_gives_what_was_saved_up_and_then_so_many_a_second() -> None:
    clock = Clock()
    budget = Budget(2.0, burst=3, clock=clock)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    assert budget.ready_s() == 100.5
    clock.now_s = 100.5
    assert [budget.take(), budget.take()] == [True, False]


def test_an_item_larger_than_an_hours_worth_passes_when_nothing_was_sent_before() -> None:
    clock = Clock()
    quota = Quota(QuotaSettings(items_per_hour=0, mib_per_hour=1), clock=clock)
    large = UploadItem("large", "r", "steps", bytes(3 << 20))
    assert quota.admit("a", [large, large]) == 1
    assert quota.admit("b", [large]) == 1
    assert 3 * 3600 - 1 < quota.wait_s("a") <= 3 * 3600
    clock.now_s += 3 * 3600
    assert quota.over == {}
    assert quota.admit("a", [large]) == 1


def test_a_stranger_is_looked_up_again_soon_and_a_known_device_seldom() -> None:
    many = Many(2)
    many.revoked = {1}
    roster = Roster(many, clock=many.clock)
    roster.set(many.nodes)
    for _ in range(20):
        roster.look()
        many.clock.now_s += 0.5
    assert roster.known == {0: "device-0"}
    assert many.asked["member"] == 1 + 20
    assert roster.set([]) == [0]


async def test_there_is_nothing_for_a_device_that_answered_all_and_for_others_nobody_knows() -> None:
    many = Many(2)
    many.revoked = {1}
    assert not many.dispatcher.nothing_for(0)
    (question,) = await many.dispatcher.work(many.nodes)
    assert not many.dispatcher.nothing_for(0)
    await many.answer(question)
    assert many.dispatcher.nothing_for(0)
    assert not many.dispatcher.nothing_for(1)
    assert not many.dispatcher.nothing_for(99)
    await many.dispatcher.connected()
    assert not many.dispatcher.nothing_for(0)
