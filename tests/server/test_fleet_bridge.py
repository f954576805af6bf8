"""The bridge asks Flower no more than it must: who is online is told when it changes, and of many messages the oldest
are looked for first."""

from types import SimpleNamespace
from typing import Any

import pytest

from clawloop_server.fleet import bridge as bridges
from clawloop_server.fleet.bridge import Bridge
from clawloop_server.fleet.channel import MAX_FRAME_BYTES, NodeInfo, Outgoing, Reply
from clawloop_server.fleet.replies import Arrived
from clawloop_shared.messages import MAX_PAYLOAD_BYTES, RECORD


class Grid:
    """Flower: nodes, and messages that are answered when the test says so."""

    soon = False

    def __init__(self) -> None:
        self.nodes = [_node(2, "b"), _node(1, "a")]
        self.asked: list[list[str]] = []
        self.answered: set[str] = set()
        self.refused: set[int] = set()
        self.payloads: dict[str, bytes] = {}
        self.count = 0

    def get_nodes(self) -> list[Any]:
        return self.nodes

    def push_messages(self, messages: list[Any]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            self.count += 1
            ids.append(None if message.metadata.dst_node_id in self.refused else f"m{self.count}")
        return ids

    def pull(self, ids: list[str]) -> list[Arrived]:
        self.asked.append(ids)
        return [_answer(each, self.payloads.get(each, each.encode())) for each in ids if each in self.answered]


def _node(node_id: int, name: str) -> Any:
    return SimpleNamespace(node_id=node_id, name=name, last_activated_at="now")


def _answer(message_id: str, payload: bytes) -> Arrived:
    content = SimpleNamespace(config_records={RECORD: {RECORD: payload}}, array_records={})
    return Arrived(message_id, SimpleNamespace(content=content, has_error=lambda: False))


class Hub:
    """What the hub is told, and what it has sent."""

    def __init__(self) -> None:
        self.online: list[list[NodeInfo] | None] = []
        self.replies: list[Reply] = []
        self.handed: list[int] = []
        self.out: list[Outgoing] = []

    def exchange(self, online: list[NodeInfo] | None, replies: list[Reply], *, wait_s: float) -> list[Outgoing]:
        self.online.append(online)
        self.replies += replies
        self.handed.append(sum(len(reply.payload) for reply in replies))
        out, self.out = self.out, []
        return out


@pytest.fixture(autouse=True)
def plain_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """flwr makes messages only within a run."""

    def message(order: Outgoing) -> Any:
        return SimpleNamespace(metadata=SimpleNamespace(dst_node_id=order.node_id))

    monkeypatch.setattr(bridges, "_message", message)


def due(bridge: Bridge) -> None:
    """As if it had waited for as long as it wants to."""
    bridge._look_due_s = bridge._pull_due_s = float("-inf")


def test_who_is_online_is_told_once_and_again_when_it_changes() -> None:
    grid, hub = Grid(), Hub()
    bridge = Bridge(grid, hub)
    for _ in range(3):
        due(bridge)
        bridge.turn()
    assert hub.online == [[NodeInfo(1, "a", "now"), NodeInfo(2, "b", "now")], None, None]
    grid.nodes.pop()
    due(bridge)
    bridge.turn()
    assert hub.online[-1] == [NodeInfo(2, "b", "now")]


def test_of_many_messages_all_are_looked_for_in_turn_and_each_answer_is_handed_over_once() -> None:
    grid, hub = Grid(), Hub()
    bridge = Bridge(grid, hub)
    many = 2 * bridges._MAX_PULL + 10
    hub.out = [Outgoing(number, "query.upload", b"x") for number in range(many)]
    for _ in range(3):
        due(bridge)
        bridge.turn()
    assert [len(ids) for ids in grid.asked] == [bridges._MAX_PULL] * 3
    assert len({each for ids in grid.asked for each in ids}) == many
    grid.answered = {f"m{number + 1}" for number in range(many)}
    for _ in range(5):
        due(bridge)
        bridge.turn()
    assert sorted(reply.node_id for reply in hub.replies) == list(range(many))
    assert all(reply.payload.startswith(b"m") for reply in hub.replies)


def test_a_message_that_flower_does_not_take_is_answered_with_that() -> None:
    grid, hub = Grid(), Hub()
    grid.refused = {1}
    bridge = Bridge(grid, hub)
    hub.out = [Outgoing(1, "query.upload", b"x"), Outgoing(2, "query.upload", b"x")]
    for _ in range(2):
        bridge.turn()
    assert [(reply.node_id, reply.error) for reply in hub.replies] == [(1, "the SuperLink did not take the message")]


def test_an_answer_that_is_too_large_is_that_device_s_failure_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridges, "MAX_PAYLOAD_BYTES", 10)
    grid, hub = Grid(), Hub()
    bridge = Bridge(grid, hub)
    hub.out = [Outgoing(number, "query.upload", b"x") for number in (1, 2)]
    grid.answered, grid.payloads = {"m1", "m2"}, {"m1": bytes(11), "m2": bytes(10)}
    for _ in range(3):
        due(bridge)
        bridge.turn()
    large, good = sorted(hub.replies, key=lambda reply: reply.node_id)
    assert (large.payload, large.error) == (b"", "node 1 answered with 11 bytes; a message holds 10")
    assert (len(good.payload), good.error) == (10, "")


def test_many_large_answers_go_in_several_exchanges_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridges, "_MAX_HANDED_BYTES", 25)
    grid, hub = Grid(), Hub()
    bridge = Bridge(grid, hub)
    hub.out = [Outgoing(number, "query.upload", b"x") for number in range(1, 6)]
    grid.answered = {f"m{number}" for number in range(1, 6)}
    grid.payloads = {f"m{number}": bytes(30 if number == 4 else 10) for number in range(1, 6)}
    for _ in range(6):
        due(bridge)
        bridge.turn()
    assert [size for size in hub.handed if size] == [20, 10, 30, 10]
    assert [reply.node_id for reply in hub.replies] == [1, 2, 3, 4, 5]


def test_what_goes_in_one_exchange_fits_one_frame() -> None:
    assert bridges._MAX_HANDED_BYTES + MAX_PAYLOAD_BYTES < MAX_FRAME_BYTES
