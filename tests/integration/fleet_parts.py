"""The hub's parts around a real fleet, and a device with nothing behind its handlers but lists: for tests of the way
between them."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from clawloop_edge.node.flower import FlowerTransport
from clawloop_edge.node.join import Membership
from clawloop_edge.node.transport import Transport
from clawloop_edge.node.worker import NodeSettings, NodeWorker
from clawloop_server.errors import InvitationError
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_server.fleet.superlink import Fleet
from clawloop_server.fleet.tls import TlsFiles, client_context, ensure_tls, server_context
from clawloop_server.home import Home
from clawloop_server.hub.front import Front
from clawloop_server.hub.join import JoinDesk
from clawloop_shared import signing
from clawloop_shared.deltas import LearnReply, LearnTask
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.membership import RELEASE, KeyStatement, sign_statement
from clawloop_shared.messages import (
    AdapterOffer,
    AdapterReply,
    Invitation,
    ItemReceived,
    JoinRequest,
    SecureReply,
    SecureRequest,
    SignedAnswer,
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
ROOT = signing.new_key()
LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
LARGE = 7 << 20
T = TypeVar("T")


def until(condition: Callable[[], object], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def statement() -> SignedAnswer:
    """The root key's word for the release key of this hub."""
    said = KeyStatement(key=b"r" * 32, purpose=RELEASE, not_before_ms=0, expires_ms=1 << 53)
    return sign_statement(said, ROOT)


class Admitted:
    waiting = False

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id


class Hub:
    """The hub's parts around the fleet: records in memory, everything else real, on a loop in a thread of its own."""

    def __init__(self, home: Home, *, stock_nodes: bool = False) -> None:
        self._stock_nodes = stock_nodes
        self.codes = {"one", "two", "three", "four"}
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
        desk = JoinDesk(self, register=self._register, line=LINE, release_key=b"r" * 32, statement=statement)
        self.front = Front(
            self.fleet.address,
            joining=desk,
            forgetting=desk,
            upstream_tls=client_context(self.tls),
            is_open=lambda: self.fleet.open,
            stock_nodes=self._stock_nodes,
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
        return write_invitation(Invitation(self.url, self.tls.ca.read_text(), signing.public_key(ROOT), code))


class Device:
    """An edge with nothing behind its handlers but lists."""

    def __init__(self, membership: Membership, *, transport: Transport | None = None) -> None:
        self.version = 0
        self.adapters: list[AdapterOffer] = []
        self.outbox: queue.SimpleQueue[UploadItem] = queue.SimpleQueue()
        self.unacknowledged: dict[str, UploadItem] = {}
        self.membership = membership
        self.transport = transport or FlowerTransport(membership, heartbeat_s=10)
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
