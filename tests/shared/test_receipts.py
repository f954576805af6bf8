"""Receipts and requests: what one side signed the other opens, and nothing else is taken for it."""

import hashlib
import json

import msgspec
import pytest

from clawloop_shared import signing, wire
from clawloop_shared.errors import SignatureInvalid, WireError
from clawloop_shared.messages import (
    MAX_FORGET_BYTES,
    MAX_FORGET_IDS,
    ForgetReceipt,
    ForgetRequest,
    ItemReceipt,
    ItemReceived,
    SignedAnswer,
    SignedRequest,
    StatusRequest,
    UploadRequest,
)
from clawloop_shared.receipts import (
    FORGET_DOMAIN,
    claimed_device,
    open_forget,
    open_forgotten,
    open_item,
    sign_forget,
    sign_forgotten,
    sign_item,
)

KEY, OTHER = signing.new_key(), signing.new_key()
PUBLIC = signing.public_key(KEY)
RECEIVED = ItemReceived(device_id="d", item_id="i", received_ms=5, sha256=hashlib.sha256(b"body").hexdigest())
ASKED = ForgetRequest(request_id="r", device_id="d", at_ms=7, record_ids=["a", "b"])
DONE = ForgetReceipt(request_id="r", device_id="d", deleted=1, unknown=1, adapters=[3], at_ms=8)


def test_each_kind_comes_back_as_it_was_signed() -> None:
    assert open_item(sign_item(RECEIVED, KEY), PUBLIC) == RECEIVED
    assert open_forget(sign_forget(ASKED, KEY), PUBLIC) == ASKED
    assert open_forgotten(sign_forgotten(DONE, KEY), PUBLIC) == DONE
    assert claimed_device(sign_forget(ASKED, OTHER)) == "d"


def test_what_is_signed_is_json_with_sorted_keys() -> None:
    assert list(json.loads(sign_item(RECEIVED, KEY).payload)) == ["device_id", "item_id", "received_ms", "sha256"]
    names = list(json.loads(sign_forget(ASKED, KEY).payload))
    assert names == sorted(names)


def test_another_key_other_bytes_and_another_kind_are_refused() -> None:
    item, asked = sign_item(RECEIVED, KEY), sign_forget(ASKED, KEY)
    with pytest.raises(SignatureInvalid):
        open_item(sign_item(RECEIVED, OTHER), PUBLIC)
    with pytest.raises(SignatureInvalid):
        open_item(ItemReceipt(item.payload.replace(b'"i"', b'"j"'), item.signature), PUBLIC)
    with pytest.raises(SignatureInvalid):
        open_forget(SignedRequest(item.payload, item.signature), PUBLIC)
    with pytest.raises(SignatureInvalid):
        open_forgotten(SignedAnswer(asked.payload, asked.signature), PUBLIC)


@pytest.mark.parametrize(
    "changes",
    [
        {"record_ids": ["x"] * (MAX_FORGET_IDS + 1)},
        {"record_ids": [""]},
        {"record_ids": ["x" * 300]},
        {"request_id": ""},
        {"request_id": "01J\n"},
        {"request_id": "\x1b[2J"},
        {"type": "forget.v2"},
        {"at_ms": "yesterday"},
    ],
)
def test_a_signed_request_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    payload = msgspec.json.encode({**msgspec.to_builtins(ASKED), **changes})
    signed = SignedRequest(payload, signing.sign(KEY, FORGET_DOMAIN, payload=payload))
    with pytest.raises(WireError):
        open_forget(signed, PUBLIC)


@pytest.mark.parametrize("payload", [b"", b"{}", b'{"device_id": 1}', b"[" * 100_000, b'{"device_id": "\xff"}'])
def test_a_request_that_names_no_device_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        claimed_device(SignedRequest(payload, b""))


def test_the_largest_request_fits_its_limit() -> None:
    ids = [hashlib.sha512(b"%d" % n).hexdigest() * 2 for n in range(MAX_FORGET_IDS)]
    body = wire.encode(sign_forget(msgspec.structs.replace(ASKED, record_ids=ids), KEY))
    assert len(body) < MAX_FORGET_BYTES
    signed = wire.decode(body, SignedRequest, max_bytes=MAX_FORGET_BYTES)
    assert len(open_forget(signed, PUBLIC).record_ids) == MAX_FORGET_IDS


def test_requests_to_a_device_carry_receipts_and_the_cohort() -> None:
    asked = wire.decode(wire.encode(UploadRequest([sign_item(RECEIVED, KEY)], 100)), UploadRequest)
    assert open_item(asked.receipts[0], PUBLIC).sha256 == RECEIVED.sha256
    assert wire.decode(wire.encode(StatusRequest(cohort=4)), StatusRequest).cohort == 4
