"""What edge and server say to each other: the join call over HTTPS, and the fixed set of Flower messages.

Each Flower message carries one of these structs, wire-encoded, in one uint8 Array. The server asks, the device
answers; a device never runs what it is sent. Message types and flows: docs/formats/messages.md.
"""

import msgspec

from clawloop_shared.manifest import SignedManifest
from clawloop_shared.model_line import ModelLine

STATUS = "query.status"
UPLOAD = "query.upload"
ADAPTER = "query.adapter"
RECORD = "payload"
"""name of the ArrayRecord in a Flower message, and of its one Array"""
MAX_PAYLOAD_BYTES = 64 << 20


class Invitation(msgspec.Struct, frozen=True, tag="invitation.v1"):
    """What the operator hands to the owner of a device, as one line of text."""

    url: str
    ca_pem: str
    root_key: bytes
    code: str


class JoinRequest(msgspec.Struct, frozen=True, tag="join.v1"):
    """A device asks to be let in: the code, its signing key, and its Flower node key (PEM, EC P-384)."""

    code: str
    device_key: bytes
    node_key_pem: str
    line: ModelLine


class JoinReply(msgspec.Struct, frozen=True, tag="joined.v1"):
    """The server's answer: the device's name there, and the key that signs adapters."""

    device_id: str
    release_key: bytes
    line: ModelLine


class StatusRequest(msgspec.Struct, frozen=True, tag="status-request.v1"):
    """How are you?"""


class StatusReply(msgspec.Struct, frozen=True, tag="status.v1"):
    """What the server needs to know to serve this device. No content, no names."""

    level: str
    line: ModelLine
    adapter_version: int
    outbox_items: int
    app_version: str


class UploadRequest(msgspec.Struct, frozen=True, tag="upload-request.v1"):
    """Send what may leave. `received` names the items that the server has on disk."""

    received: list[str]
    max_bytes: int


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
    """An adapter with its manifest."""

    manifest: SignedManifest
    files: dict[str, bytes]


class AdapterReply(msgspec.Struct, frozen=True, tag="adapter-reply.v1"):
    """Whether the device took it, and if not, why (its reason names no content)."""

    version: int
    installed: bool
    reason: str = ""
