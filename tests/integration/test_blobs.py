"""What is too large for a message, over the real public port with TLS: items in parts, files by signed address; cut in
the middle and gone on with; and everything that is not as it must be."""

import asyncio
import contextlib
import http.client
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawloop_edge.node.blobs import Line, fetch_file, send_item
from clawloop_edge.node.hub_api import HubRefused
from clawloop_edge.node.join import Membership
from clawloop_edge.node.large import REFUSED_S, Large
from clawloop_edge.node.transport import NodeError, ServerAway, Withdrawn
from clawloop_server.errors import DeviceError
from clawloop_server.fleet.tls import client_context, ensure_tls, server_context
from clawloop_server.hub import blobs as server_blobs
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
    BlobState,
    PartHead,
    sign_part,
    signed_address,
)
from clawloop_shared.errors import WireError
from clawloop_shared.files import sha256
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, SignedManifest, sign_manifest
from clawloop_shared.messages import AdapterOffer, AdapterReply, ItemReceipt, ItemReceived, UploadItem
from clawloop_shared.model_line import ModelLine
from clawloop_shared.receipts import open_item, sign_item

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


# items


def test_an_item_arrives_whole_with_a_receipt_and_leaves_no_part(server: Server, member: Membership) -> None:
    line = Line(member)
    receipt = send_item(line, ITEM, membership=member, permit=lambda: True)
    assert open_item(receipt, member.release_key).sha256 == sha256(ITEM.body)
    assert server.kept == [("one", ITEM)]
    assert server.partials() == []
    again = send_item(line, ITEM, membership=member, permit=lambda: True)
    assert again == receipt
    assert len(server.kept) == 1, "an answer that was lost costs no second sending"
    line.close()


def test_what_was_cut_in_the_middle_goes_on_where_it_was_and_lies_sealed_meanwhile(
    server: Server, member: Membership
) -> None:
    line = Line(member)
    with pytest.raises(Withdrawn):
        send_item(line, ITEM, membership=member, permit=after(2))
    (partial,) = server.partials()
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert ITEM.body[:64] not in partial.read_bytes()
    with partial.open("ab") as file:
        file.write(b"half a part that a crash left")
    state = wire.decode(server.put(sha256(ITEM.body), part(member, b""))[1], BlobState)
    assert state.offset == PART_BYTES
    permit = Counted()
    send_item(line, ITEM, membership=member, permit=permit)
    assert permit.times == 3, "the first part was not sent again"
    assert server.kept == [("one", ITEM)]
    line.close()


def test_a_connection_that_is_cut_in_mid_part_sends_nothing_more(server: Server, member: Membership) -> None:
    with Line(member) as line:

        def permit() -> bool:
            if len(server.partials()) == 1:
                line.cut()
            return True

        with pytest.raises(Withdrawn):
            send_item(line, ITEM, membership=member, permit=permit)
        assert server.kept == []
        with pytest.raises(Withdrawn):
            line.ask("GET", "/", max_bytes=1)


def test_parts_that_together_are_not_the_item_are_thrown_away(server: Server, member: Membership) -> None:
    other = os.urandom(len(ITEM.body))
    name = sha256(ITEM.body)
    for offset in range(0, len(other), PART_BYTES):
        data = other[offset : offset + PART_BYTES]
        status, said = server.put(name, part(member, data, offset=offset))
    assert (status, server.kept, server.partials()) == (409, [], [])
    assert b"sent anew" in said


def test_only_the_device_itself_can_add_to_its_items(server: Server, member: Membership) -> None:
    stranger, name, data = server.member("two"), sha256(ITEM.body), ITEM.body[:PART_BYTES]
    assert server.put(name, part(member, data, key=stranger.device_key))[0] == 403
    assert server.put(name, part(member, data, key=signing.new_key(), device_id="nobody"))[0] == 403
    server.states["one"] = DeviceState.REVOKED
    assert server.put(name, part(member, data))[0] == 403
    signed = sign_part(head(stranger, data), data, stranger.device_key)
    changed = wire.encode(msgspec.structs.replace(signed, data=b"x" + data[1:]))
    assert server.put(name, changed)[0] == 403
    assert server.partials() == []


