"""The stock SuperNode as a driver, with the real SuperLink, front and bridge: the same interface and answers as the
embedded node, no code of the server's run, and nothing left behind."""

import os
import queue
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from clawloop_edge.node.join import join
from clawloop_edge.node.stock import StockTransport
from clawloop_edge.node.transport import Answer, Incoming, NodeError, ServerAway, Withdrawn
from clawloop_edge.node.worker import NodeState
from clawloop_server.home import create

from .fleet_parts import LARGE, LINE, Device, Hub, until


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub(create(tmp_path_factory.mktemp("server")), stock_nodes=True)
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def device(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    membership = join(hub.invitation("one"), line=LINE)
    device = Device(membership, transport=StockTransport(membership, folder=tmp_path_factory.mktemp("edge") / "node"))
    device.worker.start()
    yield device
    assert device.worker.stop(20)


def supernodes() -> list[psutil.Process]:
    """The stock SuperNodes that this process started (not their guards)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if any(part.endswith("flower-supernode") for part in line[:3]):
            found.append(process)
    return found


def kept(hub: Hub) -> dict[str, bytes]:
    return {item.item_id: item.body for _, item in hub.kept}


def test_items_and_adapters_cross_as_with_the_embedded_node(hub: Hub, device: Device) -> None:
    device.put("first")
    body = os.urandom(LARGE)
    device.put("large", body)
    hub.adapter, hub.version = os.urandom(LARGE), 1
    until(lambda: {"first", "large"} <= kept(hub).keys(), 80)
    assert kept(hub)["large"] == body
    until(lambda: device.version == 1, 60)
    assert device.adapters[-1].files == {"weights": hub.adapter}
    until(lambda: not device.unacknowledged, 60)
    assert device.worker.status.state is NodeState.ONLINE


def test_nothing_runs_the_servers_app_and_the_key_does_not_stay_on_the_disk(hub: Hub, device: Device) -> None:
    (node,) = supernodes()
    assert node.children(recursive=True) == []
    transport = device.transport
    assert isinstance(transport, StockTransport)
    left = {path.relative_to(transport._folder).as_posix(): path for path in transport._folder.rglob("*")}
    assert "node.key" not in left
    assert not any("apps" in name or name.endswith((".py", ".fab")) for name in left)
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (left["superexec.secret"], left["ca.pem"]))


def test_a_supernode_that_dies_is_started_again(hub: Hub, device: Device) -> None:
    (node,) = supernodes()
    node.terminate()
    until(lambda: [one.pid for one in supernodes() if one.pid != node.pid], 60)
    device.put("after its end")
    until(lambda: "after its end" in kept(hub), 90)


def pulled(transport: StockTransport) -> Incoming:
    deadline = time.monotonic() + 60
    while (incoming := transport.receive()) is None:
        assert time.monotonic() < deadline, "no message came"
        time.sleep(0.05)
    return incoming


def test_a_no_cuts_it_and_no_process_is_left(hub: Hub, device: Device, tmp_path: Path) -> None:
    before = {one.pid for one in supernodes()}
    transport = StockTransport(join(hub.invitation("two"), line=LINE), folder=tmp_path / "node")
    transport.connect()
    try:
        incoming = pulled(transport)
        with pytest.raises(Withdrawn):
            transport.send(incoming, Answer(b"late"), permit=lambda: False)
        transport.cut()
        until(lambda: {one.pid for one in supernodes()} == before)
        with pytest.raises(Withdrawn):
            transport.receive()
    finally:
        transport.close(goodbye=False)
    assert not (tmp_path / "node" / "node.key").exists()


def test_a_start_can_be_cut(hub: Hub, device: Device, tmp_path: Path) -> None:
    member = join(hub.invitation("three"), line=LINE)
    wrong = msgspec.structs.replace(member, url="https://127.0.0.1:1")
    transport = StockTransport(wrong, folder=tmp_path / "node")
    answers: queue.SimpleQueue[NodeError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            transport.connect()
        except NodeError as error:
            answers.put(error)

    thread = threading.Thread(target=connect)
    thread.start()
    until(lambda: transport._process is not None)
    transport.cut()
    thread.join(30)
    assert isinstance(answers.get(timeout=1), Withdrawn | ServerAway)
    transport.close(goodbye=False)
