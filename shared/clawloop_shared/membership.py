"""Being a member: joining with proof of one's key, asking how one stands, new keys, leaving; and the root key's word
for the server's other keys. Each kind has its own signing domain. Verify, then parse. Knows no key store and no clock.

What is signed is JSON with sorted keys. Flows: docs/formats/messages.md.
"""

from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid, WireError
from clawloop_shared.messages import Id, JoinRequest, SignedAnswer, SignedRequest

STANDING_PATH = "/v1/standing"
ROTATE_PATH = "/v1/rotate"
LEAVE_PATH = "/v1/leave"
MAX_MEMBER_BYTES = 64 << 10

JOIN_DOMAIN = "join-request"
STATEMENT_DOMAIN = "key-statement"
STANDING_DOMAIN, STANDING_ANSWER_DOMAIN = "standing-request", "standing-answer"
ROTATE_DOMAIN, NEW_KEY_DOMAIN, ROTATED_DOMAIN = "rotate-request", "rotate-new-key", "rotate-receipt"
LEAVE_DOMAIN, LEFT_DOMAIN = "leave-request", "leave-receipt"

RELEASE = "release"
"""purpose of the key that signs adapters, receipts and answers"""

T = TypeVar("T", bound=msgspec.Struct)
RequestId = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z-]{1,64}\Z")]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]


class KeyStatement(msgspec.Struct, frozen=True, kw_only=True, tag="key-statement.v1"):
    """The root key's word: this key is the server's, for this purpose, from `not_before_ms` to before `expires_ms`."""

    key: PublicKey
    purpose: str
    not_before_ms: int
    expires_ms: int


class Stand(StrEnum):
    """How a device stands with its server."""

    JOINED = "joined"
    """it may sync"""
    WAITING = "waiting"
    """the operator has not approved it yet"""
    REVOKED = "revoked"
    """the operator lets it sync no more, or never did"""
    LEFT = "left"
    """it said goodbye"""


class StandingRequest(msgspec.Struct, frozen=True, kw_only=True, tag="standing-request.v1"):
    """How do I stand? `instance` names the running edge, anew at each start; with `takes` it says that it serves now in
    the place of any other edge with this device's keys."""

    device_id: Id
    at_ms: int
    instance: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    takes: bool = False


class Standing(msgspec.Struct, frozen=True, kw_only=True, tag="standing.v1"):
    """The server's word on a device. `at_ms` is its clock.

    `holds`: whether the instance that asked is the one that serves. `held_ms`: when the one that does was heard last.
    `rival_ms`: when an edge was heard last that serves no more because another came with the same keys; 0: never.
    """

    device_id: str
    instance: str
    at_ms: int
    state: Stand
    holds: bool
    held_ms: int
    rival_ms: int = 0
    statement: SignedAnswer | None = None
    """the root key's word for the release key, as it is now"""


class RotateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="rotate.v1"):
    """Take these keys for this device in the place of those that it has."""

    request_id: RequestId
    device_id: Id
    at_ms: int
    device_key: PublicKey
    node_key_pem: Annotated[str, Meta(max_length=4096)]


class SignedRotation(msgspec.Struct, frozen=True, tag="signed-rotation.v1"):
    """A `RotateRequest`, signed with the key that the device has and with the one that it wants."""

    payload: bytes
    signature: bytes
    new_signature: bytes


class RotateReceipt(msgspec.Struct, frozen=True, kw_only=True, tag="rotated.v1"):
    """The server's word that these are the device's keys now. `node_id` is 0 until Flower knows the new one."""

    request_id: str
    device_id: str
    device_key: PublicKey
    node_id: int
    at_ms: int


class LeaveRequest(msgspec.Struct, frozen=True, kw_only=True, tag="leave.v1"):
    """This device is a member no more. What it sent is not touched: that is a `ForgetRequest`'s matter."""

    request_id: RequestId
    device_id: Id
    at_ms: int


class LeaveReceipt(msgspec.Struct, frozen=True, kw_only=True, tag="left.v1"):
    """The server's word that the device has left."""

    request_id: str
    device_id: str
    at_ms: int


class _Claim(msgspec.Struct, frozen=True):
    device_id: str


def prove_join(request: JoinRequest, private_key: bytes) -> JoinRequest:
    """The request with the proof that whoever asks has the private half of `request.device_key`."""
    return msgspec.structs.replace(
        request, signature=signing.sign(private_key, JOIN_DOMAIN, payload=_join_payload(request))
    )