def test_two_devices_with_the_same_item_have_nothing_in_common(server: Server, member: Membership) -> None:
    other = server.member("two")
    for who in (member, other):
        with Line(who) as line, pytest.raises(Withdrawn):
            send_item(line, ITEM, membership=who, permit=after(2))
    assert len({path.parent for path in server.partials()}) == 2


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"at_ms": 1}, 400),
        ({"size_bytes": LIMIT + 1}, 413),
        ({"sha256": "0" * 64}, 400),
        ({"sha256": "../../etc/passwd"}, 400),
        ({"offset": -1}, 400),
        ({"item_id": ""}, 400),
    ],
)
def test_a_part_that_is_not_as_it_must_be_is_refused(
    server: Server, member: Membership, changes: dict[str, Any], wanted: int
) -> None:
    assert server.put(sha256(ITEM.body), part(member, ITEM.body[:PART_BYTES], **changes))[0] == wanted
    assert server.partials() == []


def test_a_part_of_another_size_is_refused_and_one_elsewhere_changes_nothing(
    server: Server, member: Membership
) -> None:
    name = sha256(ITEM.body)
    assert server.put(name, part(member, ITEM.body[: PART_BYTES - 1]))[0] == 400
    status, said = server.put(name, part(member, ITEM.body[:PART_BYTES], offset=PART_BYTES))
    assert (status, wire.decode(said, BlobState).offset) == (200, 0)
    assert server.put(name, b"rubbish")[0] == 400
    assert server.put(name, os.urandom(2 << 20))[0] == 413


def test_what_one_device_has_begun_is_bounded_and_the_oldest_gives_way(server: Server, member: Membership) -> None:
    for number in range(7):
        data = os.urandom(PART_BYTES)
        name = sha256(data + b"more")
        sent = part(member, data, item_id=f"i{number}", sha256=name, size_bytes=2 * PART_BYTES)
        assert server.put(name, sent)[0] == 200
        os.utime(max(server.partials(), key=lambda p: p.stat().st_mtime_ns), (number, number))
    assert len(server.partials()) <= 4
    assert sum(path.stat().st_size for path in server.partials()) <= LIMIT
    server.now_s = lambda: 1e10
    assert server.desk.sweep() > 0
    assert server.partials() == []


def test_a_slow_sender_is_hung_up_on_and_holds_nobody_up(
    server: Server, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.hub.front._REQUEST_S", 0.5)
    context = ssl.create_default_context(cafile=str(server.tls.ca))
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as slow,
    ):
        slow.sendall(b"PUT %s/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\na" % (b"/v1/blobs", b"0" * 64))
        slow.settimeout(10)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert slow.recv(1000) == b""
    monkeypatch.undo()
    with Line(member) as line:
        send_item(line, ITEM, membership=member, permit=lambda: True)


# files

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


def test_a_file_that_was_cut_is_gone_on_with_and_nothing_of_it_stays(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path
) -> None:
    line, folder = Line(member), tmp_path / "fetched"
    with pytest.raises(Withdrawn):
        fetch_file(line, address(server, entry), entry=entry, folder=folder, permit=after(1))
    (partial,) = folder.iterdir()
    assert (partial.stat().st_size, stat.S_IMODE(partial.stat().st_mode)) == (FETCH_BYTES, 0o600)
    permit = Counted()
    found = fetch_file(line, address(server, entry), entry=entry, folder=folder, permit=permit)
    assert found == CONTENT
    assert permit.times == 1
    assert list(folder.iterdir()) == []
    line.close()


def test_a_file_with_another_hash_is_thrown_away(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path
) -> None:
    server.files[entry.sha256].write_bytes(os.urandom(len(CONTENT)))
    line = Line(member)
    with pytest.raises(NodeError, match="not the file that the manifest names"):
        fetch_file(line, address(server, entry), entry=entry, folder=tmp_path / "f", permit=lambda: True)
    assert list((tmp_path / "f").iterdir()) == []
    line.close()


def test_an_address_is_good_for_one_file_one_device_and_a_time(
    server: Server, member: Membership, entry: FileEntry
) -> None:
    good = address(server, entry)
    assert server.ask("GET", good, headers={"Range": "bytes=0-9"}) == (206, CONTENT[:10])
    bad = [
        address(server, entry, for_s=-1),
        address(server, entry, device="nobody"),
        address(server, entry, key=b"other" * 8),
        good.replace("device=one", "device=two"),
        good.replace(entry.sha256, "0" * 64),
        good + "&device=one",
        good.partition("?")[0],
        f"{BLOB_PATH}/../../../etc/passwd?{good.partition('?')[2]}",
        f"{BLOB_PATH}/%2e%2e%2f%2e%2e%2fetc%2fpasswd?{good.partition('?')[2]}",
    ]
    assert [server.ask("GET", path)[0] for path in bad] == [404] * len(bad)
    server.states["one"] = DeviceState.REVOKED
    assert server.ask("GET", good)[0] == 404
    assert server.ask("HEAD", good)[0] == 404


