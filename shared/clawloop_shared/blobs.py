"""What is too large for a message: items in signed parts from device to server, files by signed address from server to
device, both over the server's own HTTPS port. Knows no socket and no file. Flows: docs/formats/messages.md.
"""

import hashlib
import hmac
import re
from typing import Annotated
from urllib.parse import parse_qsl, urlencode

import msgspec
from msgspec import Meta

from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid, WireError
from clawloop_shared.manifest import Sha256
from clawloop_shared.messages import Id, ItemReceipt

BLOB_PATH = "/v1/blobs"
PART_BYTES = 1 << 20
"""of an item; every part but the last has as many. A slow line (10 KB/s) sends one in two minutes"""
MAX_PART_REQUEST_BYTES = PART_BYTES + (64 << 10)
MAX_STATE_BYTES = 64 << 10
FETCH_BYTES = 4 << 20
"""of a file, in one answer"""
PART_DOMAIN = "blob-part"
_URL_DOMAIN = "blob-address"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class PartHead(msgspec.Struct, frozen=True, kw_only=True):
    """What a part says of itself and of the item it is of. `size_bytes` and `sha256` are of the whole item's body,
    `part_sha256` of these bytes. A part without bytes asks how far the server is."""

    device_id: Id
    item_id: Id
    receipt_id: str
    kind: str
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=1, le=1 << 40)]
    offset: Annotated[int, Meta(ge=0, le=1 << 40)]
    part_sha256: Sha256
    at_ms: int


class BlobPart(msgspec.Struct, frozen=True, tag="blob-part.v1"):
    """A `PartHead` as the device signed it (JSON, sorted keys), the signature, and the part's bytes."""

    payload: bytes
    signature: bytes
    data: bytes = b""


class BlobState(msgspec.Struct, frozen=True, tag="blob-state.v1"):
    """How many bytes of an item are on the server's disk; once it has all of them and keeps the item, its receipt."""

    offset: int
    receipt: ItemReceipt | None = None


def sign_part(head: PartHead, data: bytes, private_key: bytes) -> BlobPart:
    """A part under the device's key."""
    payload = msgspec.json.encode(head, order="sorted")
    return BlobPart(payload, signing.sign(private_key, PART_DOMAIN, payload=payload), data)


def claimed_sender(part: BlobPart) -> str:
    """The device that a part says it is of, unproven: whose key to check it with.

    Raises:
        WireError: it names none.
    """
    return _head(part).device_id


def open_part(part: BlobPart, public_key: bytes) -> PartHead:
    """What a part says, if its device signed it and its bytes are those that were signed.

    Raises:
        SignatureInvalid: not signed by this key, or with other bytes.
        WireError: signed, but no part of ours.
    """
    signing.verify(public_key, PART_DOMAIN, payload=part.payload, signature=part.signature)
    head = _head(part)
    if hashlib.sha256(part.data).hexdigest() != head.part_sha256:
        raise SignatureInvalid(f"the bytes at {head.offset} of item {head.item_id} are not those that were signed")
    return head


def signed_address(sha256: str, *, device_id: str, expires_s: int, key: bytes) -> str:
    """Path and query under which that device may fetch that file until then (seconds since 1970)."""
    query = {"device": device_id, "expires": str(expires_s), "sig": _mac(sha256, device_id, str(expires_s), key=key)}
    return f"{BLOB_PATH}/{sha256}?{urlencode(query)}"


def check_address(sha256: str, query: str, *, now_s: float, key: bytes) -> str:
    """The device that was given this address, if it is good now.

    Raises:
        SignatureInvalid: it was not made here, or for another file, or is over.
    """
    fields = parse_qsl(query, keep_blank_values=True)
    found = dict(fields)
    if not _SHA256.fullmatch(sha256) or [name for name, _ in fields] != ["device", "expires", "sig"]:
        raise SignatureInvalid("this is no address of a file here")
    wanted = _mac(sha256, found["device"], found["expires"], key=key)
    if not hmac.compare_digest(wanted.encode(), found["sig"].encode()):
        raise SignatureInvalid("this address was not made here")
    if int(found["expires"]) < now_s:  # the signature says that it is a number of ours
        raise SignatureInvalid("this address is over; the adapter is offered again")
    return found["device"]


def is_address_of(address: str, sha256: str) -> bool:
    """Whether an address that a server gave is one of that file on that same server, and nothing else."""
    path, mark, query = address.partition("?")
    named = _SHA256.fullmatch(sha256) is not None and path == f"{BLOB_PATH}/{sha256}"
    return named and bool(mark) and address.isascii() and query.isprintable()


def _mac(sha256: str, device_id: str, expires: str, *, key: bytes) -> str:
    payload = msgspec.json.encode([sha256, device_id, expires])
    return hmac.new(key, signing.framed(_URL_DOMAIN, payload), hashlib.sha256).hexdigest()


def _head(part: BlobPart) -> PartHead:
    try:
        return msgspec.json.decode(part.payload, type=PartHead)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"part of an item: {error}") from error
