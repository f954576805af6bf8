"""Is this adapter what it claims to be, and for us? Pure: keys, clock and what was seen before are arguments.

Order matters: the signature first, then what is signed, then the bytes it names. No framework sees a byte before that.
"""

import msgspec

from clawloop_edge.adapters.errors import Expired, OldVersion, WrongLine
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, LoraConfig, ModelShape, check_tensors, parse_config
from clawloop_shared.manifest import Manifest, SignedManifest, check_files, open_manifest
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy
from clawloop_shared.safetensors_header import read_header

MAX_PROBE_TOKENS = 4096


class AdapterLimits(msgspec.Struct, frozen=True):
    """The largest adapter that this device takes."""

    max_rank: int = 64
    max_bytes: int = 1 << 30


class VerifiedAdapter(msgspec.Struct, frozen=True):
    """An adapter that passed every check that needs no model."""

    manifest: Manifest
    signed: SignedManifest
    files: dict[str, bytes]

    @property
    def policy(self) -> Policy:
        """The policy that the base becomes with it."""
        manifest = self.manifest
        return Policy(manifest.line.line_id, manifest.version, manifest.weights_sha256)


def verify_offer(
    offer: AdapterOffer,
    *,
    release_key: bytes,
    line: ModelLine,
    shape: ModelShape,
    seen_version: int,
    now_ms: int | None,
    limits: AdapterLimits,
) -> VerifiedAdapter:
    """Check everything but the numbers. `release_key` is the one pinned when this device joined.

    `seen_version` is the newest version ever taken. `now_ms` is None for an adapter that was installed before it
    expired: it may go on serving, so that a server that is away changes nothing.

    Raises:
        SignatureInvalid: not signed by `release_key`.
        WrongLine, Expired, OldVersion: signed, but not for this device now.
        AdapterInvalid: files, settings, shapes or sizes are not what they must be.
    """
    manifest = open_manifest(offer.manifest, release_key)
    _check_place(manifest, line=line, seen_version=seen_version, now_ms=now_ms)
    check_files(manifest, offer.files)
    _check_contents(manifest, offer.files, shape=shape, limits=limits)
    return VerifiedAdapter(manifest, offer.manifest, offer.files)


def _check_place(manifest: Manifest, *, line: ModelLine, seen_version: int, now_ms: int | None) -> None:
    if manifest.line != line:
        raise WrongLine(f"adapter {manifest.version} is for line {manifest.line.line_id}, this is {line.line_id}")
    if manifest.version <= seen_version:
        raise OldVersion(f"adapter {manifest.version} is not newer than {seen_version}, which was taken before")
    if now_ms is not None and manifest.expires_ms <= now_ms:
        raise Expired(
            f"adapter {manifest.version} expired {(now_ms - manifest.expires_ms) // 1000} s ago; release it anew"
        )


def _check_contents(manifest: Manifest, files: dict[str, bytes], *, shape: ModelShape, limits: AdapterLimits) -> None:
    config = parse_config(files[CONFIG_FILE])
    if config.r > limits.max_rank:
        raise AdapterInvalid(f"adapter {manifest.version} has rank {config.r}, over this device's {limits.max_rank}")
    _check_agrees(manifest, config)
    check_tensors(read_header(files[WEIGHTS_FILE], max_bytes=limits.max_bytes), config, shape=shape)
    probe = manifest.probe
    if not 2 <= len(probe.ids) <= MAX_PROBE_TOKENS or len(probe.logprobs) != len(probe.ids) - 1:
        raise AdapterInvalid(
            f"probe has {len(probe.ids)} ids and {len(probe.logprobs)} logprobs; needs one less, and 2 ids"
        )


def _check_agrees(manifest: Manifest, config: LoraConfig) -> None:
    same = manifest.rank == config.r and manifest.alpha == config.lora_alpha
    if not same or sorted(manifest.target_modules) != sorted(config.target_modules):
        raise AdapterInvalid(
            f"adapter {manifest.version}: its {CONFIG_FILE} and its manifest differ in rank, alpha or targets"
        )
