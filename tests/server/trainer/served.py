"""Tiny random models as transformers has them, and the folders that mlx-lm makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
"""one layer of three is dense"""
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3-moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS | {"tie_word_embeddings": False}),
    "experts-only": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        EXPERTS | {"mlp_only_layers": [], "tie_word_embeddings": True},
    ),
}


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHARED = {"mlp_only_layers": [], "shared_expert_intermediate_size": 64, "norm_topk_prob": False}
"""as Qwen2-MoE is; mlx-lm does not look at the first and the last"""
MORE_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": ROPE | {"original_max_position_embeddings": 64}}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, EXPERTS | SHARED),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


def random_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A model of that kind in float32; biases too are random."""
    model, config, own = (KINDS | MORE_KINDS)[kind]
    torch.manual_seed(seed)
    made = model(config(**(SIZES | own | changes))).eval()
    for name, parameter in made.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter.data)
    return made


def save_as_hub(model: Any, folder: Path) -> Path:
    """Save it as the folders on the hub are, which mlx-lm reads: transformers 5 writes some settings elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope != {"rope_type": "default"}:
        config["rope_scaling"] = rope
    if config["model_type"] != "mixtral" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(source: Path, target: Path, *, bits: int = 0, group_size: int = 64, dtype: Any = None, **more: Any) -> Path:
    """What `mlx_lm.convert` makes of a folder; 0 bits: not quantised."""
    model, config = load_model(source)
    if dtype is not None:
        model.set_dtype(dtype)
    if bits:
        model, config = quantize_model(model, config, group_size=group_size, bits=bits, **more)
    target.mkdir(parents=True, exist_ok=True)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target


def mlx_model(folder: Path) -> Any:
    """The model in MLX."""
    return load_model(folder)[0]


def mlx_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """logits_TV of a model in MLX."""
    return torch.from_numpy(np.array(model(mx.array([list(ids)])).astype(mx.float32)))[0]


@torch.no_grad()
def torch_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """logits_TV of a model in torch."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return logits


def to_torch(array: Any) -> Tensor:
    """An MLX array with its type."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
