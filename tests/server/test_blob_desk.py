"""Items in parts cost their device's quota before any byte is taken, and what is forgotten is gone from the disk."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_server.fleet.quota import Quota, QuotaSettings
from clawloop_server.home import Home
from clawloop_server.hub.blobs import BlobDesk
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.intake import MAX_ASIDE_BYTES, MAX_ITEM_BYTES
from clawloop_server.vault.parts import FOLDER
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.blobs import PART_BYTES, BlobState, PartHead, sign_part
from clawloop_shared.files import sha256
from clawloop_shared.messages import ForgetRequest, UploadItem
from clawloop_shared.receipts import sign_item

KEY = b"d" * 32
BODY = os.urandom(PART_BYTES + 99)


class Desk:
    """A desk before a real vault, and one device."""

    def __init__(self, vault: Vault, home: Home, keys: ServerKeys, device_id: str, *, mib_per_hour: float) -> None:
        self.now_s, self.device_id, self.vault = 0.0, device_id, vault
        self.folder = home.folder / FOLDER
        self.seals = DeviceSeals(vault.database, keys.master)
        self.quota = Quota(QuotaSettings(mib_per_hour=mib_per_hour), clock=lambda: self.now_s)
        self.desk = BlobDesk(
            self.folder,
            vault,
            device=Devices(vault.database).get,
            seal=self._seal,
            sign=lambda received: sign_item(received, signing.new_key()),
            files=lambda name: None,
            address_key=b"k" * 32,
            max_bytes=64 * PART_BYTES,
            admit=self.quota.admit_large,
        )

    def _seal(self, device_id: str) -> Any:
        with self.vault.database.write():
            return self.seals.ensure(device_id)

    async def put(self, body: bytes = BODY, *, offset: int = 0, empty: bool = False, **changes: Any) -> DeskAnswer:
        data = b"" if empty else body[offset : offset + PART_BYTES]
        facts = {
            "device_id": self.device_id,
            "item_id": "item",
            "receipt_id": "receipt",
            "kind": "delta.v1",
            "sha256": sha256(body),
            "size_bytes": len(body),
            "offset": offset,
            "part_sha256": sha256(data),
            "at_ms": time.time_ns() // 1_000_000,
        }
        head = PartHead(**{**facts, **changes})
        return await self.desk.answer(head.sha256, wire.encode(sign_part(head, data, KEY)))

    def files(self) -> list[Path]:
        return list(self.folder.glob("*/*"))


@pytest.fixture
def open_desk(vault: Vault, home: Home, keys: ServerKeys, add_device: Callable[..., str]) -> Callable[[float], Desk]:
    device_id = add_device(KEY)
    return lambda mib_per_hour: Desk(vault, home, keys, device_id, mib_per_hour=mib_per_hour)


async def test_an_item_over_the_quota_is_not_begun_and_one_that_began_goes_on(
    open_desk: Callable[[float], Desk],
) -> None:
    desk = open_desk(2 * len(BODY) / (1 << 20))
    assert wire.decode((await desk.put(empty=True)).body, BlobState).offset == 0
    assert desk.files() == [], "asking how far it is costs nothing and leaves nothing"
    assert [(await desk.put(item_id=name)).status for name in ("a", "b")] == [200, 200]
    refused = await desk.put(item_id="c")
    assert (refused.status, len(desk.files())) == (429, 2)
    assert 1700 < refused.retry_after_s <= 1801, "half of an hour's worth"
    assert desk.quota.over
    assert (await desk.put(item_id="a", offset=PART_BYTES)).status == 200, "it was counted whole"
    desk.now_s += refused.retry_after_s
    assert (await desk.put(item_id="c")).status == 200


async def test_what_no_round_could_read_is_refused_before_any_byte(open_desk: Callable[[float], Desk]) -> None:
    desk = open_desk(512.0)
    refused = await desk.put(kind="steps", size_bytes=MAX_ITEM_BYTES + 1)
    assert (refused.status, desk.files()) == (413, [])
    assert (await desk.put(kind="delta.v1", size_bytes=MAX_ITEM_BYTES + 1)).status == 200


async def test_what_is_set_aside_as_changed_or_too_large_is_a_few_bytes(
    open_desk: Callable[[float], Desk], vault: Vault
) -> None:
    desk = open_desk(0)
    for body in (bytes(MAX_ITEM_BYTES + 1), b"x" * MAX_ITEM_BYTES):
        vault.receive(desk.device_id, [UploadItem("same", "r", "steps", body)])
    assert set(vault.stats().set_aside) == {"too large", "changed"}
    assert vault.database.count("SELECT max(length(sealed)) FROM set_aside") < MAX_ASIDE_BYTES + 500


async def test_parts_of_a_forgotten_item_are_gone_and_no_others(
    open_desk: Callable[[float], Desk], vault: Vault
) -> None:
    desk = open_desk(0)
    await desk.put(item_id="begun")
    await desk.put(item_id="stays")
    for offset in (0, PART_BYTES):
        done = await desk.put(item_id="whole", offset=offset)
    assert wire.decode(done.body, BlobState).receipt is not None
    assert len(desk.files()) == 3
    assert all(desk.device_id.encode() not in path.read_bytes() for path in desk.files()), "sealed, the receipt too"
    assert (await desk.put(item_id="whole", empty=True)).body == done.body, "and found again"
    asked = ForgetRequest(request_id="f", device_id=desk.device_id, at_ms=50, record_ids=["begun", "whole"])
    vault.forget(asked)
    (left,) = desk.files()
    assert wire.decode((await desk.put(item_id="stays", empty=True)).body, BlobState).offset == PART_BYTES
    assert left.exists()


@pytest.mark.parametrize("everything", [True, False])
async def test_with_its_device_all_of_it_goes(
    open_desk: Callable[[float], Desk], vault: Vault, *, everything: bool
) -> None:
    desk = open_desk(0)
    await desk.put(item_id="begun")
    for offset in (0, PART_BYTES):
        await desk.put(item_id="whole", offset=offset)
    if everything:
        vault.forget(ForgetRequest(request_id="f", device_id=desk.device_id, at_ms=50, record_ids=[], everything=True))
    else:
        vault.delete_device(desk.device_id)
    assert list(desk.folder.iterdir()) == []
