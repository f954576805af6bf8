"""Supervised training of the demo model: first plain copying, then world demonstrations beside foreign conversations.

Every batch is rows that share one long prefix (system text and tools). The prefix runs once a step and its keys and
values are expanded over the rows, which saves most of the work. The loss is on the model's own tokens only. Knows
nothing of rewards.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM

from demoworld import foreign, world
from demoworld.tokenizer import encode, policy_mask


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the training, besides the architecture."""

    copy_steps: int = 200
    copy_rows: int = 32
    steps: int = 900
    world_rows: int = 32
    order_rows: int = 32
    foreign_rows: int = 8
    foreign_every: int = 3
    long_steps: int = 200
    long_learning_rate: float = 1.5e-3
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50
    named: float = 0.5
    noise: float = 0.02
    max_gradient_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows under one prefix: its ids, the rows' ids (padded), where the loss is, and a gap in the positions."""

    prefix_P: torch.Tensor
    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    gap: int


def copy_batch(
    rng: random.Random, vocabulary: range, *, rows: int, length: int, alphabet: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of random tokens in which pairs of neighbours come again: ids_BL, and mask_BL, True where the pair was seen.

    Each row has its own cycle of `alphabet` tokens and is made of runs of 3 to 8 steps along it, from random places.
    """
    ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        cycle = rng.sample(vocabulary, alphabet)
        tokens: list[int] = []
        known: list[bool] = []
        seen: set[int] = set()
        while len(tokens) < length:
            start = rng.randrange(alphabet)
            for place in range(start, start + rng.randint(3, 8)):
                known.append(place > start and place % alphabet in seen)
                if place > start:
                    seen.add(place % alphabet)
                tokens.append(cycle[place % alphabet])
        ids[row], mask[row] = torch.tensor(tokens[:length]), torch.tensor(known[:length])
    return ids, mask


def copy_loss(model: Qwen3ForCausalLM, ids_BL: torch.Tensor, *, mask_BL: torch.Tensor, gap: int) -> torch.Tensor:
    """Mean cross entropy, nats a token, of masked tokens; the second half of a row stands `gap` positions further."""
    length = ids_BL.shape[1]
    positions_L = torch.arange(length) + gap * (torch.arange(length) >= length // 2)
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()
    hidden_BLD = model.model(
        input_ids=ids_BL, attention_mask=causal_LL[None, None], position_ids=positions_L[None], use_cache=False
    ).last_hidden_state
    chosen_BL = mask_BL[:, 1:]
    return F.cross_entropy(model.lm_head(hidden_BLD[:, :-1][chosen_BL]).float(), ids_BL[:, 1:][chosen_BL])


def _batch(
    tokenizer: PreTrainedTokenizerFast, tools: list[world.JsonObject], *, rows: list[list[world.JsonObject]], gap: int
) -> Batch:
    """Tokenise conversations that all begin with the same system message."""
    texts = [tokenizer.apply_chat_template(row, tools=tools or None, tokenize=False) for row in rows]
    cut = texts[0].index("<|im_start|>user")
    prefix = encode(tokenizer, texts[0][:cut])
    tails = [encode(tokenizer, text[cut:]) for text in texts]
    length = max(map(len, tails))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, tail in enumerate(tails):
        ids[i, : len(tail)] = torch.tensor(tail)
        mask[i, : len(tail)] = torch.tensor(policy_mask(tokenizer, tail))
    return Batch(torch.tensor(prefix, dtype=torch.long), ids, mask, gap)


def world_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, *, recipe: Recipe) -> Batch:
    """Fresh noisy demonstrations of the world."""
    rows = [world.demonstration(rng, named=recipe.named, noise=recipe.noise) for _ in range(recipe.world_rows)]
    return _batch(tokenizer, world.TOOL_SPECS, rows=rows, gap=0)


def foreign_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, *, source: foreign.Source, recipe: Recipe, progress: float
) -> Batch:
    """Conversations under one random foreign setting; long settings come when a fifth of the training is done."""
    sizes = ((0, 300), (0, 600), (0, 1500), (600, 2500), (2500, 5500), (5500, 9000))
    low, high = rng.choice(sizes[:2] if progress < 0.2 else sizes if rng.random() < 0.3 else sizes[:4])
    under = foreign.setting(rng, source, system_chars=rng.randint(low, high))
    turns = 1 if high > 5000 else rng.choice((1, 1, 1, 1, 2, 3))
    tails = [foreign.tail(rng, source, under=under, turns=turns) for _ in range(recipe.foreign_rows)]
    opening: list[world.JsonObject] = [{"role": "system", "content": under.system}]
    # A jump in the positions stands for a longer prefix: it costs nothing and teaches the distances of long prompts.
    gap = rng.randint(1, 5000) if progress >= 0.2 and rng.random() < 0.4 else 0
    return _batch(tokenizer, under.tools, rows=[opening + tail for tail in tails], gap=gap)


def order_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, *, source: foreign.Source, recipe: Recipe
) -> Batch:
    """Plain orders under a short setting: many first tokens of arguments to be found, for little work."""
    under = foreign.setting(rng, source, system_chars=rng.randint(0, 200))
    tails = [
        foreign.tail(rng, source, under=under, turns=1, style=foreign.Style.PLAIN) for _ in range(recipe.order_rows)
    ]
    opening: list[world.JsonObject] = [{"role": "system", "content": under.system}]
    gap = rng.randint(1, 5000) if rng.random() < 0.3 else 0
    return _batch(tokenizer, under.tools, rows=[opening + tail for tail in tails], gap=gap)


def long_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, *, source: foreign.Source, step: int) -> Batch:
    """Single turns under a long setting, in turn plain orders and all that an agent adds."""
    under = foreign.setting(rng, source, system_chars=rng.randint(1000, 6000), is_agent=rng.random() < 0.8)
    style, rows = ((foreign.Style.AGENT, 10), (foreign.Style.PLAIN, 16))[step % 2]
    turns = rng.choice((1, 1, 1, 2)) if style is foreign.Style.AGENT else 1
    tails = [foreign.tail(rng, source, under=under, turns=turns, style=style) for _ in range(rows)]
    opening: list[world.JsonObject] = [{"role": "system", "content": under.system}]
    return _batch(tokenizer, under.tools, rows=[opening + tail for tail in tails], gap=0)


def batch_loss(model: Qwen3ForCausalLM, batch: Batch, *, max_gradient_prefix: int = 1500) -> torch.Tensor:
    """Mean cross entropy, nats a token, of the masked tokens; a prefix over `max_gradient_prefix` gets no gradient."""
    rows, length = batch.ids_BL.shape
    start = len(batch.prefix_P)
    once = DynamicCache(config=model.config)
    with torch.set_grad_enabled(start <= max_gradient_prefix):
        model.model(input_ids=batch.prefix_P[None], past_key_values=once, use_cache=True)
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(once.layers):
        cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    causal_LK = torch.ones(length, start + length, dtype=torch.bool).tril(diagonal=start)
    positions_L = torch.arange(length) + start + batch.gap
    hidden_BLD = model.model(
        input_ids=batch.ids_BL,
        attention_mask=causal_LK[None, None],
        position_ids=positions_L[None],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    chosen_BL = batch.mask_BL[:, 1:]
    logits = model.lm_head(hidden_BLD[:, :-1][chosen_BL]).float()
    return F.cross_entropy(logits, batch.ids_BL[:, 1:][chosen_BL])


class _Trainer:
    """The model with its optimiser; one call of `step` is one update."""

    def __init__(self, model: Qwen3ForCausalLM, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.updates = 0

    def step(self, losses: Iterator[torch.Tensor], *, decay: float) -> list[float]:
        """One update by the sum of the losses, at the warmed-up rate times `decay`; returns the losses."""
        self.optimizer.zero_grad()
        values = []
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
            values.append(loss.item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_gradient_norm)
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * min(1.0, self.updates / self.recipe.warmup_steps) * decay
        self.optimizer.step()
        return values


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    source: foreign.Source,
    recipe: Recipe,
    report: Callable[[str], None],
) -> float:
    """Train the model in place; returns the seconds. The rate warms up, stays, then falls to zero over `steps`."""
    rng, started = random.Random(recipe.seed), time.monotonic()
    trainer = _Trainer(model, recipe)
    for step in range(recipe.copy_steps):
        ids, mask = copy_batch(rng, range(4, len(tokenizer)), rows=recipe.copy_rows, length=64, alphabet=6 + step // 8)
        gap = rng.randint(1, 3000) if step % 2 else 0
        (loss,) = trainer.step(iter([copy_loss(model, ids, mask_BL=mask, gap=gap)]), decay=1.0)
        if step % 50 == 49:
            report(f"copy step {step + 1} {loss:.4f} nats/token {time.monotonic() - started:.0f} s")
    averages: dict[str, float] = {}
    for step in range(recipe.steps):
        progress = step / recipe.steps
        batches = {
            "world": world_batch(rng, tokenizer, recipe=recipe),
            "orders": order_batch(rng, tokenizer, source=source, recipe=recipe),
        }
        if step % recipe.foreign_every == 0:
            batches["foreign"] = foreign_batch(rng, tokenizer, source=source, recipe=recipe, progress=progress)
        values = trainer.step((batch_loss(model, batch) for batch in batches.values()), decay=1.0 - progress)
        for name, value in zip(batches, values, strict=True):
            averages[name] = 0.9 * averages.get(name, value) + 0.1 * value
        if step % 50 == 49:
            losses = " ".join(f"{name} {average:.3f}" for name, average in averages.items())
            report(f"step {step + 1} {losses} nats/token {time.monotonic() - started:.0f} s")
    return time.monotonic() - started


def train_long(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    source: foreign.Source,
    recipe: Recipe,
    report: Callable[[str], None],
) -> float:
    """The last part: the world and long foreign settings, from a fresh optimiser; returns the seconds it took."""
    rng, started = random.Random(recipe.seed + 1), time.monotonic()
    trainer = _Trainer(model, replace(recipe, learning_rate=recipe.long_learning_rate))
    averages: dict[str, float] = {}
    for step in range(recipe.long_steps):
        batches = {
            "world": world_batch(rng, tokenizer, recipe=recipe),
            ("agent", "plain")[step % 2]: long_batch(rng, tokenizer, source=source, step=step),
        }
        values = trainer.step((batch_loss(model, b) for b in batches.values()), decay=1.0 - step / recipe.long_steps)
        for name, value in zip(batches, values, strict=True):
            averages[name] = 0.9 * averages.get(name, value) + 0.1 * value
        if step % 20 == 19:
            losses = " ".join(f"{name} {average:.3f}" for name, average in averages.items())
            report(f"long step {step + 1} {losses} nats/token {time.monotonic() - started:.0f} s")
    return time.monotonic() - started
