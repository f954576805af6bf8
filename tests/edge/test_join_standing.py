"""Before it connects, a device asks how it stands: it waits for approval, minds its clock, yields to a newer edge with
its keys, and names a server that is not the one that was joined."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawloop_edge.node import standing
from clawloop_edge.node.join import Membership, join
from clawloop_edge.node.standing import SILENT_MS, MemberTransport, ask_standing, new_instance, wall_clock_ms
from clawloop_edge.node.transport import (
    Answer,
    ClockOff,
    Incoming,
    NodeError,
    NodeRefused,
    Permit,
    ServerAway,
    Taken,
    Waiting,
)
from clawloop_server.fleet.tls import ensure_tls
from clawloop_shared import signing
from clawloop_shared.membership import KeyStatement, Stand, Standing

from .members_hub import LINE, MembersHub, serving

HOUR_MS = 3_600_000


class Inner:
    """A transport that only notes what is done with it."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.refuses = False

    def connect(self) -> None:
        if self.refuses:
            raise NodeRefused("401")
        self.done.append("connect")

    def receive(self) -> Incoming | None:
        self.done.append("receive")
        return None

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        self.done.append("send")

    def cut(self) -> None:
        self.done.append("cut")

    def close(self, *, goodbye: bool = True) -> None:
        self.done.append("goodbye" if goodbye else "close")


