"""Engines on random models, opened as a round opens them, and how many positions went through them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from trainer_bench.shapes import ModelShape

RANK = 16
OPEN_LOSS = LossSettings(
    kl_beta=0.0, opsm_delta=math.inf, veto=0.0, max_trajectory_share=1.0, max_staleness_versions=1 << 20
)
"""no mask and no share that asks what else is in a row: so that the loss of a session is the sum of its calls'. No
distance to the base either, as TRL has it (its beta is 0)"""
TRAINED_LOSS = msgspec.structs.replace(OPEN_LOSS, kl_beta=LossSettings().kl_beta)
"""the same with the distance to the base that a round has: one more forward, without the adapter"""
MAX_DRIFT = 0.05
"""nats a token between the policy that sampled and the current one, at most"""


def settings(**given: Any) -> TrainSettings:
    """An adapter of rank 16 on all linear layers; everything else as `given`, or as a round has it."""
    return TrainSettings(rank=RANK, alpha=2.0 * RANK, **given)


def save_random_model(
    shape: ModelShape, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Write a Qwen3 of this shape, drawn on `device`; the same weights each time there."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            Qwen3ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)


@contextmanager
def random_folder(shape: ModelShape, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Path]:
    """A folder with a random model, for the time of a `with`."""
    with tempfile.TemporaryDirectory(prefix="clawloop-bench-") as folder:
        save_random_model(shape, Path(folder), device=device, dtype=dtype)
        yield Path(folder)


def open_engine(folder: Path, given: TrainSettings) -> TrainEngine:
    """The engine, with an adapter that changes something: a fresh one has no gradient in A, so that half of it would go
    untested."""
    engine = TrainEngine.open(folder, given)
    engine.set_adapter(awake(engine.adapter()))
    return engine


def awake(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter with a B that is not zero."""
    generator = torch.Generator().manual_seed(1)

    def drawn(like: Tensor) -> Tensor:
        return 0.1 * torch.randn(like.shape, generator=generator).to(like) / math.sqrt(like.shape[0])

    return {name: drawn(tensor) if "lora_B" in name else tensor for name, tensor in adapter.items()}


def as_sampled(engine: TrainEngine, samples: Sequence[Sample], *, drift: float = MAX_DRIFT) -> list[Sample]:
    """The samples with behaviour logprobs as of a policy near to the current one; with drift 0, the current one's."""
    found = engine.logprobs(samples)
    sizes = [len(each) for each in found]
    noise = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(2)).sub(0.5).mul(2 * drift)
    shifted = [
        (torch.tensor(each) + more).tolist() for each, more in zip(found, torch.split(noise, sizes), strict=True)
    ]
    return [replace(sample, logprobs=each) for sample, each in zip(samples, shifted, strict=True)]


def gradients(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's gradients by their names."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


@dataclass
class Positions:
    """How many token positions, padding and all, a model has computed."""

    count: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Positions]:
    """Count what goes into the embedding of `model` for the time of a `with`; what is computed again counts once."""
    positions = Positions()

    def note(_: Any, given: tuple[Tensor, ...]) -> None:
        positions.count += given[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield positions
    finally:
        hook.remove()