@pytest.mark.parametrize(
    "wrong",
    ["", "https://elsewhere/v1/blobs/{sha}?x", "/v1/forget?{sha}", "/v1/blobs/{sha}", "/v1/blobs/{sha}?a\r\nHost: b"],
)
def test_a_device_fetches_no_other_address_than_that_of_the_file(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path, wrong: str
) -> None:
    with pytest.raises(WireError, match="not fetched"):
        fetch_file(
            Line(member), wrong.format(sha=entry.sha256), entry=entry, folder=tmp_path / "f", permit=lambda: True
        )


def test_another_server_gets_nothing(server: Server, member: Membership, tmp_path: Path) -> None:
    other = msgspec.structs.replace(member, ca_pem=ensure_tls(tmp_path).ca.read_text())
    with pytest.raises(NodeError, match="not the server of the invitation"):
        send_item(Line(other), ITEM, membership=other, permit=lambda: True)
    nobody = msgspec.structs.replace(member, url="https://127.0.0.1:1")
    with pytest.raises(ServerAway):
        send_item(Line(nobody), ITEM, membership=nobody, permit=lambda: True)


# in threads of their own


class Outbox:
    """One large item."""

    def __init__(self) -> None:
        self.items: list[UploadItem] = [ITEM]
        self.said: list[str] = []
        self.allowed = True

    def next_large(self, above_bytes: int, max_bytes: int) -> UploadItem | None:
        return next((item for item in self.items if above_bytes < len(item.body) <= max_bytes), None)

    def mark_sent(self, item_ids: list[str]) -> None:
        self.said.append("sent")

    def may_still_leave(self, item_ids: list[str]) -> bool:
        return self.allowed

    def mark_stopped(self, item_ids: list[str]) -> None:
        self.said.append("stopped")

    def accept(self, receipts: list[ItemReceipt], *, device_id: str, release_key: bytes) -> None:
        self.said.append(open_item(receipts[0], release_key).item_id)
        self.items = []


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def large(
    member: Membership, outbox: Outbox, folder: Path, *, limit: int = 1 << 30, takes: bool = True, **more: Any
) -> Large:
    def install(offer: AdapterOffer) -> AdapterReply:
        outbox.said.append(f"installed {len(offer.files)}")
        return AdapterReply(1, installed=takes, reason="" if takes else "its probe says no")

    return Large(member, outbox, install=install, folder=folder, max_adapter_bytes=limit, **more)


