"""The models of the check: a small Qwen3 taught by noisy demonstrations, and the 4-bit one that a device would serve.

`make_base` writes it as transformers does. `quantise` makes of it what an edge serves, by MLX: 4 bits, groups of 32,
affine. One thread and one seed give the same files.
"""

from __future__ import annotations

import random
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from learn_check import world

SIZES = {
    "vocab_size": len(world.WORDS),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "pad_token_id": world.PAD,
    "eos_token_id": world.END,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
BITS, GROUP_SIZE = 4, 32
STEPS, ROWS, LEARNING_RATE = 400, 64, 3e-3


def make_base(folder: Path, *, seed: int) -> None:
    """Teach a random model the form of an episode and write it to `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rng = random.Random(seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1.0 - step / STEPS)
        optimizer.zero_grad()
        torch.autograd.backward(_loss(model, [world.demonstration(rng) for _ in range(ROWS)]))
        optimizer.step()
    logging.disable_progress_bar()
    model.eval().save_pretrained(folder)


def _loss(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[bool]]]) -> torch.Tensor:
    """Mean cross entropy, nats a token, of what the policy says."""
    ids_BL = torch.tensor([ids for ids, _ in rows])
    said_BL = torch.tensor([said for _, said in rows])[:, 1:]
    hidden_BLD = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden_BLD[said_BL]), ids_BL[:, 1:][said_BL])


def quantise(source: Path, folder: Path) -> None:
    """Write the model in `source` to `folder` as MLX quantises it for a device."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source)
    with redirect_stdout(sys.stderr):  # it prints the bits a weight
        model, config = quantize_model(model, config, group_size=GROUP_SIZE, bits=BITS)
    save_model(folder, model)
    save_config(config, folder / "config.json")
