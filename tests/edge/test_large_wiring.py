"""The handlers hand on to `Large` what no message holds, and only that."""

import asyncio
from typing import Any

from clawloop_edge.handlers import ENVELOPE_BYTES, Handlers
from clawloop_shared.levels import Level
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.messages import MAX_PAYLOAD_BYTES, AdapterOffer, AdapterReply, UploadRequest
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy

MANIFEST = SignedManifest(b"{}", "key", b"signature")


class Around:
    """Engine, outbox, consent, membership and activator at once, as far as they are asked."""

    line = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
    policy = Policy("line", 4)
    device_id, release_key = "device", b""

    def __init__(self) -> None:
        self.limits: list[int] = []
        self.installed: list[AdapterOffer] = []

    def level(self) -> Level:
        return Level.FULL

    def accept(self, receipts: list[Any], **_: Any) -> None:
        assert receipts == []

    def next_items(self, limit: int) -> tuple[list[Any], bool]:
        self.limits.append(limit)
        return [], False

    def mark_sent(self, item_ids: list[str]) -> None:
        assert item_ids == []

    async def install(self, offer: AdapterOffer) -> AdapterReply:
        self.installed.append(offer)
        return AdapterReply(5, installed=True)

    def refusal(self, offer: AdapterOffer) -> AdapterReply | None:
        return AdapterReply(4, installed=False, reason="forked") if "forked" in offer.links.values() else None


class Desk:
    """Takes note of what it was given."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.fetched: list[tuple[AdapterOffer, int]] = []

    def send(self, above_bytes: int, max_bytes: int) -> None:
        self.sent.append((above_bytes, max_bytes))

    def fetch(self, offer: AdapterOffer, *, serving: int) -> AdapterReply:
        self.fetched.append((offer, serving))
        return AdapterReply(serving, installed=False, fetching=True)


def handlers(around: Any, desk: Desk, loop: asyncio.AbstractEventLoop) -> Handlers:
    return Handlers(
        around,
        around,
        consent=around,
        member=around,
        activator=around,
        keep_cohort=lambda _: None,
        loop=loop,
        large=desk,
    )


async def test_what_a_message_does_not_hold_is_handed_on() -> None:
    around, desk = Around(), Desk()
    made = handlers(around, desk, asyncio.get_running_loop())
    await asyncio.to_thread(made.upload, UploadRequest([], 1000, 5000))
    await asyncio.to_thread(made.upload, UploadRequest([], 1 << 40))
    room = MAX_PAYLOAD_BYTES - ENVELOPE_BYTES
    assert around.limits == [1000, room]
    assert desk.sent == [(1000, 5000), (room, 0)]


async def test_an_offer_with_its_files_is_installed_and_one_with_addresses_is_fetched() -> None:
    around, desk = Around(), Desk()
    made = handlers(around, desk, asyncio.get_running_loop())
    whole, linked = AdapterOffer(MANIFEST, {"a": b"b"}), AdapterOffer(MANIFEST, {}, {"a": "/v1/blobs/x?y"})
    assert (await asyncio.to_thread(made.adapter, whole)).installed
    assert (await asyncio.to_thread(made.adapter, linked)).fetching
    assert (around.installed, desk.fetched) == ([whole], [(linked, 4)])
    forked = await asyncio.to_thread(made.adapter, AdapterOffer(MANIFEST, {}, {"a": "forked"}))
    assert forked == AdapterReply(4, installed=False, reason="forked")
    assert len(desk.fetched) == 1, "no byte is fetched of what is not in the log"
