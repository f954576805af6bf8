"""What a model folder's config.json says of whether, and how, it can be trained: quantisation, attention, head.

Knows no tensor library, so that a base is refused when it is imported and not when the trainer starts. MLX's words are
those of mlx-lm's `quantize_model`; nothing that it writes is guessed at.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from clawloop_shared.errors import ConfigError
from clawloop_shared.model_line import read_config, shape_of

BITS = (1, 2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FULL_ATTENTION = {"full_attention"}
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""settings of Gemma, Cohere and Granite; the scorer computes the head by itself and would be silently wrong"""
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE = ("rope_parameters", "rope_scaling")
_NOT_SIZES = ("auto_map", "_implementation")
"""in names of settings that choose code to compute with: transformers would fetch compiled code for such a word"""
_QUANTIZATION = ("quantization", "quantization_config")
_WORDS = {"group_size", "bits", "mode"}
_CONVERT = "give the folder that mlx_lm.convert makes, quantised in mode affine or not at all"


class Affine(msgspec.Struct, frozen=True):
    """w = scale q + bias, with a scale and a bias for each group of neighbours in a row."""

    group_size: int
    bits: int


class Quantization(msgspec.Struct, frozen=True):
    """How the layers are quantised: all alike, but for those that are named (None: not at all)."""

    usual: Affine
    named: dict[str, Affine | None]

    def of(self, module: str) -> Affine | None:
        """How the module of that full path is quantised, if it is."""
        return self.named.get(module, self.usual)


def read_trainable(folder: Path) -> tuple[dict[str, Any], Quantization | None]:
    """A folder's config.json without its words on quantisation or on code, and what those of quantisation say.

    Raises:
        ConfigError: no model folder, sizes that no model has, a quantisation that is not affine, or attention,
            positions or a head that cannot be trained.
    """
    config = read_config(folder)
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ConfigError(f"{folder}/config.json: layer_types is {layers!r:.100}, not a list of names")
    limited = sorted(set(layers) - FULL_ATTENTION)
    if limited or config.get("use_sliding_window"):
        raise ConfigError(
            f"{folder} has layers of type {limited or 'sliding window'}; only full attention is supported"
        )
    scaled = sorted(name for name in LOGIT_CHANGES if config.get(name) not in (None, 1, 1.0))
    if scaled:
        raise ConfigError(f"{folder} changes its logits after the head ({', '.join(scaled)}), which is not supported")
    if config.get("quantize_activations"):
        raise ConfigError(f"{folder} quantises activations, which is not supported; {_CONVERT}")
    try:
        quantization = _quantization(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {error}; {_CONVERT}") from error
    try:
        _check_positions(config)
        shape_of(config)
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {error}; export the model again") from error
    return {name: value for name, value in config.items() if _is_harmless(name)}, quantization


def _is_harmless(name: str) -> bool:
    return name not in _QUANTIZATION and not any(word in name for word in _NOT_SIZES)


def _check_positions(config: Mapping[str, Any]) -> None:
    """Both words for rotary embeddings: a table, or one for each type of layer."""
    for name in _ROPE:
        found = config.get(name)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ConfigError(f"{name} is {found!r:.100}, not a table")
        for table in (found, *(value for value in found.values() if isinstance(value, dict))):
            kind = table.get("rope_type", table.get("type", "default"))
            if kind not in ROPES:
                raise ConfigError(f"{name} has type {kind!r:.50}; known are {', '.join(ROPES)}")


def _quantization(config: Mapping[str, Any]) -> Quantization | None:
    found = next((config[name] for name in _QUANTIZATION if config.get(name)), None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ConfigError(f"quantization is {found!r:.100}, not a table")
    if "quant_method" in found:
        raise ConfigError(f"quantised by {found['quant_method']!r:.50}, which is not supported")
    usual = _affine(found, "quantization")
    return Quantization(usual, {n: _named(v, n, usual) for n, v in found.items() if n not in _WORDS})


def _named(value: object, module: str, usual: Affine) -> Affine | None:
    """Of a layer with a word of its own: a table; true is as usual, false not at all."""
    if isinstance(value, bool):
        return usual if value else None
    if not isinstance(value, dict):
        raise ConfigError(f"quantization.{module} is {value!r:.100}, not a table or a yes or no")
    if strange := sorted(set(value) - _WORDS):
        raise ConfigError(f"quantization.{module} has {strange}, which are not supported")
    return _affine({"group_size": 64, "bits": 4} | value, f"quantization.{module}")


def _affine(table: Mapping[str, Any], where: str) -> Affine:
    mode, size, bits = table.get("mode", "affine"), table.get("group_size"), table.get("bits")
    if mode != "affine":
        raise ConfigError(f"{where} has mode {mode!r:.50}; only affine is supported")
    if size not in GROUP_SIZES or bits not in BITS:
        raise ConfigError(
            f"{where} has {bits!r:.20} bits in groups of {size!r:.20}; known are {BITS} and {GROUP_SIZES}"
        )
    return Affine(group_size=int(size), bits=int(bits))
