"""What the edge's tests share: a tiny model folder, adapters for it, and the engine on it."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "scripts" / "demoworld" / "model"
TEMPLATE = ROOT / "scripts" / "demoworld" / "template.jinja"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

Files = dict[str, bytes]


def _write_tokenizer(folder: Path) -> int:
    """A byte-level BPE with a Qwen-like template; returns its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEMPLATE.read_text(), (ROOT / "LICENSE").read_text()], trainer)
    bpe.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE.read_text().rstrip("\n")
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _write_model(folder: Path, vocab_size: int) -> None:
    """Random weights in Qwen3's layout, sharp enough that tokens differ."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    hidden, head = SHAPE["hidden_size"], SHAPE["head_dim"]
    weights = {
        "model.embed_tokens.weight": rng.normal(0, 0.05, (vocab_size, hidden)),
        "model.norm.weight": np.full(hidden, 4.0),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, (inputs, outputs) in _linears().items():
            weights[f"{at}{name}.weight"] = rng.normal(0, inputs**-0.5, (outputs, inputs))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{norm}.weight"] = np.ones(hidden)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            weights[f"{at}{norm}.weight"] = np.ones(head)
    save_file({name: array.astype(np.float32) for name, array in weights.items()}, folder / "model.safetensors")


def _linears() -> dict[str, tuple[int, int]]:
    hidden, middle, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = SHAPE["num_attention_heads"] * head, SHAPE["num_key_value_heads"] * head
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }


def make_random_model(folder: Path) -> Path:
    """A folder that transformers and mlx-lm load: 0.2 million parameters, float32."""
    vocab_size = (_write_tokenizer(folder) + 63) // 64 * 64
    config = {
        **SHAPE,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_model(folder, vocab_size)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-shaped model folder with random weights."""
    return make_random_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest) -> Path:
    """The demo's model folder where it is there, else the random one: with tokenizer, template and tool calls."""
    if (DEMO_MODEL / "model.safetensors").is_file():
        return DEMO_MODEL
    found: Path = request.getfixturevalue("random_model")
    return found


@pytest.fixture(scope="session")
def make_adapter(tiny_model: Path) -> Callable[..., Files]:
    """`make_adapter(seed=1, rank=4, alpha=8.0, rslora=False, size=0.3, targets=LINEARS)` -> a PEFT adapter's files."""
    from safetensors.numpy import save

    from clawloop_shared.lora import LINEARS, LoraConfig, expected_tensors
    from clawloop_shared.model_line import read_shape

    def make(
        *,
        seed: int = 1,
        rank: int = 4,
        alpha: float = 8.0,
        rslora: bool = False,
        size: float = 0.3,
        targets: tuple[str, ...] = LINEARS,
        folder: Path = tiny_model,
    ) -> Files:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), use_rslora=rslora)
        rng = np.random.default_rng(seed)
        tensors = {
            name: rng.normal(0, size / shape[1] ** 0.5, shape).astype(np.float32)
            for name, shape in expected_tensors(config, read_shape(folder)).items()
        }
        settings: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(targets),
            "use_rslora": rslora,
            "bias": "none",
            "inference_mode": True,
        }
        return {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": save(tensors)}

    return make


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[Any]:
    """A running MlxEngine on the tiny model; closed at the end."""
    from clawloop_edge.engine.mlx import MlxEngine

    running = await MlxEngine.open(tiny_model)
    yield running
    await running.close()
