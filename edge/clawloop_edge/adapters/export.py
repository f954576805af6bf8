"""A kept adapter as a folder for other programs: PEFT's files as released, mlx-lm's adapter, or a whole model.

Verified before anything is written: the signature and the hashes always, and that it is for this model wherever numbers
are read. Knows no pool and no command line; imports MLX only where the form asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.adapters.verify import AdapterLimits, VerifiedAdapter, verify_offer
from clawloop_shared.errors import ConfigError
from clawloop_shared.folders import new_folder
from clawloop_shared.lora import CONFIG_FILE, LoraConfig, ModelShape, parse_config
from clawloop_shared.manifest import Manifest, check_files, open_manifest
from clawloop_shared.manifest_file import MANIFEST_JSON, manifest_file
from clawloop_shared.messages import AdapterOffer
from clawloop_shared.model_line import read_line, read_shape

if TYPE_CHECKING:
    from clawloop_edge.adapters.convert import Factors

MLX_WEIGHTS_FILE = "adapters.safetensors"
_FLOAT_BYTES = 4
_HEADER_BYTES = 1 << 20
"""of a safetensors file and a settings file together, at most"""


class ExportForm(StrEnum):
    """For which program an adapter is written."""

    PEFT = "peft"
    """the very bytes that were released: peft + transformers, vLLM"""
    MLX = "mlx"
    """an adapter folder of mlx-lm"""
    FUSED = "fused"
    """a model folder of mlx-lm with the adapter in its weights"""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written. `files`: the size of each, in bytes; `widened`: how many layers are float32 now that were of
    fewer bits in the base."""

    version: int
    form: ExportForm
    folder: Path
    files: dict[str, int]
    weights_sha256: str
    line_id: str
    widened: int = 0

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(self.files.values())


def export_adapter(
    offer: AdapterOffer,
    out: Path,
    *,
    form: ExportForm,
    release_key: bytes,
    model: Callable[[], Path],
    limits: AdapterLimits = AdapterLimits(),  # noqa: B008  # frozen
) -> Exported:
    """Write a kept adapter to the folder `out`, whole or not at all. `model` gives the base's folder; of the form PEFT
    it is not asked.

    Raises:
        SignatureInvalid, AdapterInvalid: what is kept is not what was released, or (mlx, fused) not for this model.
        ConfigError: `out` is not empty, or the base cannot be used.
        StorageError: there is no room, or it cannot be written.
    """
    if form is ExportForm.PEFT:
        manifest = open_manifest(offer.manifest, release_key)
        check_files(manifest, offer.files)
        files = {**offer.files, MANIFEST_JSON: manifest_file(offer.manifest)}
        with new_folder(out, needs_bytes=sum(map(len, files.values()))) as (draft, target):
            _put(draft, files)
            return _exported(manifest, draft, folder=target, form=form)
    base = model()
    adapter = verify_offer(
        offer,
        release_key=release_key,
        line=read_line(base),
        shape=read_shape(base),
        seen_version=0,
        now_ms=None,
        limits=limits,
    )
    return (_export_mlx if form is ExportForm.MLX else _export_fused)(adapter, out, base=base, limits=limits)


def _export_mlx(adapter: VerifiedAdapter, out: Path, *, base: Path, limits: AdapterLimits) -> Exported:
    """What the edge serves with, under mlx-lm's names: the scale is in B, so that its own is 1."""
    import mlx.core as mx

    config, shape = parse_config(adapter.files[CONFIG_FILE]), read_shape(base)
    needs = _FLOAT_BYTES * sum(config.r * sum(size) for size in _adapted(config, shape).values())
    with new_folder(out, needs_bytes=needs + _HEADER_BYTES) as (draft, target):
        factors = _factors(adapter, limits)
        tensors = {f"{path}.{name}": array for path, pair in factors.items() for name, array in _named(pair)}
        _saved(lambda: mx.save_safetensors(str(draft / MLX_WEIGHTS_FILE), tensors, metadata={"format": "mlx"}))
        _put(draft, {CONFIG_FILE: _mlx_settings(config, factors), MANIFEST_JSON: manifest_file(adapter.signed)})
        return _exported(adapter.manifest, draft, folder=target, form=ExportForm.MLX)


def _export_fused(adapter: VerifiedAdapter, out: Path, *, base: Path, limits: AdapterLimits) -> Exported:
    from clawloop_edge.engine.fusing import fuse, save_fused

    config, shape = parse_config(adapter.files[CONFIG_FILE]), read_shape(base)
    widened = _FLOAT_BYTES * sum(inputs * outputs for inputs, outputs in _adapted(config, shape).values())
    needs = widened + sum(path.stat().st_size for path in base.iterdir() if path.is_file())
    with new_folder(out, needs_bytes=needs + _HEADER_BYTES) as (draft, target):
        fused = fuse(base, _factors(adapter, limits))
        _saved(lambda: save_fused(fused, draft, base=base))
        _put(draft, {MANIFEST_JSON: manifest_file(adapter.signed)})
        found = _exported(adapter.manifest, draft, folder=target, form=ExportForm.FUSED)
        return msgspec.structs.replace(found, widened=fused.widened)


def _factors(adapter: VerifiedAdapter, limits: AdapterLimits) -> dict[str, Factors]:
    from clawloop_edge.adapters.convert import read_factors

    return read_factors(adapter.files, rank_max=limits.max_rank)


def _named(pair: Factors) -> tuple[tuple[str, Any], ...]:
    return ("lora_a", pair[0]), ("lora_b", pair[1])


def _mlx_settings(config: LoraConfig, factors: dict[str, Factors]) -> bytes:
    """mlx-lm's adapter_config.json. `keys` are full paths, which it looks for in the whole model beside the names that
    it looks for in the last `num_layers` layers (0: in all of them, where no full path is found)."""
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 0,
        "lora_parameters": {"rank": config.r, "scale": 1.0, "dropout": 0.0, "keys": sorted(factors)},
    }
    return msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n"


def _adapted(config: LoraConfig, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The layers that the adapter changes, with their inputs and outputs."""
    return {p: size for p, size in shape.linears().items() if p.rsplit(".", 1)[1] in config.target_modules}


def _saved(save: Callable[[], None]) -> None:
    """Save by MLX, which tells of a full disk by a RuntimeError."""
    try:
        save()
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _exported(manifest: Manifest, draft: Path, *, folder: Path, form: ExportForm) -> Exported:
    return Exported(
        version=manifest.version,
        form=form,
        folder=folder,
        files={path.name: path.stat().st_size for path in sorted(draft.iterdir())},
        weights_sha256=manifest.weights_sha256,
        line_id=manifest.line.line_id,
    )


def form_of(*, peft: bool, mlx: bool, fused: bool) -> ExportForm:
    """The form that the options name; PEFT without any.

    Raises:
        ConfigError: they name more than one.
    """
    named = [form for form, given in zip(ExportForm, (peft, mlx, fused), strict=True) if given]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(f'--{form}' for form in named)} are different forms; give one of them")
    return named[0] if named else ExportForm.PEFT