class Edge:
    """A device at a hub: its transport, what it was told, and its clock, as far as it is off."""

    def __init__(self, member: Membership) -> None:
        self.inner, self.told, self.off_ms, self.now_s = Inner(), list[Standing](), 0, 0.0
        self.transport = MemberTransport(
            self.inner,
            member,
            instance=new_instance(),
            note=self.told.append,
            every_s=60,
            clock=lambda: self.now_s,
            now_ms=lambda: wall_clock_ms() + self.off_ms,
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MembersHub]:
    with serving(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def member(hub: MembersHub) -> Iterator[Membership]:
    yield join(hub.invite(), line=LINE)
    hub.clock_off_ms = 0


def test_a_member_connects_and_asks_again_now_and_then(hub: MembersHub, member: Membership) -> None:
    edge = Edge(member)
    edge.transport.connect()
    for _ in range(3):
        edge.transport.receive()
    assert (edge.inner.done, len(edge.told)) == (["connect", *["receive"] * 3], 1)
    edge.now_s += 61
    edge.transport.receive()
    assert (len(edge.told), edge.transport.warning) == (2, "")
    edge.transport.close()
    assert edge.inner.done[-1] == "goodbye"


def test_once_it_was_cut_nothing_more_is_asked(hub: MembersHub, member: Membership) -> None:
    edge = Edge(member)
    edge.transport.connect()
    edge.transport.cut()
    edge.now_s += 61
    edge.transport.receive()
    assert len(edge.told) == 1


def test_a_device_waits_until_it_is_approved_and_both_sides_show_the_same_words(tmp_path: Path) -> None:
    with serving(tmp_path, approve=True) as hub:
        member = join(hub.invite(), line=LINE)
        assert (member.waiting, member.node_id) == (True, 0)
        edge = Edge(member)
        (device,) = hub.devices.all()
        with pytest.raises(Waiting, match=f"compare these words: {signing.key_words(device.device_key)}"):
            edge.transport.connect()
        assert edge.inner.done == []
        hub.devices.approve(device.device_id)
        edge.transport.connect()
        assert edge.inner.done == ["connect"]


@pytest.mark.parametrize("end", ["revoke", "leave", "bury"])
def test_who_is_no_member_any_more_is_told_so_within_a_period(hub: MembersHub, member: Membership, end: str) -> None:
    edge = Edge(member)
    edge.transport.connect()
    getattr(hub.devices, end)(member.device_id)
    edge.transport.receive()
    edge.now_s += 61
    words = {"revoke": "lets it sync no more", "leave": "it has left", "bury": "was it deleted"}
    with pytest.raises(NodeRefused, match=words[end]):
        edge.transport.receive()


@pytest.mark.parametrize(
    ("off_ms", "words"),
    [
        (24 * HOUR_MS, "ahead by 24.0 h"),
        (-24 * HOUR_MS, "behind by 24.0 h"),
        (10_000, "ahead by 1"),
        (-400_000, "behin"),
    ],
)
def test_a_clock_that_is_off_is_named_and_sync_goes_on_when_it_is_right(
    hub: MembersHub, member: Membership, off_ms: int, words: str
) -> None:
    edge = Edge(member)
    edge.off_ms = off_ms
    with pytest.raises(ClockOff, match=f"this device's clock is {words}"):
        edge.transport.connect()
    assert edge.inner.done == []
    edge.off_ms = 0
    edge.transport.connect()
    edge.off_ms = off_ms
    edge.now_s += 61
    with pytest.raises(ClockOff):
        edge.transport.receive()


def test_a_clock_within_what_flower_takes_is_right(hub: MembersHub, member: Membership) -> None:
    edge = Edge(member)
    for edge.off_ms in (-250_000, 2_000):
        edge.transport.connect()


def test_of_two_edges_with_one_key_the_newest_serves_and_neither_puts_the_other_out(
    hub: MembersHub, member: Membership
) -> None:
    first, second = Edge(member), Edge(member)
    first.transport.connect()
    second.transport.connect()
    first.now_s += 61
    with pytest.raises(Taken, match="copy of this home"):
        first.transport.receive()
    first.transport.close()
    assert first.inner.done[-1] == "close", "a goodbye would end the other's connection: Flower knows only the key"
    with pytest.raises(Taken):
        first.transport.connect()
    second.now_s += 61
    second.transport.receive()
    assert "another edge tries to come in" in second.transport.warning
    assert hub.devices.get(member.device_id).doubled(now_ms=hub.now_ms())


def test_an_edge_that_yielded_comes_back_when_the_other_is_silent(hub: MembersHub, member: Membership) -> None:
    first, second = Edge(member), Edge(member)
    first.transport.connect()
    second.transport.connect()
    with pytest.raises(Taken):
        first.transport.connect()
    hub.clock_off_ms = first.off_ms = SILENT_MS + 1000  # so much later
    first.transport.connect()
    assert first.inner.done == ["connect", "connect"]


def test_flower_that_does_not_know_a_member_yet_is_waited_for(hub: MembersHub, member: Membership) -> None:
    edge = Edge(member)
    edge.inner.refuses = True
    with pytest.raises(ServerAway, match="about to let this device in"):
        edge.transport.connect()


def test_another_certificate_authority_is_refused_and_named(
    hub: MembersHub, member: Membership, tmp_path: Path
) -> None:
    other = ensure_tls(tmp_path).ca.read_text()
    edge = Edge(msgspec.structs.replace(member, ca_pem=other))
    with pytest.raises(NodeError, match=r"not the server of the invitation.*new invitation"):
        edge.transport.connect()


def test_another_root_key_is_refused_and_named(hub: MembersHub, member: Membership) -> None:
    edge = Edge(msgspec.structs.replace(member, root_key=signing.public_key(signing.new_key())))
    with pytest.raises(NodeRefused, match="root key that was compared"):
        edge.transport.connect()


def test_another_release_key_is_refused_and_named(hub: MembersHub, member: Membership) -> None:
    edge = Edge(msgspec.structs.replace(member, release_key=signing.public_key(signing.new_key())))
    with pytest.raises(NodeRefused, match="does not prove that it is the server that was joined"):
        edge.transport.connect()


def test_a_server_that_shows_no_word_of_its_root_key_is_held_to_the_one_that_it_showed_on_joining(
    hub: MembersHub, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As whoever stole the release key alone would do."""
    heard = ask_standing

    def without(*args: Any, **kwargs: Any) -> Standing:
        return msgspec.structs.replace(heard(*args, **kwargs), statement=None)

    monkeypatch.setattr(standing, "ask_standing", without)
    assert member.statement is not None
    Edge(member).transport.connect()
    until_ms = msgspec.json.decode(member.statement.payload, type=KeyStatement).expires_ms
    hub.clock_off_ms = until_ms - wall_clock_ms() + 1000
    edge = Edge(member)
    edge.off_ms = hub.clock_off_ms
    with pytest.raises(NodeRefused, match="root key that was compared"):
        edge.transport.connect()
    with pytest.raises(NodeRefused, match="shows no word of its root key"):
        Edge(msgspec.structs.replace(member, statement=None)).transport._check_release_key(
            Standing(device_id="", instance="", at_ms=0, state=Stand.JOINED, holds=True, held_ms=0)
        )
    monkeypatch.setattr(standing, "ask_standing", heard)
    edge.transport.connect()  # a new word
    hub.clock_off_ms = 0


def test_a_release_key_that_the_root_does_not_vouch_for_is_refused_on_joining(
    hub: MembersHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = type(hub.keys)(hub.keys.master, signing.new_key(), hub.keys.release)
    monkeypatch.setattr(MembersHub, "statement", lambda self: stranger.release_statement(now_ms=self.now_ms()))
    hub.stop()
    hub.start()
    with pytest.raises(NodeError, match="no release key that its root key vouches for"):
        join(hub.invite(), line=LINE)
    monkeypatch.undo()
    hub.stop()
    hub.start()
