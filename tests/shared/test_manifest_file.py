"""manifest.json gives back the very bytes that were signed, and nothing where it is not one."""

import json

import pytest

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.manifest import MAX_MANIFEST_BYTES, SignedManifest
from clawloop_shared.manifest_file import manifest_file, read_manifest_file


def test_the_body_is_kept_byte_for_byte_and_readable() -> None:
    signed = SignedManifest(b'{"a":"\\u00e9 \xc3\xa9","b":1.50}', "0123456789abcdef", bytes(range(64)))
    raw = manifest_file(signed)
    assert read_manifest_file(raw) == signed
    assert json.loads(raw)["manifest"] == {"a": "é é", "b": 1.5}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b'{"key_id":"k","signature":"!","manifest":{}}',
        b'{"key_id":"k","signature":"","manifest":{},"more":1}',
        b'{"key_id":"k","signature":"","manifest":{',
        b"\xff" * 10,
        b" " * (2 * MAX_MANIFEST_BYTES + 1),
    ],
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(AdapterInvalid, match=r"manifest\.json"):
        read_manifest_file(raw)
