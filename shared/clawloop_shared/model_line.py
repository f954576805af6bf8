"""The identity of what is served and trained: base weights, quantisation, tokenizer and chat template, by hash.

Everything trained belongs to one line; an adapter of another line is refused.
"""

from pathlib import Path
from typing import Any

import msgspec

from clawloop_shared.errors import ConfigError
from clawloop_shared.files import sha256, sha256_file
from clawloop_shared.lora import ModelShape


class ModelLine(msgspec.Struct, frozen=True, kw_only=True):
    """The hashes (SHA-256, hex) that name a line. `quantization` is the config's own words, or empty."""

    base_sha256: str
    tokenizer_sha256: str
    template_sha256: str
    quantization: str = ""

    @property
    def line_id(self) -> str:
        """The short name of the line: the first 16 hex digits of the hash of all its parts."""
        return sha256(msgspec.json.encode(self, order="sorted"))[:16]


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        ConfigError: it is missing or not JSON.
    """
    try:
        found: dict[str, Any] = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder} is no model folder: {error}; give a folder with config.json") from error
    return found


def read_shape(folder: Path) -> ModelShape:
    """The sizes of a model folder's linear layers.

    Raises:
        ConfigError: config.json lacks one of them.
    """
    try:
        return shape_of(read_config(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {error}") from error


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The sizes that a config.json names. transformers 5 calls `num_local_experts` what others call `num_experts`.

    Raises:
        ConfigError: one is missing, or no size that a model can have.
    """
    experts = config.get("num_experts") or config.get("num_local_experts")
    try:
        shape = msgspec.convert(config | {"num_experts": experts}, ModelShape)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error
    heads, shared = shape.num_attention_heads, shape.num_key_value_heads
    if heads % shared or (not shape.head_dim and shape.hidden_size % heads):
        raise ConfigError(
            f"{heads} attention heads share no {shared} key-value heads evenly, or a width of {shape.hidden_size}"
        )
    return shape


def read_line(folder: Path) -> ModelLine:
    """Hash a model folder. Reads every weight file once, in blocks.

    Raises:
        ConfigError: a part is missing.
    """
    config = read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{folder} has no .safetensors file; give a folder with the model's weights")
    sums = "\n".join(f"{sha256_file(path)}  {path.name}" for path in weights)
    quantization = config.get("quantization") or config.get("quantization_config")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
    return ModelLine(
        base_sha256=sha256(sums.encode()),
        tokenizer_sha256=sha256_file(tokenizer),
        template_sha256=sha256(_template(folder)),
        quantization=msgspec.json.encode(quantization, order="sorted").decode() if quantization else "",
    )


def _template(folder: Path) -> bytes:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_bytes()
    try:
        settings = msgspec.json.decode((folder / "tokenizer_config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder} has no chat template: {error}") from error
    return msgspec.json.encode(settings.get("chat_template"))
