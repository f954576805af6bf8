"""A signed manifest as a file that people and other programs read: JSON in which the signed bytes stand as they are.

Format: docs/formats/manifest.md. Verifies nothing: `manifest.open_manifest` does.
"""

import msgspec

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.manifest import MAX_MANIFEST_BYTES, SignedManifest

MANIFEST_JSON = "manifest.json"


class _ManifestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`manifest` is the signed body, byte for byte; `signature` is base64."""

    key_id: str
    signature: bytes
    manifest: msgspec.Raw


def manifest_file(signed: SignedManifest) -> bytes:
    """The content of a manifest.json."""
    return msgspec.json.encode(_ManifestFile(signed.key_id, signed.signature, msgspec.Raw(signed.body))) + b"\n"


def read_manifest_file(raw: bytes) -> SignedManifest:
    """What `manifest_file` wrote, the body as it was signed; not verified.

    Raises:
        AdapterInvalid: it is no such file.
    """
    if len(raw) > 2 * MAX_MANIFEST_BYTES:
        raise AdapterInvalid(f"{MANIFEST_JSON} of {len(raw)} bytes; the limit is {2 * MAX_MANIFEST_BYTES}")
    try:
        found = msgspec.json.decode(raw, type=_ManifestFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterInvalid(f"{MANIFEST_JSON}: {error}") from error
    return SignedManifest(bytes(found.manifest), found.key_id, found.signature)
