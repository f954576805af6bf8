"""An adapter that no message holds is offered by the addresses of its files, and asked about again while it comes."""

from collections.abc import Callable

import pytest

from clawloop_server.fleet.channel import NodeInfo, Outgoing, Reply
from clawloop_server.fleet.dispatch import Dispatcher, DispatchSettings
from clawloop_shared import wire
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import (
    ADAPTER,
    STATUS,
    UPLOAD,
    AdapterOffer,
    AdapterReply,
    ItemReceipt,
    ItemReceived,
    StatusReply,
    UploadItem,
    UploadRequest,
)
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
NODE = NodeInfo(7, "device")


class World:
    """One device and one released adapter, and a clock that is moved by hand."""

    def __init__(self, size: int, *, links: Callable[[SignedManifest, str], dict[str, str]] | None) -> None:
        self.now_s, self.size = 100.0, size
        self.dispatcher = Dispatcher(
            vault=self,
            releases=self,
            members=self,
            sign=lambda _: ItemReceipt(b"", b""),
            links=links,
            settings=DispatchSettings(fetching_s=30.0),
            clock=lambda: self.now_s,
        )

    def receive(self, device_id: str, items: list[UploadItem]) -> list[ItemReceived]:
        return []

    def current_version(self) -> int:
        return 1

    def offer(self, version: int) -> AdapterOffer:
        return AdapterOffer(SignedManifest(b"1", "key", b"signature"), {"weights": bytes(self.size)})

    def device_of(self, node_id: int) -> str | None:
        return "device"

    def seen(self, device_id: str, *, adapter_version: int, status: StatusReply | None) -> None:
        pass

    def cohort(self) -> int:
        return 1

    async def asked(self, after_s: float = 0.0) -> dict[str, Outgoing]:
        self.now_s += after_s
        return {sent.type: sent for sent in await self.dispatcher.work([NODE])}

    async def greeted(self) -> dict[str, Outgoing]:
        assert set(await self.asked()) == {STATUS}
        await self.dispatcher.reply(Reply(7, STATUS, wire.encode(StatusReply("full", LINE, 0, 0, "0"))))
        return await self.asked(1)


def address(manifest: SignedManifest, device_id: str) -> dict[str, str]:
    return {"weights": f"/v1/blobs/x?device={device_id}"}


@pytest.mark.parametrize(("size", "by_address"), [(1000, False), (64 << 20, True)])
async def test_what_no_message_holds_is_offered_by_address(size: int, by_address: bool) -> None:
    asked = await World(size, links=address).greeted()
    offer = wire.decode(asked[ADAPTER].payload, AdapterOffer)
    assert (offer.files == {}, offer.links == address(offer.manifest, "device")) == (by_address, by_address)
    assert wire.decode(asked[UPLOAD].payload, UploadRequest).max_blob_bytes == 256 << 20


async def test_without_addresses_it_stops_nothing_else() -> None:
    assert set(await World(64 << 20, links=None).greeted()) == {UPLOAD}


async def test_a_device_that_fetches_is_left_to_it_and_asked_again() -> None:
    world = World(64 << 20, links=address)
    await world.greeted()
    await world.dispatcher.reply(Reply(7, ADAPTER, wire.encode(AdapterReply(0, installed=False, fetching=True))))
    assert ADAPTER not in await world.asked(10)
    assert ADAPTER in await world.asked(25)
