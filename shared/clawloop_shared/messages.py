"""What edge and server say to each other: joining and forgetting over HTTPS, and the fixed set of Flower messages.

Each Flower message carries one of these structs, wire-encoded, as one value of one record. The server asks, the device
answers; a device never runs what it is sent. Message types and flows: docs/formats/messages.md.
"""

import base64
import binascii
from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared import wire
from clawloop_shared.errors import WireError
from clawloop_shared.log_head import LogProof
from clawloop_shared.manifest import SignedManifest
from clawloop_shared.model_line import ModelLine

STATUS = "query.status"
UPLOAD = "query.upload"
ADAPTER = "query.adapter"
LEARN = "train.start"
SECURE = "query.secure"
RECORD = "payload"
"""name of the one record in a Flower message, and of the one value in it"""
SMALL_PAYLOAD_BYTES = 1 << 20
"""up to here a payload travels as bytes in a ConfigRecord (three objects), else as a uint8 Array (in parts of 5 MB)"""
MAX_PAYLOAD_BYTES = 64 << 20
JOIN_PATH = "/v1/join"
MAX_JOIN_BYTES = 64 << 10
FORGET_PATH = "/v1/forget"
MAX_FORGET_BYTES = 4 << 20
MAX_FORGET_IDS = 10_000
MAX_ID_CHARACTERS = 256
INVITATION_PREFIX = "clawloop-invite:"
_MAX_INVITATION_CHARACTERS = 16 << 10


class Invitation(msgspec.Struct, frozen=True, tag="invitation.v1"):
    """What the operator hands to the owner of a device, as one line of text."""

    url: str
    ca_pem: str
    root_key: bytes
    code: str


class JoinRequest(msgspec.Struct, frozen=True, tag="join.v1"):
    """A device asks to be let in: the code, its signing key, and its Flower node key (PEM, EC P-384).

    `signature` is the device key's over all the rest (`membership.prove_join`).
    """

    code: str
    device_key: bytes
    node_key_pem: str
    line: ModelLine
    signature: bytes = b""


class SignedAnswer(msgspec.Struct, frozen=True, tag="signed-answer.v1"):
    """What the server says, as it was signed (JSON, sorted keys), and the signature."""

    payload: bytes
    signature: bytes


class JoinReply(msgspec.Struct, frozen=True, tag="joined.v1"):
    """The server's answer: the device's name there, its Flower node id, and the key that signs adapters.

    `statement` is the root key's word for that key (`membership.KeyStatement`). `waiting`: the operator must approve
    the device first; its node id is 0 until then.
    """

    device_id: str
    release_key: bytes
    line: ModelLine
    node_id: int
    statement: SignedAnswer
    waiting: bool = False


class StatusRequest(msgspec.Struct, frozen=True, tag="status-request.v1"):
    """How are you? `cohort`: how many devices of the same model line this server lets sync, this one among them."""

    cohort: int = 0


class StatusReply(msgspec.Struct, frozen=True, tag="status.v1"):
    """What the server needs to know to serve this device. No content, no names.

    `learning`: where learning at home stands, in a word or two; empty at levels without it.
    `log_size`: how many entries the log of released adapters had when this device saw it last; 0: it saw none.
    """

    level: str
    line: ModelLine
    adapter_version: int
    outbox_items: int
    app_version: str
    learning: Annotated[str, Meta(max_length=64)] = ""
    log_size: int = 0


class ItemReceipt(msgspec.Struct, frozen=True):
    """The server's word that an item is on its disk: an `ItemReceived` as it was signed, and the signature."""

    payload: bytes
    signature: bytes


class ItemReceived(msgspec.Struct, frozen=True, kw_only=True):
    """What an `ItemReceipt` says. `sha256` (hex) is of the item's body as it came."""

    device_id: str
    item_id: str
    received_ms: int
    sha256: str


class UploadRequest(msgspec.Struct, frozen=True, tag="upload-request.v1"):
    """Send what may leave. `receipts` are of items that the server has on disk. Items that are larger than `max_bytes`,
    up to `max_blob_bytes`, may come in parts (`blobs`)."""

    receipts: list[ItemReceipt]
    max_bytes: int
    max_blob_bytes: int = 0


