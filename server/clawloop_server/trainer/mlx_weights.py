"""The weights of a model folder as MLX writes it, quantised or not, as torch tensors. Needs no MLX.

Affine quantisation (MLX's `quantize`): in each row of a weight, groups of `group_size` neighbours share a scale s and a
bias b, and w = s q + b. The q of a row are one stream of `bits` bits each, the lowest first, in little-endian 32-bit
words: 8 values fill `bits` bytes, for every number of bits (also 3, 5 and 6, whose values cross bytes).

safetensors alone are read, mapped into memory, and one weight at a time becomes numbers, in blocks of rows: the peak is
near the result's own size. Knows no model, only names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clawloop_server.trainer.base_config import Affine, Quantization
from clawloop_shared.errors import ConfigError

FILES = "model*.safetensors"
"""what mlx-lm loads of a folder"""
BLOCK = 1 << 20
"""values that are unpacked at once"""
_SCALES, _BIASES, _WEIGHT = ".scales", ".biases", ".weight"
_STACKED = re.compile(r"^(?P<mlp>.+)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)$")


class Parts(NamedTuple):
    """What MLX stores of a quantised weight: words (.., rows, inputs · bits / 32) in uint32; scales and biases (..,
    rows, inputs / group_size) in the type that the weight had."""

    words: Tensor
    scales: Tensor
    biases: Tensor


def dequantize(parts: Parts, how: Affine) -> Tensor:
    """s q + b, (.., rows, inputs), in the type of the scales: bit for bit what `mx.dequantize` gives on a CPU.

    In half precision MLX rounds the product and then the sum, and so does this; a Metal kernel rounds once. Give scales
    and biases in float32 where that matters: then both are the same.

    Raises:
        ConfigError: the shapes or types do not fit.
    """
    found = torch.empty(_shape(parts, how), dtype=parts.scales.dtype)
    _fill(found, parts, how=how)
    return found


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The q of `packed` (rows, words), as uint8 (rows, words · 32 / bits)."""
    bytes_RN = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_RN
    groups_RGB = bytes_RN.view(len(packed), -1, bits)
    found_RG8 = torch.empty(*groups_RGB.shape[:2], 8, dtype=torch.uint8)
    for n in range(8):
        byte, shift = divmod(n * bits, 8)
        value = groups_RGB[..., byte] >> shift
        if shift + bits > 8:
            value |= groups_RGB[..., byte + 1] << (8 - shift)
        found_RG8[..., n] = value & ((1 << bits) - 1)
    return found_RG8.view(len(packed), -1)


