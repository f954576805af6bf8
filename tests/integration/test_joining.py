"""Joining, new keys and leaving with a real SuperLink: what the desks say of a device is what Flower does with its key.
The tests are one device's life, in order: it waits, is approved, is copied, sleeps, gets new keys, leaves."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from clawloop_edge.node import rotating
from clawloop_edge.node.flower import FlowerTransport
from clawloop_edge.node.join import Membership, join
from clawloop_edge.node.leaving import say_due
from clawloop_edge.node.standing import MemberTransport, new_instance
from clawloop_edge.node.transport import NodeRefused
from clawloop_edge.node.worker import NodeState
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.deletions import Deletions
from clawloop_edge.state import forget_membership, keep_membership, membership
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.superlink import Fleet
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.home import Home, create
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import DeviceState
from clawloop_server.hub.front import Front
from clawloop_server.hub.invitations import Invitations
from clawloop_server.hub.join import JoinDesk
from clawloop_server.hub.members import HubMembers
from clawloop_server.hub.membership import MemberDesk
from clawloop_server.hub.registrar import Registrar
from clawloop_server.release.keys import create_keys
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import Invitation, SignedAnswer, write_invitation
from clawloop_shared.receipts import sign_item
from clawloop_shared.signing import key_words

from .fleet_parts import KEY, LINE, Device, Hub, until


class MemberHub(Hub):
    """A hub whose devices are a real table, and have to be approved."""

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.server_keys = create_keys(home)
        self.real_vault = Vault.open(home, self.server_keys.master)
        self.members = HubMembers(self.real_vault.database, line_id=LINE.line_id, approve=True)

    def said(self) -> SignedAnswer:
        return self.server_keys.release_statement(now_ms=time.time_ns() // 1_000_000)

    async def _start(self) -> None:
        self.tls = ensure_tls(self._home.keys)
        dispatcher = Dispatcher(
            vault=self,
            releases=self,
            members=self.members,
            sign=lambda received: sign_item(received, KEY),
            settings=DispatchSettings(upload_every_s=0.3),
        )
        self.fleet = Fleet(self._home, self.tls, port=dispatcher, members=self.members)
        await self.fleet.start()
        registrar, keys = Registrar(self.fleet, self.members), self.server_keys
        joining = JoinDesk(
            self.members,
            register=lambda _, device_id: registrar.register(device_id),
            line=LINE,
            release_key=keys.release_public,
            statement=self.said,
        )
        member = MemberDesk(
            self.members.devices,
            register=registrar.register,
            release_key=keys.release,
            statement=self.said,
            per_minute=1e6,
        )
        self.front = Front(
            self.fleet.address,
            joining=joining,
            forgetting=self,
            upstream_tls=client_context(self.tls),
            is_open=lambda: self.fleet.open,
            members=member,
        )
        port = await self.front.start("127.0.0.1", 0, tls=server_context(self.tls))
        self.url = f"https://127.0.0.1:{port}"
        await self.fleet.wait_ready()
        self._looking = asyncio.create_task(self._look(registrar))

    async def answer(self, body: bytes) -> DeskAnswer:
        raise AssertionError("nobody forgets here")

    async def _look(self, registrar: Registrar) -> None:
        while True:
            await registrar.settle()
            await asyncio.sleep(0.1)

    async def _stop(self) -> None:
        self._looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._looking
        await super()._stop()
        self.real_vault.close()

    def invite(self) -> str:
        code = Invitations(self.real_vault.database).create()
        return write_invitation(Invitation(self.url, self.tls.ca.read_text(), self.server_keys.root_public, code))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemberHub]:
    hub = MemberHub(create(tmp_path_factory.mktemp("server")))
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, hub: MemberHub) -> Iterator[Pool]:
    """The pool of a device that has joined."""
    with Pool.open(tmp_path_factory.mktemp("edge"), KnownKey.of(b"k" * 32), writer=True) as opened:
        Deletions(opened)
        keep_membership(opened, join(hub.invite(), line=LINE))
        yield opened


def member_of(pool: Pool) -> Membership:
    found = membership(pool)
    assert found is not None
    return found


def edge(hub: MemberHub, member: Membership) -> Device:
    """A running edge of that member, started anew, which asks often how it stands."""
    node_id = hub.members.devices.get(member.device_id).node_id  # as the edge remembers it
    inner = FlowerTransport(member, node_id=node_id or 0, heartbeat_s=10)
    return Device(member, transport=MemberTransport(inner, member, instance=new_instance(), every_s=0.5))


@contextlib.contextmanager
def running(device: Device) -> Iterator[Device]:
    device.worker.start()
    try:
        yield device
    finally:
        assert device.worker.stop()


def arrives(hub: MemberHub, device: Device, item_id: str) -> None:
    """An item of this device comes, once, and is acknowledged."""
    device.put(item_id)
    until(lambda: item_id in [item.item_id for _, item in hub.kept] and not device.unacknowledged)
    assert [d for d, item in hub.kept if item.item_id == item_id] == [device.membership.device_id]


def superlink() -> psutil.Process:
    """The SuperLink of ours (not its guard)."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "guard.py" not in " ".join(line) and any(part.endswith("flower-superlink") for part in line[:3]):
                return process
    raise AssertionError("no SuperLink is running")


