"""Signatures and manifests: what was signed comes back, anything else is refused before it is parsed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared import signing, wire
from clawloop_shared.errors import AdapterInvalid, KeyMissing, SignatureInvalid
from clawloop_shared.files import sha256
from clawloop_shared.lora import FILES
from clawloop_shared.manifest import (
    Evaluation,
    FileEntry,
    Manifest,
    Probe,
    SignedManifest,
    check_files,
    open_manifest,
    sign_manifest,
)
from clawloop_shared.model_line import ModelLine

KEY = bytes(range(32))
PUBLIC = signing.public_key(KEY)
CONTENT = {name: name.encode() * 3 for name in FILES}
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
finite = st.floats(allow_nan=False, allow_infinity=False)

manifests = st.builds(
    Manifest,
    line=st.builds(ModelLine, base_sha256=hexes, tokenizer_sha256=hexes, template_sha256=hexes),
    version=st.integers(1, 2**40),
    previous_sha256=hexes,
    files=st.just([FileEntry(n, len(d), sha256(d)) for n, d in CONTENT.items()]),
    rank=st.integers(1, 64),
    alpha=finite,
    target_modules=st.lists(st.text(max_size=8), max_size=3),
    probe=st.builds(Probe, ids=st.lists(st.integers(0, 9)), logprobs=st.lists(finite)),
    evaluation=st.builds(
        Evaluation,
        suite=st.text(max_size=9),
        episodes=st.integers(0, 9),
        reward=finite,
        reward_before=finite,
        standard_error=finite,
    ),
    round_id=st.text(max_size=26),
    lineage_root=hexes,
    created_ms=st.integers(0, 2**45),
    expires_ms=st.integers(0, 2**45),
)


@given(manifests)
def test_a_signed_manifest_comes_back_equal_over_the_wire(manifest: Manifest) -> None:
    signed = wire.decode(wire.encode(sign_manifest(manifest, KEY)), SignedManifest)
    assert open_manifest(signed, PUBLIC) == manifest
    check_files(manifest, CONTENT)


@given(manifests, st.data())
def test_any_changed_byte_breaks_the_signature(manifest: Manifest, data: st.DataObject) -> None:
    signed = sign_manifest(manifest, KEY)
    body = bytearray(signed.body)
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SignatureInvalid):
        open_manifest(msgspec.structs.replace(signed, body=bytes(body)), PUBLIC)


def test_another_key_is_refused_by_name() -> None:
    signed = SignedManifest(b"{}", "0" * 16, b"\0" * 64)
    with pytest.raises(SignatureInvalid, match=signing.key_id(PUBLIC)):
        open_manifest(signed, PUBLIC)


def test_signed_bytes_that_are_no_manifest_are_invalid_not_forged() -> None:
    body = b'{"schema":"adapter.v1","code":"import os"}'
    signed = SignedManifest(body, signing.key_id(PUBLIC), signing.sign(KEY, "adapter-manifest.v1", payload=body))
    with pytest.raises(AdapterInvalid):
        open_manifest(signed, PUBLIC)


def test_a_signature_for_one_domain_is_none_for_another() -> None:
    signature = signing.sign(KEY, "receipt.v1", payload=b"x")
    signing.verify(PUBLIC, "receipt.v1", payload=b"x", signature=signature)
    with pytest.raises(SignatureInvalid):
        signing.verify(PUBLIC, "adapter-manifest.v1", payload=b"x", signature=signature)


def test_a_missing_key_is_unchecked_which_is_not_invalid() -> None:
    with pytest.raises(KeyMissing):
        signing.verify(b"", "receipt.v1", payload=b"x", signature=b"\0" * 64)


@pytest.mark.parametrize("change", ["missing", "extra", "changed"])
def test_files_that_are_not_the_named_ones_are_refused(change: str) -> None:
    files = dict(CONTENT)
    if change == "missing":
        files.popitem()
    elif change == "extra":
        files["run.py"] = b"print()"
    else:
        files[FILES[0]] = files[FILES[0]][::-1]
    names = [FileEntry(n, len(d), sha256(d)) for n, d in CONTENT.items()]
    line = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")
    manifest = Manifest(
        line=line,
        version=1,
        previous_sha256="",
        files=names,
        rank=8,
        alpha=16,
        target_modules=["q_proj"],
        probe=Probe([], []),
        evaluation=Evaluation("", 0, 0, 0, 0),
        round_id="",
        lineage_root="",
        created_ms=0,
        expires_ms=0,
    )
    with pytest.raises(AdapterInvalid):
        check_files(manifest, files)


def test_key_words_are_six_and_differ_by_key() -> None:
    assert len(signing.key_words(PUBLIC).split()) == 6
    assert signing.key_words(PUBLIC) != signing.key_words(signing.public_key(bytes(32)))
