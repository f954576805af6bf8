"""The two models of the engine's bench. Their end token is one that is as good as never sampled, so that every reply
has the tokens that were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import numpy as np

DEMO_MODEL = Path(__file__).parent / "demoworld" / "model"
NEVER_SAMPLED = "<|endoftext|>"
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 832,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def make_models(folder: Path) -> dict[str, Path]:
    """Name -> folder: the demo's trained model (0.35 M parameters), and a random one (3.7 M)."""
    return {"demo model": _demo(folder / "demo"), "3.7M random": _random(folder / "random")}


def _demo(folder: Path) -> Path:
    copytree(DEMO_MODEL, folder)
    (folder / "generation_config.json").unlink()
    _without_end(folder, {})
    return folder


def _without_end(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes, "eos_token_id": 0}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": NEVER_SAMPLED}))


def _random(folder: Path) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        copy(DEMO_MODEL / name, folder / name)
    layers = {"layer_types": ["full_attention"] * SHAPE["num_hidden_layers"]}
    _without_end(folder, {**SHAPE, **layers})
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    save_file(_weights(np.random.default_rng(0), vocab), folder / "model.safetensors")
    return folder


def _weights(rng: np.random.Generator, vocab: int) -> dict[str, np.ndarray]:
    """Random, but sharp enough that some tokens are likelier than others; the end token is made unlikely."""
    hidden, middle, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = SHAPE["num_attention_heads"] * head, SHAPE["num_key_value_heads"] * head
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    found = {"model.embed_tokens.weight": rng.normal(0, 0.05, (vocab, hidden)), "model.norm.weight": np.ones(hidden)}
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in sizes.items():
            found[f"{at}{name}.weight"] = rng.normal(0, shape[1] ** -0.5, shape)
        for norm, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
            found[f"{at}{norm}.weight"] = np.ones(size)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            found[f"{at}{norm}.weight"] = np.ones(head)
    return {name: array.astype(np.float32) for name, array in found.items()}
