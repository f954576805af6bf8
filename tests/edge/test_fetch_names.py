"""What a server may name a file of an adapter: its hash, and nothing that reaches another file of this device."""

from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.node.blobs import fetch_file
from clawloop_shared import signing
from clawloop_shared.blobs import BLOB_PATH, is_address_of
from clawloop_shared.errors import AdapterInvalid, WireError
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, open_manifest, sign_manifest
from clawloop_shared.model_line import ModelLine

GOOD = "0" * 64
NAMES = [
    "../victim",
    "/tmp/victim",
    "",
    "0" * 63,
    "A" * 64,
    "0" * 64 + "\n",
    "0" * 64 + "/../../victim",
    "0" * 63 + "\0",
]


class NoLine:
    """Nothing may be asked."""

    def ask(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a server was asked for a file that no file can be")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_hash_touches_no_file(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim.part"
    victim.write_bytes(b"mine")
    address = f"{BLOB_PATH}/{name}?device=one"
    assert not is_address_of(address, name)
    entry, line = FileEntry(WEIGHTS_FILE, 0, name), NoLine()
    with pytest.raises(WireError, match="not fetched"):
        fetch_file(line, address, entry=entry, folder=tmp_path / "fetched", permit=lambda: True)  # type: ignore[arg-type]
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in NAMES), (GOOD, -1)])
def test_a_manifest_that_says_so_is_none_though_it_is_signed(name: str, size: int) -> None:
    key = signing.new_key()
    with pytest.raises(AdapterInvalid):
        open_manifest(sign_manifest(manifest(name, size), key), signing.public_key(key))
    good = manifest(GOOD, 1)
    assert open_manifest(sign_manifest(good, key), signing.public_key(key)) == good


def manifest(name: str, size: int) -> Manifest:
    """A manifest whose weights have that hash and size."""
    return Manifest(
        line=ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c"),
        version=4,
        previous_sha256="",
        files=[FileEntry(CONFIG_FILE, 1, GOOD), FileEntry(WEIGHTS_FILE, size, name)],
        rank=1,
        alpha=1.0,
        target_modules=["q_proj"],
        probe=Probe([1, 2], [-0.5]),
        evaluation=Evaluation("suite", 1, 1.0, 0.0, 0.1),
        round_id="round",
        lineage_root="",
        created_ms=1,
        expires_ms=2,
    )