def _fill(target: Tensor, parts: Parts, *, how: Affine) -> None:
    """Write s q + b, computed in the type of the scales, into `target`, block by block."""
    if target.ndim > 2:
        for n in range(len(target)):
            _fill(target[n], Parts(*(part[n] for part in parts)), how=how)
        return
    rows = max(1, BLOCK // target.shape[-1])
    for start in range(0, len(target), rows):
        words, scales, biases = (part[start : start + rows] for part in parts)
        values = unpack(words, how.bits).to(scales.dtype).view(*scales.shape, how.group_size)
        target[start : start + rows] = values.mul_(scales[..., None]).add_(biases[..., None]).flatten(-2)


def _shape(parts: Parts, how: Affine) -> tuple[int, ...]:
    """The shape of the weight."""
    words, scales, biases = parts
    inputs = int(scales.shape[-1]) * how.group_size
    fits = words.shape == (*scales.shape[:-1], inputs * how.bits // 32) and scales.shape == biases.shape
    types = words.dtype == torch.uint32 and scales.dtype == biases.dtype and scales.dtype.is_floating_point
    if not fits or not types:
        raise ConfigError(
            f"words {words.dtype} {tuple(words.shape)} with scales {scales.dtype} {tuple(scales.shape)} and biases"
            f" {biases.dtype} {tuple(biases.shape)} are not {how.bits} bits in groups of {how.group_size}"
        )
    return (*words.shape[:-1], inputs)


class Source(Protocol):
    """A tensor that is still on disk: `source[...]` reads it. What transformers takes for one of a checkpoint."""

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Packed:
    """A quantised weight on disk. Its numbers are those of `dequantize` in at least float32, rounded once."""

    module: str
    sources: tuple[Source, Source, Source]
    how: Affine
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        parts = Parts(*(source[...] for source in self.sources))
        try:
            shape = _shape(parts, self.how)
        except ConfigError as error:
            raise ConfigError(f"{self.module}: {error}") from error
        if not all(bool(part.isfinite().all()) for part in (parts.scales, parts.biases)):
            raise ConfigError(f"{self.module} has scales or biases that are not finite; export the model again")
        # Not in half precision: quantised products sum in float32, and a Metal kernel that dequantises rounds once.
        exact = torch.promote_types(torch.promote_types(parts.scales.dtype, self.dtype), torch.float32)
        found = torch.empty(shape, dtype=self.dtype)
        _fill(found, Parts(parts.words, parts.scales.to(exact), parts.biases.to(exact)), how=self.how)
        chosen: Tensor = found[index]
        return chosen


class Joined:
    """Matrices of experts on disk, one below the other: (experts, a, inputs) and (experts, b, inputs) as (experts,
    a + b, inputs)."""

    def __init__(self, *parts: Source) -> None:
        self._parts = parts

    def __getitem__(self, index: Any) -> Tensor:
        return torch.cat([part[...] for part in self._parts], dim=-2)[index]


def read_weights(folder: Path, quantization: Quantization | None, *, dtype: torch.dtype) -> dict[str, Source]:
    """Every weight of a folder by the name that transformers has for it, still on disk.

    Raises:
        ConfigError: no weights, a broken file, a name twice, or scales of a layer that is not to be quantised.
    """
    stored = _stored(folder)
    found = {}
    for name, source in stored.items():
        module = name.rsplit(".", 1)[0]
        if name.endswith((_SCALES, _BIASES)) and f"{module}{_WEIGHT}" in stored:
            continue
        packed = name.endswith(_WEIGHT) and f"{module}{_SCALES}" in stored
        if packed:
            source = Packed(module, _parts(stored, module), _how(module, quantization), dtype)
        found[name] = source
    return _as_transformers(found)


def _stored(folder: Path) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for path in sorted(folder.glob(FILES)):
        try:
            file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if twice := sorted(found.keys() & slices.keys()):
            raise ConfigError(f"{path} has {twice[0]}, which another file has too; remove the one that is too much")
        found |= slices
    if not found:
        raise ConfigError(f"{folder} has no weights in {FILES}")
    return found


def _parts(stored: dict[str, Source], module: str) -> tuple[Source, Source, Source]:
    if f"{module}{_BIASES}" not in stored:
        raise ConfigError(f"{module} has scales and no biases: not quantised in mode affine, which alone is supported")
    return stored[f"{module}{_WEIGHT}"], stored[f"{module}{_SCALES}"], stored[f"{module}{_BIASES}"]


def _how(module: str, quantization: Quantization | None) -> Affine:
    how = quantization.of(module) if quantization else None
    if how is None:
        raise ConfigError(f"{module} has scales, but config.json does not say that it is quantised")
    return how


def _as_transformers(weights: dict[str, Source]) -> dict[str, Source]:
    """MLX stacks the matrices of a layer's experts under `switch_mlp`, transformers under `experts`, with gate and up
    as one (gate first). All other names are the same for both."""
    found: dict[str, Source] = {}
    for name, source in weights.items():
        stacked = _STACKED.match(name.removesuffix(_WEIGHT)) if name.endswith(_WEIGHT) else None
        if stacked is None:
            found[name] = source
            continue
        gate, up = (f"{stacked['mlp']}.switch_mlp.{part}{_WEIGHT}" for part in ("gate_proj", "up_proj"))
        if stacked["part"] == "down_proj":
            found[f"{stacked['mlp']}.experts.down_proj"] = source
        elif gate in weights and up in weights:
            found[f"{stacked['mlp']}.experts.gate_up_proj"] = Joined(weights[gate], weights[up])
        else:
            found[name] = source
    return found
