import hashlib

import msgspec
import pytest

from clawloop_shared import signing, wire
from clawloop_shared.errors import ProofInvalid, SignatureInvalid
from clawloop_shared.log_head import DOMAIN, SignedHead, TreeHead, entry_leaf, open_head, read_head, sign_head
from clawloop_shared.manifest import DOMAIN as MANIFEST_DOMAIN

KEY = bytes(range(32))
PUBLIC = signing.public_key(KEY)
HEAD = TreeHead(line_id="line", size=3, root="ab" * 32, at_ms=5)


def signed(body: bytes, *, domain: str = DOMAIN) -> SignedHead:
    return SignedHead(body, signing.key_id(PUBLIC), signing.sign(KEY, domain, payload=body))


def test_a_head_crosses_the_wire_and_opens_with_its_key_alone() -> None:
    head = wire.decode(wire.encode(sign_head(HEAD, KEY)), SignedHead)
    assert open_head(head, PUBLIC) == read_head(head) == HEAD
    assert head.body == b'{"at_ms":5,"line_id":"line","root":"' + b"ab" * 32 + b'","schema":"log.v1","size":3}'
    with pytest.raises(SignatureInvalid, match="expected"):
        open_head(head, signing.public_key(bytes(32)))
    changed = msgspec.structs.replace(head, body=head.body.replace(b'"size":3', b'"size":4'))
    with pytest.raises(SignatureInvalid, match="was not made"):
        open_head(changed, PUBLIC)


def test_what_was_signed_as_something_else_is_no_head() -> None:
    with pytest.raises(SignatureInvalid, match="was not made"):
        open_head(signed(sign_head(HEAD, KEY).body, domain=MANIFEST_DOMAIN), PUBLIC)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xff",
        msgspec.json.encode({**msgspec.to_builtins(HEAD), "size": -1}),
        msgspec.json.encode({**msgspec.to_builtins(HEAD), "size": 1 << 62}),
        msgspec.json.encode({**msgspec.to_builtins(HEAD), "root": "AB" * 32}),
        msgspec.json.encode({**msgspec.to_builtins(HEAD), "more": 1}),
        msgspec.json.encode({**msgspec.to_builtins(HEAD), "line_id": "x" * 5000}),
    ],
)
def test_signed_bytes_that_are_no_head_are_refused(body: bytes) -> None:
    with pytest.raises(ProofInvalid, match="head of log"):
        open_head(signed(body), PUBLIC)


def test_an_entry_is_its_version_and_the_hash_of_its_manifest() -> None:
    manifest = hashlib.sha256(b"manifest").hexdigest()
    entry = b"clawloop-log-entry-v1" + bytes(7) + b"\x07" + bytes.fromhex(manifest)
    assert entry_leaf(7, manifest) == hashlib.sha256(b"\0" + entry).digest()
    assert entry_leaf(8, manifest) != entry_leaf(7, manifest)
    for version in (-1, 1 << 64):
        with pytest.raises(ProofInvalid, match="no log has an adapter"):
            entry_leaf(version, manifest)
