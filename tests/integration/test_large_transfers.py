"""Large items and adapters, moved in threads of their own while messages are answered."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.node.blobs import Line, send_item
from clawloop_edge.node.hub_api import HubRefused
from clawloop_edge.node.join import Membership
from clawloop_edge.node.large import REFUSED_S, Large
from clawloop_server.hub import blobs as server_blobs
from clawloop_server.hub.devices import DeviceState
from clawloop_shared.blobs import (
    BlobState,
)
from clawloop_shared.files import sha256
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, SignedManifest, sign_manifest
from clawloop_shared.messages import AdapterOffer, AdapterReply, ItemReceipt, UploadItem
from clawloop_shared.receipts import open_item

from .blob_parts import CONTENT, ITEM, LIMIT, LINE, Server, address, entry, member, server

__all__ = ["entry", "member", "server"]


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
    for file in manifest.files:
        server.files[file.sha256] = folder / file.name
        (folder / file.name).write_bytes(contents[file.name])
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
    until(lambda: desk.fetch(offer, serving=3) and outbox.said == ["installed 2"] * 2)
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
