"""Signing and opening what one side must be able to prove later: that an item arrived, that something was to be
forgotten, that it was. Each kind has its own signing domain. Verify, then parse. Knows no key store and no clock.
"""

from typing import TypeVar

import msgspec

from clawloop_shared import signing
from clawloop_shared.errors import WireError
from clawloop_shared.messages import (
    ForgetReceipt,
    ForgetRequest,
    ItemReceipt,
    ItemReceived,
    SignedAnswer,
    SignedRequest,
)

ITEM_DOMAIN = "item-receipt"
FORGET_DOMAIN = "forget-request"
FORGOTTEN_DOMAIN = "forget-receipt"

T = TypeVar("T", bound=msgspec.Struct)


class _Claim(msgspec.Struct, frozen=True):
    device_id: str


def sign_item(received: ItemReceived, private_key: bytes) -> ItemReceipt:
    """The server's receipt for an item, made with its release key."""
    payload = msgspec.json.encode(received, order="sorted")
    return ItemReceipt(payload, signing.sign(private_key, ITEM_DOMAIN, payload=payload))


def open_item(receipt: ItemReceipt, public_key: bytes) -> ItemReceived:
    """What a receipt says. Whether it is of this device and of these bytes is the caller's to check.

    Raises:
        SignatureInvalid: not signed by this key.
        WireError: signed, but not a receipt of ours.
    """
    signing.verify(public_key, ITEM_DOMAIN, payload=receipt.payload, signature=receipt.signature)
    return _parse(receipt.payload, ItemReceived, name="item receipt")


def sign_forget(request: ForgetRequest, private_key: bytes) -> SignedRequest:
    """The request under the device's key."""
    payload = msgspec.json.encode(request, order="sorted")
    return SignedRequest(payload, signing.sign(private_key, FORGET_DOMAIN, payload=payload))


def claimed_device(signed: SignedRequest) -> str:
    """The device that a request says it is of, unproven: whose key to check it with.

    Raises:
        WireError: it names none.
    """
    return _parse(signed.payload, _Claim, name="forget request").device_id


def claimed_forget(signed: SignedRequest) -> ForgetRequest:
    """What a request says, unproven: for a device whose key is gone together with all that it had sent.

    Raises:
        WireError: it is no request of ours, or out of its bounds.
    """
    return _parse(signed.payload, ForgetRequest, name="forget request")


def open_forget(signed: SignedRequest, public_key: bytes) -> ForgetRequest:
    """What a device asks to be forgotten.

    Raises:
        SignatureInvalid: not signed by this key.
        WireError: signed, but not a request of ours, or out of its bounds.
    """
    signing.verify(public_key, FORGET_DOMAIN, payload=signed.payload, signature=signed.signature)
    return _parse(signed.payload, ForgetRequest, name="forget request")


def sign_forgotten(receipt: ForgetReceipt, private_key: bytes) -> SignedAnswer:
    """The server's word that it forgot, made with its release key."""
    payload = msgspec.json.encode(receipt, order="sorted")
    return SignedAnswer(payload, signing.sign(private_key, FORGOTTEN_DOMAIN, payload=payload))


def open_forgotten(answer: SignedAnswer, public_key: bytes) -> ForgetReceipt:
    """What the server did. Whether it is of this request is the caller's to check.

    Raises:
        SignatureInvalid: not signed by this key.
        WireError: signed, but not an answer of ours.
    """
    signing.verify(public_key, FORGOTTEN_DOMAIN, payload=answer.payload, signature=answer.signature)
    return _parse(answer.payload, ForgetReceipt, name="forget receipt")


def _parse(payload: bytes, kind: type[T], *, name: str) -> T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{name}: {error}") from error