def test_a_device_comes_in_by_itself_once_it_is_approved(hub: MemberHub, pool: Pool) -> None:
    member = member_of(pool)
    with running(edge(hub, member)) as device:
        until(lambda: device.worker.status.state is NodeState.WAITING)
        assert key_words(member.keys.public) in device.worker.status.detail
        bare = FlowerTransport(member)
        with pytest.raises(NodeRefused):
            bare.connect()
        bare.close()
        hub.members.devices.approve(member.device_id)
        arrives(hub, device, "approved")
        assert device.worker.status.state is NodeState.ONLINE


def test_of_a_copied_home_the_newest_edge_serves_and_nothing_is_lost_or_doubled(hub: MemberHub, pool: Pool) -> None:
    with running(edge(hub, member_of(pool))) as first:
        arrives(hub, first, "of the first")
        with running(edge(hub, member_of(pool))) as second:
            until(lambda: first.worker.status.state is NodeState.TAKEN)
            arrives(hub, second, "of the second")
            hub.version += 1
            until(lambda: second.version == hub.version)
            assert first.version < hub.version
        device = hub.members.devices.get(first.membership.device_id)
        assert device.doubled(now_ms=time.time_ns() // 1_000_000)


def test_a_device_that_slept_while_the_superlink_forgot_it_catches_up(hub: MemberHub, pool: Pool) -> None:
    member = member_of(pool)
    with running(edge(hub, member)) as device:
        arrives(hub, device, "before sleep")
        node_id = hub.members.devices.get(member.device_id).node_id
        assert device.worker.stop(silent=True)  # as a lid that is closed: no goodbye
    starts = hub.fleet.status.bridge_starts
    superlink().send_signal(signal.SIGKILL)
    hub.version += 1
    until(lambda: hub.fleet.status.bridge_starts > starts)
    assert hub.members.devices.get(member.device_id).node_id != node_id
    with running(edge(hub, member)) as device:
        arrives(hub, device, "after sleep")
        until(lambda: device.version == hub.version)


def test_with_new_keys_the_old_ones_are_refused_and_the_device_goes_on(hub: MemberHub, pool: Pool) -> None:
    old = member_of(pool)
    with running(edge(hub, old)) as before:
        arrives(hub, before, "by the old keys")
        rotating.rotate(pool, old)
        until(lambda: before.worker.status.state is NodeState.REFUSED)
        new = member_of(pool)
        with running(edge(hub, new)) as after:
            arrives(hub, after, "by the new keys")
    bare = FlowerTransport(old)
    with pytest.raises(NodeRefused):
        bare.connect()
    bare.close()


def test_who_left_is_out_of_flower_too(hub: MemberHub, pool: Pool) -> None:
    member = member_of(pool)
    with running(edge(hub, member)) as device:
        arrives(hub, device, "the last")
        forget_membership(pool)
        assert say_due(pool) == 1
        until(lambda: device.worker.status.state is NodeState.REFUSED and "left" in device.worker.status.detail)
    assert hub.members.devices.get(member.device_id).state is DeviceState.LEFT
    until(lambda: hub.members.devices.get(member.device_id).node_id is None)
    bare = FlowerTransport(member)
    with pytest.raises(NodeRefused):
        bare.connect()
    bare.close()