class UploadItem(msgspec.Struct, frozen=True):
    """One item of the outbox, byte for byte as its owner could see it there."""

    item_id: str
    receipt_id: str
    kind: str
    body: bytes


class UploadReply(msgspec.Struct, frozen=True, tag="upload.v1"):
    """The next items; `more` tells that others wait. `adapter_version` is the one in use."""

    items: list[UploadItem]
    more: bool
    adapter_version: int


class AdapterOffer(msgspec.Struct, frozen=True, tag="adapter-offer.v1"):
    """An adapter with its manifest. Files that are too large for a message are not in it: `links` has the address on
    this server of each, by name (`blobs.signed_address`). `log`: that it is in the log of released adapters."""

    manifest: SignedManifest
    files: dict[str, bytes]
    links: dict[str, str] = {}
    log: LogProof | None = None


class AdapterReply(msgspec.Struct, frozen=True, tag="adapter-reply.v1"):
    """Whether the device took it, and if not, why (its reason names no content). `fetching`: its files are on their way
    to the device; it says which version it uses when it has them. `log_size`: as in `StatusReply`."""

    version: int
    installed: bool
    reason: str = ""
    fetching: bool = False
    log_size: int = 0


class SecureRequest(msgspec.Struct, frozen=True, tag="secure-request.v1"):
    """One phase of a secure sum, for one device. What `body` holds is the phase's own (docs/formats/secure.md)."""

    sum_id: str
    phase: str
    body: bytes


class SecureReply(msgspec.Struct, frozen=True, tag="secure-reply.v1"):
    """The device's part of that phase; `refused`: why it takes no part (any more); `item_id`: the outbox item that the
    body is. With none of them: ask again later."""

    sum_id: str
    phase: str
    body: bytes = b""
    refused: Annotated[str, Meta(max_length=300)] = ""
    item_id: str = ""


Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARACTERS)]


class ForgetRequest(msgspec.Struct, frozen=True, kw_only=True, tag="forget.v1"):
    """Delete what this device sent: the steps, signals and items of these ids, or `everything`.

    Asked again (with a new `at_ms`) under the same `request_id`, the answer is the same.
    """

    request_id: Annotated[str, Meta(pattern=r"\A[0-9A-Za-z-]{1,64}\Z")]
    device_id: Id
    at_ms: int
    record_ids: Annotated[list[Id], Meta(max_length=MAX_FORGET_IDS)] = []
    everything: bool = False


class ForgetReceipt(msgspec.Struct, frozen=True, kw_only=True, tag="forgotten.v1"):
    """What was done at a `ForgetRequest`: how many steps, signals and deltas were deleted, how many ids were unknown.

    `adapters` are the versions that had learned from any of it, or went on from one that had: they cannot unlearn.
    `device_deleted`: the operator deleted the whole device, so nothing of it is there, nor known whom it taught.
    """

    request_id: str
    device_id: str
    deleted: int
    unknown: int
    adapters: list[int]
    at_ms: int
    device_deleted: bool = False


class SignedRequest(msgspec.Struct, frozen=True, tag="signed-request.v1"):
    """What a device asks, as it signed it (JSON, sorted keys), and the signature."""

    payload: bytes
    signature: bytes


def write_invitation(invitation: Invitation) -> str:
    """The one line of text that the operator hands over."""
    return INVITATION_PREFIX + base64.urlsafe_b64encode(wire.encode(invitation)).decode().rstrip("=")


def read_invitation(text: str) -> Invitation:
    """The invitation in a line of text; white space that a mail or a terminal put in is ignored.

    Raises:
        WireError: it is not an invitation, or was cut.
    """
    packed = "".join(text.split())
    if not packed.startswith(INVITATION_PREFIX) or len(packed) > _MAX_INVITATION_CHARACTERS:
        raise WireError(f"not an invitation: it must begin with {INVITATION_PREFIX!r}; copy the whole line")
    body = packed.removeprefix(INVITATION_PREFIX)
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        return wire.decode(data, Invitation, max_bytes=_MAX_INVITATION_CHARACTERS)
    except (binascii.Error, WireError) as error:
        raise WireError(f"this invitation is damaged or cut ({error}); copy the whole line again") from error
