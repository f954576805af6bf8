"""A public port with its desk for large things, and a member that may use it."""

import asyncio
import http.client
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.node.join import Membership
from clawloop_server.errors import DeviceError
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.hub.blobs import BlobDesk
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Device, DeviceState
from clawloop_server.hub.front import Front
from clawloop_server.vault.seal import DeviceSeal
from clawloop_shared import signing, wire
from clawloop_shared.blobs import (
    BLOB_PATH,
    FETCH_BYTES,
    PART_BYTES,
    PartHead,
    sign_part,
    signed_address,
)
from clawloop_shared.files import sha256
from clawloop_shared.manifest import FileEntry
from clawloop_shared.messages import ItemReceived, UploadItem
from clawloop_shared.model_line import ModelLine
from clawloop_shared.receipts import sign_item

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
LIMIT = 8 * PART_BYTES
ITEM = UploadItem("item", "receipt", "delta.v1", os.urandom(2 * PART_BYTES + 777))


class Nobody:
    """The other desks."""

    async def answer(self, body: bytes, *, peer: str = "") -> DeskAnswer:
        return DeskAnswer(404, message="not here")


class Server:
    """The front with a real blob desk, on a loop in a thread of its own; a vault and devices in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.address_key = folder, signing.new_key(), b"k" * 32
        self.devices: dict[str, bytes] = {}
        self.states: dict[str, DeviceState] = {}
        self.seals: dict[str, DeviceSeal] = {}
        self.kept: list[tuple[str, UploadItem]] = []
        self.files: dict[str, Path] = {}
        self.now_s = time.time
        self.parts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        (folder / "tls").mkdir()
        self.tls = ensure_tls(folder / "tls")

    def device(self, device_id: str) -> Device:
        if device_id not in self.devices:
            raise DeviceError(f"no device {device_id}")
        state = self.states.get(device_id, DeviceState.JOINED)
        return Device(
            device_id=device_id,
            device_key=self.devices[device_id],
            node_key_pem="",
            node_id=None,
            line_id="",
            state=state,
            adapter_version=0,
            joined_ms=1,
            seen_ms=1,
        )

    def seal(self, device_id: str) -> DeviceSeal:
        return self.seals.setdefault(device_id, DeviceSeal.new(vault_id="v", device_id=device_id))

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        self.kept += [(device_id, item) for item in items]
        return [
            ItemReceived(device_id=device_id, item_id=i.item_id, received_ms=1, sha256=sha256(i.body)) for i in items
        ]

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)

    async def _start(self) -> None:
        self.desk = BlobDesk(
            self.folder / "blobs",
            self,
            device=self.device,
            seal=self.seal,
            sign=lambda received: sign_item(received, self.key),
            files=self.files.get,
            address_key=self.address_key,
            max_bytes=LIMIT,
            now_s=lambda: self.now_s(),
        )
        nobody = Nobody()
        self.front = Front(
            "127.0.0.1:1",
            joining=nobody,
            forgetting=nobody,
            upstream_tls=client_context(self.tls),
            blobs=self.desk,
        )
        self.port = await self.front.start("127.0.0.1", 0, tls=server_context(self.tls))

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.front.stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def member(self, device_id: str) -> Membership:
        key = signing.new_key()
        self.devices[device_id] = signing.public_key(key)
        return Membership(
            device_id=device_id,
            url=f"https://127.0.0.1:{self.port}",
            ca_pem=self.tls.ca.read_text(),
            root_key=b"r" * 32,
            release_key=signing.public_key(self.key),
            line=LINE,
            device_key=key,
            node_key_pem="",
            node_id=1,
        )

    def partials(self) -> list[Path]:
        return [p for p in (self.folder / "blobs").glob("*/*") if p.suffix != ".done"]

    def put(self, name: str, body: bytes) -> tuple[int, bytes]:
        return self.ask("PUT", f"{BLOB_PATH}/{name}", body)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=30)
        try:
            connection.request(method, path, body or None, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def member(server: Server) -> Membership:
    return server.member("one")


def head(member: Membership, data: bytes, **changes: Any) -> PartHead:
    facts = {
        "device_id": member.device_id,
        "item_id": ITEM.item_id,
        "receipt_id": ITEM.receipt_id,
        "kind": ITEM.kind,
        "sha256": sha256(ITEM.body),
        "size_bytes": len(ITEM.body),
        "offset": 0,
        "part_sha256": sha256(data),
        "at_ms": time.time_ns() // 1_000_000,
    }
    return PartHead(**{**facts, **changes})


def part(member: Membership, data: bytes, *, key: bytes = b"", **changes: Any) -> bytes:
    return wire.encode(sign_part(head(member, data, **changes), data, key or member.device_key))


class Counted:
    """A permit that says yes, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> bool:
        self.times += 1
        return True


def after(count: int) -> Callable[[], bool]:
    """A permit that says no after so many times."""
    left = iter([True] * count)
    return lambda: next(left, False)


CONTENT = os.urandom(FETCH_BYTES + 999)


@pytest.fixture
def entry(server: Server, tmp_path: Path) -> FileEntry:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(CONTENT)
    server.files[sha256(CONTENT)] = path
    return FileEntry(path.name, len(CONTENT), sha256(CONTENT))


def address(server: Server, entry: FileEntry, *, device: str = "one", for_s: int = 60, key: bytes = b"") -> str:
    expires_s = int(time.time()) + for_s
    return signed_address(entry.sha256, device_id=device, expires_s=expires_s, key=key or server.address_key)