def test_a_large_item_goes_out_once_and_its_receipt_is_accepted(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    outbox = Outbox()
    desk = large(member, outbox, tmp_path / "f")
    desk.send(1, 10)

    def gone() -> bool:
        desk.send(1, LIMIT)
        return not outbox.items

    until(gone)
    assert outbox.said == ["sent", "item"]
    desk.stop()


def test_a_lowered_level_breaks_a_large_item_off(
    server: Server, member: Membership, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox()
    take = server_blobs._Partial.add

    def slow(self: Any, data: bytes) -> BlobState:
        if data:
            outbox.allowed = False
            time.sleep(0.5)
        return take(self, data)

    monkeypatch.setattr(server_blobs._Partial, "add", slow)
    desk = large(member, outbox, tmp_path / "f")
    desk.send(1, LIMIT)
    until(lambda: "stopped" in outbox.said)
    assert server.kept == []
    desk.stop()


def test_an_offer_that_is_not_signed_or_too_large_is_not_fetched(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    desk = large(member, Outbox(), tmp_path / "f")
    reply = desk.fetch(AdapterOffer(SignedManifest(b"{}", "key", b"signature"), {}, {"a": "b"}), serving=3)
    assert (reply.version, reply.installed, reply.fetching) == (3, False, False)
    assert "signed by key" in reply.reason
    desk.stop()


def offered(server: Server, contents: dict[str, bytes], folder: Path) -> AdapterOffer:
    """An adapter of version 4 as the server offers it by address."""
    manifest = Manifest(
        line=LINE,
        version=4,
        previous_sha256="",
        files=[FileEntry(name, len(data), sha256(data)) for name, data in contents.items()],
        rank=1,
        alpha=1.0,
        target_modules=["q_proj"],
        probe=Probe([1, 2], [-0.5]),
        evaluation=Evaluation("suite", 1, 1.0, 0.0, 0.1),
        round_id="round",
        lineage_root="",
        created_ms=1,
        expires_ms=2,
    )
    for entry in manifest.files:
        server.files[entry.sha256] = folder / entry.name
        (folder / entry.name).write_bytes(contents[entry.name])
    links = {entry.name: address(server, entry) for entry in manifest.files}
    return AdapterOffer(sign_manifest(manifest, server.key), {}, links)


def test_a_large_adapter_is_fetched_and_installed_while_messages_are_answered(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    outbox = Outbox()
    desk = large(member, outbox, tmp_path / "f")
    offer = offered(server, {CONFIG_FILE: b"{}", WEIGHTS_FILE: CONTENT}, tmp_path)
    assert desk.fetch(offer, serving=3).fetching
    until(lambda: "installed 2" in outbox.said)
    assert list((tmp_path / "f").iterdir()) == []
    small = large(member, outbox, tmp_path / "f", limit=1000).fetch(offer, serving=3)
    assert (small.installed, small.fetching) == (False, False)
    assert "over this device's 1000" in small.reason
    desk.stop()


def test_a_file_that_is_not_the_manifests_is_told_when_it_is_offered_again(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    outbox = Outbox()
    desk = large(member, outbox, tmp_path / "f")
    offer = offered(server, {CONFIG_FILE: b"{}", WEIGHTS_FILE: CONTENT}, tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(os.urandom(len(CONTENT)))
    replies: list[AdapterReply] = []

    def told() -> bool:
        replies.append(desk.fetch(offer, serving=3))
        return bool(replies[-1].reason)

    until(told)
    assert "not the file that the manifest names" in replies[-1].reason
    assert outbox.said == []
    desk.stop()


def test_an_adapter_that_could_not_be_used_is_not_fetched_again_until_a_day_has_passed(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    outbox, now_s = Outbox(), [0.0]
    desk = large(member, outbox, tmp_path / "f", takes=False, clock=lambda: now_s[0])
    offer = offered(server, {CONFIG_FILE: b"{}", WEIGHTS_FILE: CONTENT}, tmp_path)
    until(lambda: desk.fetch(offer, serving=3).reason)
    for _ in range(3):
        assert desk.fetch(offer, serving=3) == AdapterReply(3, installed=False, reason="its probe says no")
    assert outbox.said == ["installed 2"]
    now_s[0] = REFUSED_S
    until(lambda: desk.fetch(offer, serving=3).fetching)
    until(lambda: outbox.said == ["installed 2"] * 2)
    desk.stop()


def test_an_adapter_for_which_there_is_no_room_is_not_fetched(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    offer = offered(server, {CONFIG_FILE: b"{}", WEIGHTS_FILE: CONTENT}, tmp_path)
    outbox = Outbox()
    room: dict[str, Any] = {"floor_bytes": 100, "free_bytes": lambda _: 100 + 1 + len(CONTENT)}
    desk = large(member, outbox, tmp_path / "f", **room)
    assert desk.fetch(offer, serving=3) == AdapterReply(3, installed=False, reason="no room for adapter 4")
    assert list((tmp_path / "f").iterdir()) == []
    desk = large(member, outbox, tmp_path / "f", **{**room, "floor_bytes": 99})
    assert desk.fetch(offer, serving=3).fetching
    until(lambda: outbox.said == ["installed 2"])
    desk.stop()


def test_what_was_fetched_of_another_adapter_goes_when_one_is_fetched(
    server: Server, member: Membership, tmp_path: Path
) -> None:
    outbox, folder = Outbox(), tmp_path / "f"
    folder.mkdir()
    abandoned = folder / f"{'0' * 64}.part"
    abandoned.write_bytes(b"half of an adapter")
    offer = offered(server, {CONFIG_FILE: b"{}", WEIGHTS_FILE: CONTENT}, tmp_path)
    (folder / f"{sha256(CONTENT)}.part").write_bytes(CONTENT[:-10])
    desk = large(member, outbox, folder)
    assert desk.fetch(offer, serving=3).fetching
    until(lambda: outbox.said == ["installed 2"])
    assert list(folder.iterdir()) == []
    desk.stop()


def test_a_refusal_of_the_server_is_told_with_its_status(server: Server, member: Membership) -> None:
    server.states["one"] = DeviceState.REVOKED
    with Line(member) as line, pytest.raises(HubRefused, match="403"):
        send_item(line, ITEM, membership=member, permit=lambda: True)
