"""The whole way between devices and hub with real parts: SuperLink over TLS with node keys, process isolation, the
bridge's run, the public front, and embedded nodes. One fleet serves all tests of this file."""

import http.client
import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from clawloop_edge.node.flower import FlowerTransport
from clawloop_edge.node.join import join
from clawloop_edge.node.transport import Answer, NodeError, NodeRefused, Permit
from clawloop_edge.node.worker import NodeState
from clawloop_server.fleet.replies import GIVEN_UP_S
from clawloop_server.fleet.tls import ensure_tls
from clawloop_server.home import create
from clawloop_shared.messages import Invitation, UploadItem, write_invitation

from .fleet_parts import LARGE, LINE, Device, Hub, until


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub(create(tmp_path_factory.mktemp("server")))
    others = psutil.Process().children(recursive=True)
    hub.start()
    children = [child for child in psutil.Process().children(recursive=True) if child not in others]
    yield hub
    hub.stop()
    left = [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []


@pytest.fixture(scope="module")
def device(hub: Hub) -> Iterator[Device]:
    device = Device(join(hub.invitation("one"), line=LINE))
    device.worker.start()
    yield device
    assert device.worker.stop()


def kept(hub: Hub) -> list[str]:
    return [item.item_id for _, item in hub.kept]


def test_items_arrive_and_are_acknowledged(hub: Hub, device: Device) -> None:
    device.put("first")
    until(lambda: "first" in kept(hub))
    until(lambda: not device.unacknowledged)
    assert hub.kept[0] == ("device-one", UploadItem("first", "receipt", "steps", b"body"))
    assert device.worker.status.state is NodeState.ONLINE


def test_an_adapter_is_delivered_soon_after_its_release(hub: Hub, device: Device) -> None:
    hub.adapter, hub.version = os.urandom(100_000), 1
    until(lambda: device.version == 1, 10)
    assert device.adapters[-1].files == {"weights": hub.adapter}


def test_payloads_over_flowers_part_size_arrive_whole_in_both_directions(hub: Hub, device: Device) -> None:
    body = os.urandom(LARGE)
    device.put("large", body)
    until(lambda: "large" in kept(hub))
    assert next(item.body for _, item in hub.kept if item.item_id == "large") == body
    hub.adapter, hub.version = os.urandom(LARGE), 2
    until(lambda: device.version == 2)
    assert device.adapters[-1].files == {"weights": hub.adapter}


def test_a_second_device_is_served_beside_the_first(hub: Hub, device: Device) -> None:
    other = Device(join(hub.invitation("two"), line=LINE))
    other.worker.start()
    try:
        other.put("from two")
        device.put("from one")
        until(lambda: {("device-two", "from two"), ("device-one", "from one")} <= {(d, i.item_id) for d, i in hub.kept})
        until(lambda: other.version == hub.version)
    finally:
        assert other.worker.stop()


class HalfSent(FlowerTransport):
    """Announces its answer, and dies before it has sent the parts."""

    def _push(self, run_id: int, pushed: Any, objects: dict[str, Any], *, permit: Permit) -> None:
        assert pushed.objects_to_push


def test_a_device_that_dies_in_the_middle_of_an_answer_holds_up_nobody_and_is_back_soon(
    hub: Hub, device: Device
) -> None:
    membership = join(hub.invitation("four"), line=LINE)
    dying = HalfSent(membership)
    dying.connect()
    while (asked := dying.receive()) is None:
        time.sleep(0.05)
    dying.send(asked, Answer(b"x"), permit=lambda: True)
    dying.cut()
    time.sleep(1)  # by then the bridge has its answer before it, in part
    began = time.monotonic()
    device.put("beside half an answer")
    until(lambda: "beside half an answer" in kept(hub), 20)
    reborn = Device(membership)
    reborn.worker.start()
    try:
        reborn.put("after half an answer")
        until(lambda: "after half an answer" in kept(hub), 20)
    finally:
        assert reborn.worker.stop()
    assert time.monotonic() - began < GIVEN_UP_S / 4
    dying.close(goodbye=False)


def test_an_invitation_is_good_once_and_its_certificate_is_pinned(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"403.*not known"):
        join(hub.invitation("used"), line=LINE)
    other = ensure_tls(tmp_path).ca.read_text()
    with pytest.raises(NodeError, match="not the server of the invitation"):
        join(write_invitation(Invitation(hub.url, other, b"k" * 32, "one")), line=LINE)


def test_a_key_that_was_not_registered_is_refused(hub: Hub, device: Device) -> None:
    known = device.membership
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    transport = FlowerTransport(msgspec.structs.replace(known, node_key_pem=pem))
    with pytest.raises(NodeRefused):
        transport.connect()
    transport.close()
    assert device.worker.status.state is NodeState.ONLINE


def test_a_device_that_died_without_a_goodbye_is_back_at_once(hub: Hub) -> None:
    membership = join(hub.invitation("three"), line=LINE)
    first, second = FlowerTransport(membership), FlowerTransport(membership)
    first.connect()
    began = time.monotonic()
    second.connect()
    assert time.monotonic() - began < 10
    second.close()
    first.close()


def post(hub: Hub, path: str, *, method: str = "POST", headers: dict[str, str] | None = None) -> tuple[int, Any]:
    context = ssl.create_default_context(cafile=str(hub.tls.ca))
    host, port = hub.url.removeprefix("https://").split(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=30)
    try:
        connection.request(method, path, b"" if method == "POST" else None, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}")
    finally:
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/get-fab",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e%2fcontrol%2flist-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/pull-messages?a=b",
        "//v1/control/list-nodes",
    ],
)
def test_the_front_shows_nothing_but_what_devices_need(hub: Hub, path: str) -> None:
    status, body = post(hub, path)
    assert (status, body["error"]["message"]) == (404, "there is nothing here")


def test_the_front_refuses_other_methods_encodings_and_sizes(hub: Hub) -> None:
    assert post(hub, "/v1/fleet/pull-messages", method="GET")[0] == 404
    assert post(hub, "/v1/fleet/pull-messages", headers={"Content-Encoding": "gzip"})[0] == 415
    assert post(hub, "/v1/fleet/push-object", headers={"Content-Length": str(1 << 40)})[0] == 413
    assert post(hub, "/v1/join", headers={"Content-Length": str(1 << 20)})[0] == 413
    assert post(hub, "/v1/join")[0] == 400


def find(command: str) -> psutil.Process:
    """The flower process of ours (not its guard) whose program has this name."""
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "guard.py" not in " ".join(line) and any(part.endswith(command) for part in line[:3]):
            return process
    raise AssertionError(f"no {command} is running")


@pytest.mark.parametrize("command", ["flwr-serverapp", "flower-superexec", "flower-superlink"])
def test_a_killed_part_heals_by_itself(hub: Hub, device: Device, command: str) -> None:
    victim = find(command)
    starts = hub.fleet.status.bridge_starts
    victim.send_signal(signal.SIGKILL)
    device.put(f"after {command}")
    hub.version += 1
    until(lambda: hub.fleet.status.bridge_starts > starts)
    until(lambda: f"after {command}" in kept(hub))
    until(lambda: device.version == hub.version)
    assert find(command).pid != victim.pid


def test_nothing_that_was_acknowledged_is_missing(hub: Hub, device: Device) -> None:
    until(lambda: not device.unacknowledged)
    assert {"first", "large", "from one"} <= set(kept(hub))
