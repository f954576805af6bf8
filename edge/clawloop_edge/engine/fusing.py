"""An adapter put into the weights of its base for good, as a model folder that mlx-lm loads by itself.

For other programs alone: the edge serves the two apart (see `lora`). The layers that the adapter changes become plain
float32 ones, whatever they were: rounding their sum to the base's 4 or 16 bits again would lose most of a small update
(up to whole nats of a logit on 4 bits). The others stay as they are, to the bit.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model, save_config, save_model

from clawloop_edge.adapters.convert import Factors
from clawloop_edge.engine.lora import linears_for
from clawloop_shared.errors import AdapterInvalid, ConfigError

_QUANTIZATION = ("quantization", "quantization_config")
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")
"""what a model folder has beside its weights; no code"""
_OWN = ("config.json", "model.safetensors.index.json", "adapter_config.json", "manifest.json")


@dataclass(frozen=True)
class Fused:
    """A model in mlx-lm's form, its config.json, and how many layers are wider now than in the base."""

    model: Any
    config: dict[str, Any]
    widened: int


def fuse(base: Path, factors: dict[str, Factors]) -> Fused:
    """The model of the folder `base` with `factors` (by full module path, scale in B) in its weights; lazily computed.

    Raises:
        ConfigError: mlx-lm cannot load the base.
        AdapterInvalid: the base has no such layer, one of another size, or one whose weights cannot be widened.
    """
    try:
        model, config = load_model(base, lazy=True)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ConfigError(f"mlx-lm cannot load {base}: {error}") from error
    linears = linears_for(model, factors)
    merged = {name: _merged(name, linears[name], pair) for name, pair in factors.items()}
    model.update_modules(tree_unflatten(list(merged.items())))
    widened = sum(linears[name].weight.dtype != mx.float32 for name in merged)
    return Fused(model, _settings(config, model, merged), widened)


def save_fused(fused: Fused, folder: Path, *, base: Path) -> None:
    """Write a model folder, with what lies beside the weights of `base`. The model is used up: its arrays are let go
    as they are written, so that a part of it is in memory at a time."""
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            if path.name not in _OWN:
                shutil.copyfile(path, folder / path.name)
    save_model(folder, fused.model, donate_model=True)
    save_config(fused.config, folder / "config.json")


def _merged(name: str, linear: Any, factors: Factors) -> Any:
    """`linear` with A·B in its weights, float32."""
    a, b = factors
    weight = _weight(name, linear).astype(mx.float32)
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in linear)
    merged.weight = weight + (a @ b).T
    if "bias" in linear:
        merged.bias = linear.bias
    return merged


def _weight(name: str, linear: Any) -> Any:
    """The numbers that a layer computes with, without rounding them again."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    if "global_scale" in linear:
        raise AdapterInvalid(f"{name} is quantised with a scale of the whole tensor, which is not fused; use --mlx")
    sizes = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    if linear.mode != "affine":  # powers of two times a few bits: exact in any float
        return mx.dequantize(linear.weight, linear.scales, **sizes)
    scales, biases = linear.scales.astype(mx.float32), linear.biases.astype(mx.float32)
    return mx.dequantize(linear.weight, scales, biases, **sizes)


def _settings(config: dict[str, Any], model: Any, merged: dict[str, Any]) -> dict[str, Any]:
    """config.json for the fused model. mlx-lm quantises the layers that have scales, and those that are named there."""
    still = any(hasattr(module, "bits") for _, module in model.named_modules())
    kept = {name: value for name, value in config.items() if name not in _QUANTIZATION}
    if still and config.get("quantization"):
        named = {name: value for name, value in config["quantization"].items() if name not in merged}
        kept["quantization"] = named
    return kept
