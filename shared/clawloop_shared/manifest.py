"""The signed manifest of an adapter: what it is for, what it holds, what it scored, until when it may be used.

The manifest travels as the very bytes that were signed (canonical JSON); they are verified before they are parsed.
Format: docs/formats/manifest.md.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared import signing
from clawloop_shared.errors import AdapterInvalid, SignatureInvalid
from clawloop_shared.files import sha256
from clawloop_shared.lora import FILES
from clawloop_shared.model_line import ModelLine

DOMAIN = "adapter-manifest.v1"
MAX_MANIFEST_BYTES = 1 << 20

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""lower-case hexadecimal and nothing else: it becomes the name of a file"""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the adapter."""

    name: str
    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fixed ids and the logprobs that base plus adapter must give them: `logprobs[i]` is that of `ids[i + 1]`."""

    ids: list[int]
    logprobs: list[float]


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gate measured, on the same tasks: mean reward of this adapter and of the one it replaces."""

    suite: str
    episodes: int
    reward: float
    reward_before: float
    standard_error: float


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="schema", tag="adapter.v1"
):
    """What is signed. `version` grows by one a release; `previous_sha256` names the manifest before it."""

    line: ModelLine
    version: int
    previous_sha256: str
    files: list[FileEntry]
    rank: int
    alpha: float
    target_modules: list[str]
    probe: Probe
    evaluation: Evaluation
    round_id: str
    lineage_root: str
    created_ms: int
    expires_ms: int
    cohort: str = ""
    """the devices that it is for; empty: all that have none of a cohort of their own"""

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights file, by which a policy names this adapter."""
        return next((f.sha256 for f in self.files if f.name.endswith(".safetensors")), "")


class SignedManifest(msgspec.Struct, frozen=True, tag="manifest.v1"):
    """The signed bytes, who signed them, and the signature."""

    body: bytes
    key_id: str
    signature: bytes

    @property
    def sha256(self) -> str:
        """The hash that the next manifest names as its previous one."""
        return sha256(self.body)


def sign_manifest(manifest: Manifest, private_key: bytes) -> SignedManifest:
    """Sign the canonical bytes of `manifest`."""
    body = msgspec.json.encode(manifest, order="sorted")
    public = signing.public_key(private_key)
    return SignedManifest(body, signing.key_id(public), signing.sign(private_key, DOMAIN, payload=body))


def open_manifest(signed: SignedManifest, public_key: bytes) -> Manifest:
    """Verify, then parse.

    Raises:
        SignatureInvalid: not signed by this key.
        AdapterInvalid: signed, but not a manifest of ours.
    """
    if len(signed.body) > MAX_MANIFEST_BYTES:
        raise AdapterInvalid(f"manifest of {len(signed.body)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    if signed.key_id != signing.key_id(public_key):
        raise SignatureInvalid(f"manifest is signed by key {signed.key_id}, expected {signing.key_id(public_key)}")
    signing.verify(public_key, DOMAIN, payload=signed.body, signature=signed.signature)
    try:
        manifest = msgspec.json.decode(signed.body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AdapterInvalid(f"manifest: {error}") from error
    if sorted(f.name for f in manifest.files) != sorted(FILES):
        raise AdapterInvalid(f"manifest names files {[f.name for f in manifest.files]}, expected {list(FILES)}")
    return manifest


def check_files(manifest: Manifest, files: dict[str, bytes]) -> None:
    """Return if `files` are exactly those that the manifest names, byte for byte.

    Raises:
        AdapterInvalid: one is missing, too much, or has another size or hash.
    """
    wanted = {f.name: f for f in manifest.files}
    if wanted.keys() != files.keys():
        raise AdapterInvalid(f"adapter has files {sorted(files)}, its manifest names {sorted(wanted)}")
    for name, data in files.items():
        if len(data) != wanted[name].size_bytes or sha256(data) != wanted[name].sha256:
            raise AdapterInvalid(f"{name}: {len(data)} bytes do not have the hash that the manifest names")
