"""Sampling replies from a torch model, many prompts at once, with a key-value cache. For evaluation, not for serving.

What all prompts share (system text, tools) is computed once and its cache expanded over the batch. Prompts are padded
between what they share and what they do not, so that all rows of a batch end at the same place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clawloop_server.trainer.device import arithmetic
from clawloop_server.trainer.head import head_logits
from clawloop_server.trainer.scorer import bare

PAD = 0


@dataclass(frozen=True)
class Reply:
    """Sampled ids, the end token included; `stopped` tells that there is one.

    `logprobs`: of each id under the distribution that it was drawn from, temperature applied; 0 if nothing was drawn.
    """

    ids: list[int]
    stopped: bool
    logprobs: list[float]


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled; temperature 0 takes the most likely token."""

    max_tokens: int
    eos_ids: frozenset[int]
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class _Batch:
    """B rows that are still sampling: which prompts they are, their mask so far, the next position, and the cache."""

    rows_B: Tensor
    mask_BL: Tensor
    position_B: Tensor
    cache: Any


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    agree: Callable[[Tensor], Tensor] = lambda token_B: token_B,
) -> list[Reply]:
    """One reply for each prompt; the same seed gives the same replies. `agree` gives the tokens that go on in all
    processes which share the model, so that none goes further than another."""
    if not prompts:
        return []
    with arithmetic(bare(model)):
        return _generate(model, [list(prompt) for prompt in prompts], sampling=sampling, agree=agree)


def _generate(
    model: Any, prompts: list[list[int]], *, sampling: Sampling, agree: Callable[[Tensor], Tensor]
) -> list[Reply]:
    device = bare(model).get_input_embeddings().weight.device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    stops = torch.tensor(sorted(sampling.eos_ids), device=device)
    batch, logits_BV = _prefill(model, prompts, device=device)
    sampled: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for _ in range(sampling.max_tokens):
        token_B, logprob_B = _draw(logits_BV, sampling.temperature, generator=generator)
        token_B = agree(token_B)
        drawn = zip(batch.rows_B.tolist(), token_B.tolist(), logprob_B.tolist(), strict=True)
        for row, token, logprob in drawn:
            sampled[row].append(token)
            logprobs[row].append(logprob)
        going_B = ~torch.isin(token_B, stops)
        if not bool(going_B.any()):
            break
        if not bool(going_B.all()):
            batch, token_B = _keep(batch, going_B), token_B[going_B]
        batch, logits_BV = _advance(model, batch, token_B)
    return [
        Reply(ids, stopped=ids[-1] in sampling.eos_ids, logprobs=found)
        for ids, found in zip(sampled, logprobs, strict=True)
    ]


def _prefill(model: Any, prompts: list[list[int]], *, device: torch.device) -> tuple[_Batch, Tensor]:
    from transformers import DynamicCache

    count = len(prompts)
    shared = _shared(prompts)
    cache = DynamicCache(config=bare(model).config)
    if shared:
        ids = torch.tensor(prompts[0][:shared], device=device)[None]
        bare(model).get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
    tails = [prompt[shared:] for prompt in prompts]
    longest = max(map(len, tails))
    pads_B = torch.tensor([longest - len(tail) for tail in tails], device=device)
    ids_BL = torch.tensor([[PAD] * (longest - len(tail)) + tail for tail in tails], device=device)
    at_L = torch.arange(longest, device=device)
    real_BL = at_L[None, :] >= pads_B[:, None]
    mask_BL = torch.cat([real_BL.new_ones(count, shared), real_BL], dim=1)
    position_BL = (shared + at_L[None, :] - pads_B[:, None]).clamp(min=0)
    batch = _Batch(torch.arange(count, device=device), mask_BL, position_BL[:, -1] + 1, cache)
    return batch, _forward(model, batch, ids_BL=ids_BL, position_BL=position_BL)


def _shared(prompts: list[list[int]]) -> int:
    """The length of what all prompts begin with; each keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def _advance(model: Any, batch: _Batch, token_B: Tensor) -> tuple[_Batch, Tensor]:
    """Feed one token a row; the batch that has it, and the logits of the next one."""
    position_B = batch.position_B
    grown = replace(
        batch, mask_BL=torch.nn.functional.pad(batch.mask_BL, (0, 1), value=True), position_B=position_B + 1
    )
    return grown, _forward(model, grown, ids_BL=token_B[:, None], position_BL=position_B[:, None])


def _forward(model: Any, batch: _Batch, *, ids_BL: Tensor, position_BL: Tensor) -> Tensor:
    """logits_BV after the last of `ids_BL`, whose keys and values go into the batch's cache."""
    output = bare(model).get_decoder()(
        input_ids=ids_BL,
        attention_mask=batch.mask_BL.long(),
        position_ids=position_BL,
        past_key_values=batch.cache,
        use_cache=True,
    )
    return head_logits(output.last_hidden_state[:, -1], bare(model).get_output_embeddings().weight)


def _draw(logits_BV: Tensor, temperature: float, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(token_B, logprob_B)."""
    if temperature == 0:
        return logits_BV.argmax(-1), logits_BV.new_zeros(len(logits_BV))
    chances_BV = (logits_BV / temperature).log_softmax(-1)
    token_B1 = torch.multinomial(chances_BV.exp(), 1, generator=generator)
    return token_B1.squeeze(1), chances_BV.gather(1, token_B1).squeeze(1)


def _keep(batch: _Batch, going_B: Tensor) -> _Batch:
    """The rows that go on; a long reply then costs one row, not the batch."""
    chosen = going_B.nonzero().squeeze(1)
    batch.cache.batch_select_indices(chosen)
    return replace(
        batch, rows_B=batch.rows_B[chosen], mask_BL=batch.mask_BL[chosen], position_B=batch.position_B[chosen]
    )