def check_join(request: JoinRequest) -> None:
    """Return if the request was made by the holder of its device key: so nobody joins under another's words.

    Raises:
        SignatureInvalid: it was not.
        KeyMissing: its device key is none.
    """
    payload = _join_payload(request)
    signing.verify(request.device_key, JOIN_DOMAIN, payload=payload, signature=request.signature)


def _join_payload(request: JoinRequest) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(request, signature=b""), order="sorted")


def sign_request(request: msgspec.Struct, domain: str, *, private_key: bytes) -> SignedRequest:
    """A request under the device's key."""
    payload = _packed(request)
    return SignedRequest(payload, signing.sign(private_key, domain, payload=payload))


def open_request(signed: SignedRequest, domain: str, *, kind: type[T], public_key: bytes) -> T:
    """What a device asks.

    Raises:
        SignatureInvalid: not signed by this key for this purpose.
        WireError: signed, but not such a request, or out of its bounds.
    """
    signing.verify(public_key, domain, payload=signed.payload, signature=signed.signature)
    return _parse(signed.payload, kind)


def claimed_device(payload: bytes) -> str:
    """The device that a request says it is of, unproven: whose key to check it with.

    Raises:
        WireError: it names none.
    """
    return _parse(payload, _Claim).device_id


def sign_answer(answer: msgspec.Struct, domain: str, *, private_key: bytes) -> SignedAnswer:
    """The server's word."""
    payload = _packed(answer)
    return SignedAnswer(payload, signing.sign(private_key, domain, payload=payload))


def open_answer(signed: SignedAnswer, domain: str, *, kind: type[T], public_key: bytes) -> T:
    """What the server says. Whether it is of this request is the caller's to check.

    Raises:
        SignatureInvalid: not signed by this key for this purpose.
        WireError: signed, but no such answer.
    """
    signing.verify(public_key, domain, payload=signed.payload, signature=signed.signature)
    return _parse(signed.payload, kind)


def sign_rotation(request: RotateRequest, *, old_key: bytes, new_key: bytes) -> SignedRotation:
    """A rotation under both private keys."""
    payload = _packed(request)
    return SignedRotation(
        payload,
        signing.sign(old_key, ROTATE_DOMAIN, payload=payload),
        signing.sign(new_key, NEW_KEY_DOMAIN, payload=payload),
    )


def open_rotation(signed: SignedRotation, public_key: bytes) -> RotateRequest:
    """What a device whose key is `public_key` wants its keys to be. If they are that already (the answer was lost), the
    new key's word is enough: it is the device's key.

    Raises:
        SignatureInvalid: a signature is missing or of another key.
        WireError: signed, but not a rotation, or out of its bounds.
    """
    request = _parse(signed.payload, RotateRequest)
    if public_key != request.device_key:
        signing.verify(public_key, ROTATE_DOMAIN, payload=signed.payload, signature=signed.signature)
    signing.verify(request.device_key, NEW_KEY_DOMAIN, payload=signed.payload, signature=signed.new_signature)
    return request


def sign_statement(statement: KeyStatement, root_key: bytes) -> SignedAnswer:
    """The root key's word for another key."""
    return sign_answer(statement, STATEMENT_DOMAIN, private_key=root_key)


def open_statement(signed: SignedAnswer, root_key: bytes, *, purpose: str, now_ms: int) -> KeyStatement:
    """The key that the root key vouches for, for this purpose, now.

    Raises:
        SignatureInvalid: the root key did not sign it, or for another purpose or time.
        WireError: signed, but not a statement.
    """
    found = open_answer(signed, STATEMENT_DOMAIN, kind=KeyStatement, public_key=root_key)
    if found.purpose != purpose:
        raise SignatureInvalid(f"the root key vouches for this key as {found.purpose!r}, not as {purpose!r}")
    if not found.not_before_ms <= now_ms < found.expires_ms:
        raise SignatureInvalid(
            f"the root key vouches for the {purpose} key from {found.not_before_ms} to {found.expires_ms} ms "
            f"since 1970, and this clock says {now_ms}; set the clock, or ask the operator"
        )
    return found


def _packed(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _parse(payload: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{kind.__name__.strip('_')}: {error}") from error
