"""The whole way between devices and hub with real parts: SuperLink over TLS with node keys, process isolation, the
bridge's run, the public front, and embedded nodes. One fleet serves all tests of this file."""

import asyncio
import http.client
import json
import os
import queue
import signal
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from clawloop_edge.node.flower import FlowerTransport
from clawloop_edge.node.join import Membership, join
from clawloop_edge.node.transport import NodeError, NodeRefused
from clawloop_edge.node.worker import NodeSettings, NodeState, NodeWorker
from clawloop_server.errors import InvitationError
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.superlink import Fleet
from clawloop_server.fleet.tls import TlsFiles, client_context, ensure_tls, server_context
from clawloop_server.home import Home, create
from clawloop_server.hub.front import Front
from clawloop_server.hub.join import JoinDesk
from clawloop_shared import signing
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import (
    AdapterOffer,
    AdapterReply,
    Invitation,
    ItemReceived,
    JoinRequest,
    SecureReply,
    SecureRequest,
    StatusReply,
    StatusRequest,
    UploadItem,
    UploadReply,
    UploadRequest,
    write_invitation,
)
from clawloop_shared.model_line import ModelLine
from clawloop_shared.receipts import open_item, sign_item

KEY = signing.new_key()
LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
LARGE = 7 << 20
T = TypeVar("T")


def until(condition: Callable[[], object], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Admitted:
    def __init__(self, device_id: str) -> None:
        self.device_id = device_id


class Hub:
    """The hub's parts around the fleet: records in memory, everything else real, on a loop in a thread of its own."""

    def __init__(self, home: Home) -> None:
        self.codes = {"one", "two", "three"}
        self.keys: dict[str, str] = {}
        self.nodes: dict[int, str] = {}
        self.kept: list[tuple[str, UploadItem]] = []
        self.version = 0
        self.adapter = b""
        self._home, self._loop = home, asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub", daemon=True)
        self.tls = TlsFiles(home.keys)
        self.url = ""

    # what the vault, the registry and the device table would be

    def redeem(self, request: JoinRequest) -> Admitted:
        if request.code not in self.codes:
            raise InvitationError("this invitation is not known here")
        self.codes.discard(request.code)
        device_id = f"device-{request.code}"
        self.keys[device_id] = request.node_key_pem
        return Admitted(device_id)

    def set_node(self, device_id: str, node_id: int) -> None:
        self.nodes[node_id] = device_id

    def node_keys(self) -> dict[str, str]:
        return dict(self.keys)

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        self.kept += [(device_id, item) for item in items]
        return [ItemReceived(device_id=device_id, item_id=i.item_id, received_ms=1, sha256="") for i in items]

    def current_version(self) -> int:
        return self.version

    def offer(self, version: int) -> AdapterOffer:
        return AdapterOffer(SignedManifest(b"%d" % version, "key", b"signature"), {"weights": self.adapter})

    def device_of(self, node_id: int) -> str | None:
        device_id = self.nodes.get(node_id)
        return device_id if device_id in self.keys else None

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        pass

    def cohort(self) -> int:
        return len(self.keys)

    # running

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        found: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return found.result(180)

    def start(self) -> None:
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        try:
            self.call(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _start(self) -> None:
        self.tls = ensure_tls(self._home.keys)
        settings = DispatchSettings(upload_every_s=0.3)
        dispatcher = Dispatcher(
            vault=self, releases=self, members=self, sign=lambda received: sign_item(received, KEY), settings=settings
        )
        self.fleet = Fleet(self._home, self.tls, port=dispatcher, members=self)
        await self.fleet.start()
        desk = JoinDesk(self, register=self._register, line=LINE, release_key=b"r" * 32)
        self.front = Front(
            self.fleet.address,
            joining=desk,
            forgetting=desk,
            upstream_tls=client_context(self.tls),
            is_open=lambda: self.fleet.open,
        )
        port = await self.front.start("127.0.0.1", 0, tls=server_context(self.tls))
        self.url = f"https://127.0.0.1:{port}"
        await self.fleet.wait_ready()

    async def _register(self, key_pem: str, device_id: str) -> int:
        return await self.fleet.admit(device_id, key_pem)

    async def _stop(self) -> None:
        await self.front.stop()
        await self.fleet.stop()

    def invitation(self, code: str) -> str:
        return write_invitation(Invitation(self.url, self.tls.ca.read_text(), b"k" * 32, code))


class Device:
    """An edge with nothing behind its handlers but lists."""

    def __init__(self, membership: Membership) -> None:
        self.version = 0
        self.adapters: list[AdapterOffer] = []
        self.outbox: queue.SimpleQueue[UploadItem] = queue.SimpleQueue()
        self.unacknowledged: dict[str, UploadItem] = {}
        self.transport = FlowerTransport(membership, heartbeat_s=10)
        self.worker = NodeWorker(self.transport, self, settings=NodeSettings(poll_s=0.1, max_retry_s=0.5, refused_s=1))

    def status(self, request: StatusRequest) -> StatusReply:
        return StatusReply("full", LINE, self.version, len(self.unacknowledged), "0")

    def upload(self, request: UploadRequest) -> UploadReply:
        for receipt in request.receipts:
            self.unacknowledged.pop(open_item(receipt, signing.public_key(KEY)).item_id, None)
        while not self.outbox.empty():
            item = self.outbox.get()
            self.unacknowledged[item.item_id] = item
        return UploadReply(list(self.unacknowledged.values()), False, self.version)

    def adapter(self, offer: AdapterOffer) -> AdapterReply:
        self.adapters.append(offer)
        self.version = int(offer.manifest.body)
        return AdapterReply(self.version, installed=True)

    def learn(self, task: LearnTask) -> LearnReply:
        return LearnReply(task_id=task.task_id, accepted=False, reason="nothing to learn")

    def secure(self, request: SecureRequest) -> SecureReply:
        return SecureReply(request.sum_id, request.phase, refused="alone")

    def may_leave(self, item_ids: Sequence[str]) -> bool:
        return True

    def stopped(self, item_ids: Sequence[str]) -> None:
        pass

    def put(self, item_id: str, body: bytes = b"body") -> None:
        self.outbox.put(UploadItem(item_id, "receipt", "steps", body))


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


def test_an_invitation_is_good_once_and_its_certificate_is_pinned(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"403.*not known"):
        join(hub.invitation("used"), line=LINE)
    other = ensure_tls(tmp_path).ca.read_text()
    with pytest.raises(NodeError, match="not the server of the invitation"):
        join(write_invitation(Invitation(hub.url, other, b"k" * 32, "one")), line=LINE)


def test_a_key_that_was_not_registered_is_refused(hub: Hub, device: Device) -> None:
    known = device.transport._membership
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
