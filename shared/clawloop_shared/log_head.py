"""The log of released adapters, as both sides see it: what an entry is, and the signed head that commits to them all.

A log is of one model line. Its entries are the released manifests in the order of their release, for all devices and
for cohorts alike; its tree is `merkle`'s. Format: docs/formats/log.md.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared import signing
from clawloop_shared.errors import ProofInvalid, SignatureInvalid
from clawloop_shared.manifest import Sha256
from clawloop_shared.merkle import MAX_SIZE, leaf_hash

DOMAIN = "log-head.v1"
MAX_HEAD_BYTES = 4096
_ENTRY = b"clawloop-log-entry-v1"


class TreeHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="schema", tag="log.v1"):
    """What is signed: that the log of a line had these many entries, and this root over them, when the last came."""

    line_id: str
    size: Annotated[int, Meta(ge=0, lt=MAX_SIZE)]
    root: Sha256
    at_ms: int


class SignedHead(msgspec.Struct, frozen=True, tag="log-head.v1"):
    """The signed bytes (canonical JSON), who signed them, and the signature."""

    body: bytes
    key_id: str
    signature: bytes


class LogProof(msgspec.Struct, frozen=True):
    """What comes with an offered adapter: that it is entry `index` of the log under `head`, and that this log goes on
    from the one of `from_size` entries, which is what the device told that it knows (0: none)."""

    head: SignedHead
    index: int
    inclusion: list[bytes]
    from_size: int = 0
    consistency: list[bytes] = []


def entry_leaf(version: int, manifest_sha256: str) -> bytes:
    """The leaf (its hash) of a released manifest, by its version and the SHA-256 (hex) of its signed body.

    Raises:
        ProofInvalid: no adapter has such a version.
    """
    if not 0 <= version < 1 << 64:
        raise ProofInvalid(f"no log has an adapter {version}")
    return leaf_hash(_ENTRY + version.to_bytes(8, "big") + bytes.fromhex(manifest_sha256))


def sign_head(head: TreeHead, private_key: bytes) -> SignedHead:
    """Sign the canonical bytes of `head`."""
    body = msgspec.json.encode(head, order="sorted")
    public = signing.public_key(private_key)
    return SignedHead(body, signing.key_id(public), signing.sign(private_key, DOMAIN, payload=body))


def open_head(signed: SignedHead, public_key: bytes) -> TreeHead:
    """Verify, then parse.

    Raises:
        SignatureInvalid: not signed by this key as the head of a log.
        ProofInvalid: signed, but not a head of ours.
    """
    if signed.key_id != signing.key_id(public_key):
        raise SignatureInvalid(f"head of log is signed by key {signed.key_id}, expected {signing.key_id(public_key)}")
    signing.verify(public_key, DOMAIN, payload=signed.body, signature=signed.signature)
    return read_head(signed)


def read_head(signed: SignedHead) -> TreeHead:
    """What a head says, its signature not looked at.

    Raises:
        ProofInvalid: it is not a head of ours.
    """
    if len(signed.body) > MAX_HEAD_BYTES:
        raise ProofInvalid(f"head of log has {len(signed.body)} bytes; the limit is {MAX_HEAD_BYTES}")
    try:
        return msgspec.json.decode(signed.body, type=TreeHead)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProofInvalid(f"head of log: {error}") from error
