"""A reply whose parts are late, or never come, holds up no other: flwr's own objects over a SuperLink of a dict."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from clawloop_server.fleet.replies import GIVEN_UP_S, Arrived, Replies
from clawloop_shared.messages import RECORD


@dataclass
class SuperLink:
    """What is announced, and which parts of it are there. Speaks as `RuntimeHttpClient` does."""

    announced: list[tuple[Any, Any]] = field(default_factory=list)
    parts: dict[str, bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    asked: list[list[str]] = field(default_factory=list)
    pulled: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    def PullMessages(self, request: Any) -> Any:
        self.asked.append(list(request.message_ids))
        found, self.announced = self.announced, []
        return SimpleNamespace(messages_list=[m for m, _ in found], message_object_trees=[t for _, t in found])

    def PullObject(self, request: Any) -> Any:
        self.pulled.append(request.object_id)
        content = self.parts.get(request.object_id, b"")
        there = request.object_id not in self.gone
        return SimpleNamespace(object_found=there, object_available=bool(content), object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


@dataclass
class World:
    link: SuperLink
    replies: Replies
    now: list[float]

    def announce(self, question_id: str, payload: bytes) -> dict[str, bytes]:
        """The parts of a reply that is announced, root first."""
        from flwr.app import ConfigRecord, RecordDict
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            iterate_object_tree,
        )

        content = RecordDict({RECORD: ConfigRecord({RECORD: payload})})
        tree, objects = get_object_tree(content), get_all_nested_objects(content)
        metadata = SimpleNamespace(message_id=content.object_id, reply_to_message_id=question_id)
        self.link.announced.append((SimpleNamespace(metadata=metadata), tree))
        return {each.object_id: objects[each.object_id].deflate() for each in iterate_object_tree(tree)}

    def pull(self, after_s: float = 0.0) -> list[Arrived]:
        self.now[0] += after_s
        return self.replies.pull(["slow", "quick"])


@pytest.fixture
def world() -> World:
    from flwr.proto.node_pb2 import Node

    link, now = SuperLink(), [0.0]
    grid = SimpleNamespace(_runtime_client=link, node=Node(node_id=1))
    return World(link, Replies(grid, 7, clock=lambda: now[0]), now)


def payload(arrived: Arrived) -> bytes:
    found: bytes = arrived.message.config_records[RECORD][RECORD]
    return found


def test_one_whose_parts_are_late_comes_when_they_are_there_and_another_meanwhile(world: World) -> None:
    slow, quick = world.announce("slow", b"s"), world.announce("quick", b"q")
    world.link.parts = quick | dict(list(slow.items())[:1])
    (found,) = world.pull()
    assert (found.question_id, payload(found)) == ("quick", b"q")
    assert world.replies.soon
    assert world.pull(0.02) == []
    assert world.link.asked == [["slow", "quick"], ["quick"]], "what was announced is not asked for again"
    world.link.parts |= slow
    (found,) = world.pull(0.02)
    assert (found.question_id, payload(found)) == ("slow", b"s")
    assert world.pull(0.02) == []
    assert len(world.link.confirmed) == 2


def test_what_came_early_is_not_fetched_again_and_again(world: World) -> None:
    slow = world.announce("slow", b"s")
    world.link.parts = dict(list(slow.items())[:1])
    world.pull()
    for _ in range(20):
        world.pull(0.02)
    assert world.link.pulled.count(next(iter(slow))) == 1


def test_the_longer_one_takes_the_less_often_it_is_looked_for(world: World) -> None:
    world.announce("slow", b"s")
    world.pull()
    for _ in range(1000):
        world.pull(GIVEN_UP_S / 1001)
    assert len(world.link.pulled) < 120
    assert not world.replies.soon


@pytest.mark.parametrize(("gone", "after_s"), [(False, GIVEN_UP_S), (True, 0.02)])
def test_one_that_will_not_come_is_told_and_let_go(world: World, gone: bool, after_s: float) -> None:
    slow = world.announce("slow", b"s")
    assert world.pull() == []
    world.link.gone = set(slow) if gone else set()
    (found,) = world.pull(after_s)
    assert (found.question_id, found.message) == ("slow", None)
    assert "its reply" in found.error
    assert len(world.link.confirmed) == 1
    assert world.pull(1) == []
