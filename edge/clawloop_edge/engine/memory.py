"""How much memory the engine may take, and what calls will need of it. Arithmetic on sizes; imports no framework.

Counted are the weights, the adapters, what a step computes, the attention caches (KV) of running calls at their
longest, and the kept prefixes. The process itself is not: the automatic budget leaves room for it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from clawloop_shared.errors import ConfigError

GIB = 1 << 30
KV_STEP = 256
"""tokens by which mlx-lm lets an attention cache grow"""


def ram_bytes() -> int:
    """This machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def automatic_budget(ram: int, *, least: int, working_set: int = 0) -> int:
    """Bytes the engine may take of `ram`: 60 %, or all but 8 GiB if that is less, so that the person's own programs
    stay in memory; never over
    `working_set`, what Metal recommends (0: it says nothing). A model that fits only beyond that
    still gets `least`: its owner chose it."""
    bounds = [ram * 6 // 10, ram - 8 * GIB]
    if working_set:
        bounds.append(working_set)
    return max(min(bounds), least)


@dataclass(frozen=True)
class ModelSizes:
    """What memory depends on, from a model's config.json. `dtype_bytes` is the size of a number while it computes."""

    layers: int
    kv_heads: int
    heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    dtype_bytes: int

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers: exact for plain attention, and an upper bound for models whose
        layers share, compress or slide (2 x layers x kv heads x head dim x bytes)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def step_bytes(self, *, prompt_tokens: int, rows: int) -> int:
        """What one step computes at most at a time: a layer for `prompt_tokens` tokens, and four float32 vectors of the
        vocabulary for each sampling row (logits and logprobs, of this step and of the one ahead)."""
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = 4 * self.hidden + 2 * self.intermediate + attention
        return prompt_tokens * layer * self.dtype_bytes + 4 * rows * self.vocab * 4


def model_sizes(config: dict[str, Any], *, dtype_bytes: int) -> ModelSizes:
    """The sizes in a config.json, or in its `text_config`.

    Raises:
        ConfigError: it names none; the message says which.
    """
    own = {**config, **(config.get("text_config") or {})}
    hidden, heads = _size(own, "hidden_size", "n_embd"), _size(own, "num_attention_heads", "n_head")
    return ModelSizes(
        layers=_size(own, "num_hidden_layers", "n_layer"),
        kv_heads=int(own.get("num_key_value_heads") or heads),
        heads=heads,
        head_dim=int(own.get("head_dim") or hidden // heads),
        hidden=hidden,
        intermediate=int(own.get("intermediate_size") or 4 * hidden),
        vocab=_size(own, "vocab_size"),
        dtype_bytes=dtype_bytes,
    )


def _size(config: dict[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
    if found is None:
        raise ConfigError(f"config.json names no {names[0]}, so the memory of a call is unknown; add it")
    return int(found)


def batch_tokens(lengths: Iterable[int]) -> int:
    """Tokens that a batch of these rows holds at its largest: a rectangle as long as its longest row."""
    rows = list(lengths)
    return len(rows) * _rounded(max(rows)) if rows else 0


def _rounded(tokens: int) -> int:
    return -(-tokens // KV_STEP) * KV_STEP


@dataclass(frozen=True)
class MemoryPlan:
    """The budget and what of it is spoken for before any call: `fixed` is weights and room for a step."""

    budget: int
    weights: int
    step: int
    token: int

    def free(self, adapters: int) -> int:
        """Bytes for attention caches, kept prefixes among them, beside adapters of that size."""
        return self.budget - self.weights - self.step - adapters

    def most_tokens(self, adapters: int) -> int:
        """The longest that a call (prompt and response) can be if it runs alone."""
        return max(self.free(adapters) // self.token // KV_STEP * KV_STEP, 0)


def make_plan(
    sizes: ModelSizes, *, weights: int, asked: int, prompt_tokens: int, rows: int, working_set: int = 0
) -> MemoryPlan:
    """The plan for a model whose weights take `weights` bytes. `asked` is the owner's budget, 0 for an automatic one.

    Raises:
        ConfigError: the owner's budget does not hold the model and one short call.
    """
    step = sizes.step_bytes(prompt_tokens=prompt_tokens, rows=rows)
    least = weights + step + GIB
    budget = asked or automatic_budget(ram_bytes(), least=least, working_set=working_set)
    plan = MemoryPlan(budget, weights, step, max(sizes.kv_token_bytes, 1))
    if plan.most_tokens(0) == 0:
        raise ConfigError(
            f"[engine] memory_budget_bytes = {asked} does not hold the model: {weights} bytes of weights, {step} for a "
            f"step, {KV_STEP * plan.token} for the shortest call; raise it, or set 0"
        )
    return plan
