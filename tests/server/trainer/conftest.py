"""Small random models with a tokenizer and a chat template, and samples to train them on."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from clawloop_server.trainer.base import attach_adapter
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.rows import Sample

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.2,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums in one order, and no fight for the cores."""
    logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_qwen(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


def tiny_llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a byte tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_qwen().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "<|end|>", *alphabet])}, merges=[])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(tiny_folder: Path) -> Path:
    """What the homes of these tests import: a model that can be trained."""
    return tiny_folder


@pytest.fixture(params=[tiny_qwen, tiny_llama], ids=["qwen3", "llama"])
def peft_model(request: pytest.FixtureRequest) -> Any:
    """A random model in float64 with a LoRA whose B is not zero."""
    return awake(request.param())


def awake(model: Any, *, rank: int = 4) -> Any:
    """The model in float64 with a LoRA that changes something."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wrapped = attach_adapter(model, rank=rank, alpha=8.0, target_modules=names, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return wrapped


@pytest.fixture
def engine(tiny_folder: Path) -> TrainEngine:
    """An engine on the tiny model."""
    return TrainEngine.open(tiny_folder, TrainSettings(rank=4, warmup_updates=1))


Session = Callable[..., list[Sample]]


@pytest.fixture
def session() -> Session:
    """Samples of sessions whose calls extend each other, fork, or share only the system text."""

    def make(seed: int = 0, *, trajectories: int = 3, turns: int = 3, forks: bool = True) -> list[Sample]:
        rng = random.Random(seed)

        def words(count: int) -> list[int]:
            return [rng.randrange(2, VOCABULARY) for _ in range(count)]

        system, samples = words(20), []
        for trajectory in range(trajectories):
            history = system + words(4)
            for turn in range(turns):
                prompt, response = history + words(3), words(rng.randint(2, 5))
                samples.append(sample_of(prompt, response, rng=rng, trajectory=trajectory, name=f"{trajectory}.{turn}"))
                history = (history if forks and turn % 2 else prompt + response) + words(2)
        return samples

    return make


def sample_of(prompt: list[int], response: list[int], *, rng: random.Random, trajectory: int, name: str) -> Sample:
    size = len(response)
    return Sample(
        step_id=name,
        trajectory=trajectory,
        token_ids=prompt + response,
        trained=range(len(prompt), len(prompt) + size),
        logprobs=[-rng.uniform(4.5, 7.0) for _ in range(size)],
        advantages=[rng.uniform(-2, 2)] * size,
        weight=rng.choice((0.3, 1.0)),
        temperature=rng.choice((0.8, 1.0)),
        version_gap=rng.randrange(3),
    )
