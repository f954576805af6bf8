"""LoRA in PEFT form: which settings are allowed, which tensors must be there, and with which shapes.

Knows no tensor library. Facts on the two layouts: docs/formats/adapter.md.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.safetensors_header import TensorInfo

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
MAX_RANK = 256
MAX_CONFIG_BYTES = 64 << 10
_FLOATS = {"F32", "F16", "BF16"}
_Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]
_AnyCount = Annotated[int, msgspec.Meta(ge=0, le=4096)]


class ModelShape(msgspec.Struct, frozen=True):
    """The sizes in a model's config.json that decide which linear layers it has, and their shapes.

    With experts (Qwen's MoE), `num_experts`, `decoder_sparse_step` and `mlp_only_layers` say which layers have them.
    """

    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count | None = None
    vocab_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)] = 0
    num_experts: _AnyCount | None = None
    decoder_sparse_step: _AnyCount | None = None
    mlp_only_layers: Annotated[tuple[_AnyCount, ...], msgspec.Meta(max_length=4096)] | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of that layer is a router and its experts, which are no linear layers."""
        if not self.num_experts or layer in (self.mlp_only_layers or ()):
            return False
        return (layer + 1) % (self.decoder_sparse_step or 1) == 0

    def linears(self) -> dict[str, tuple[int, int]]:
        """The full module path of each linear layer that can be adapted, with its (inputs, outputs)."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        attention = {
            "self_attn.q_proj": (self.hidden_size, queries),
            "self_attn.k_proj": (self.hidden_size, keys),
            "self_attn.v_proj": (self.hidden_size, keys),
            "self_attn.o_proj": (queries, self.hidden_size),
        }
        dense = {
            "mlp.gate_proj": (self.hidden_size, self.intermediate_size),
            "mlp.up_proj": (self.hidden_size, self.intermediate_size),
            "mlp.down_proj": (self.intermediate_size, self.hidden_size),
        }
        found: dict[str, tuple[int, int]] = {}
        for layer in range(self.num_hidden_layers):
            sizes = attention if self.has_experts(layer) else attention | dense
            found |= {f"model.layers.{layer}.{name}": size for name, size in sizes.items()}
        return found

    def targets(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of `wanted` that some layer has, in their order: a model of experts alone has no `gate_proj`."""
        there = {path.rsplit(".", 1)[1] for path in self.linears()}
        return tuple(name for name in wanted if name in there)


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The part of PEFT's adapter_config.json that says what the numbers mean."""

    r: int
    lora_alpha: float
    target_modules: list[str]
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """What B·A is multiplied with: alpha/r, or alpha/sqrt(r) with rsLoRA."""
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


_HARMLESS: dict[str, set[Any]] = {
    "peft_type": {"LORA"},
    "task_type": {"CAUSAL_LM", None},
    "bias": {"none"},
    "inference_mode": {True, False},
    "fan_in_fan_out": {False},
    "use_dora": {False},
    "init_lora_weights": {True, False},
}
_IGNORED = {"base_model_name_or_path", "lora_dropout", "revision", "peft_version"}


def parse_config(raw: bytes) -> LoraConfig:
    """An adapter_config.json, refused unless it is plain LoRA on named linear layers.

    Fields that are absent, null, false or empty change nothing and are let through; any other unknown field is refused.

    Raises:
        AdapterInvalid: not JSON, a rank out of bounds, an unknown target, or a setting that we do not apply.
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"{CONFIG_FILE} has {len(raw)} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        fields: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        config = msgspec.convert(fields, LoraConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterInvalid(f"{CONFIG_FILE}: {error}") from error
    for name, value in fields.items():
        if name in LoraConfig.__struct_fields__ or name in _IGNORED or not value:
            continue
        if value not in list(_HARMLESS.get(name, ())):  # a list, because a value may be one that has no hash
            raise AdapterInvalid(f"{CONFIG_FILE}: {name}={value!r:.100} is not supported; only plain LoRA is")
    if not 1 <= config.r <= MAX_RANK or not 0 < config.lora_alpha <= 4096:
        raise AdapterInvalid(f"{CONFIG_FILE}: rank {config.r} or alpha {config.lora_alpha} is out of bounds")
    unknown = sorted(set(config.target_modules) - set(LINEARS))
    if unknown or not config.target_modules:
        raise AdapterInvalid(f"{CONFIG_FILE}: target modules {unknown or 'none'}; known are {', '.join(LINEARS)}")
    return config


def expected_tensors(config: LoraConfig, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Every tensor that the adapter must hold, with its shape: A is (rank, inputs), B is (outputs, rank).

    Raises:
        AdapterInvalid: a target is a module that this model has not.
    """
    strange = sorted(set(config.target_modules) - set(shape.targets(config.target_modules)))
    if strange:
        raise AdapterInvalid(f"{CONFIG_FILE}: target modules {strange} are in no layer of this model")
    wanted: dict[str, tuple[int, int]] = {}
    for module, (inputs, outputs) in shape.linears().items():
        if module.rsplit(".", 1)[1] in config.target_modules:
            wanted[f"base_model.model.{module}.lora_A.weight"] = (config.r, inputs)
            wanted[f"base_model.model.{module}.lora_B.weight"] = (outputs, config.r)
    return wanted


def check_tensors(tensors: dict[str, TensorInfo], config: LoraConfig, *, shape: ModelShape) -> None:
    """Return if the file holds exactly the tensors that `config` and the base model ask for.

    Raises:
        AdapterInvalid: a target or a tensor is missing or too much, has another shape, or is not of a float type.
    """
    wanted = expected_tensors(config, shape)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise AdapterInvalid(
            f"adapter lacks {len(missing)} tensors and has {len(extra)} unknown: {(missing + extra)[:2]}"
        )
    for name, size in wanted.items():
        if tensors[name].shape != size or tensors[name].dtype not in _FLOATS:
            got = tensors[name]
            raise AdapterInvalid(f"tensor {name}: {got.dtype} of shape {got.shape}, expected a float of shape {size}")
