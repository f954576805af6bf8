"""Teacher-forced logprobs in pieces: no piece holds up the batch, a long prompt costs no logits, and a long response
only a few rows of them at once."""

import time
from collections.abc import Generator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from clawloop_edge.engine.chores import Pace
from clawloop_edge.engine.sampling import AtTemperature

_RESPONSE_STEP = 64
"""tokens whose logits live at once: 39 MB for a vocabulary of 152 k"""


def score(
    model: Any, prompt_ids: list[int], *, response_ids: list[int], temperature: float, prompt_step: int
) -> Generator[None, None, list[float]]:
    """logprob of each response id given all before it, under softmax(logits / temperature) in float32.

    Yields before each piece; returns them all at the end.
    """
    tempered, cache = AtTemperature(model, temperature or 1.0), make_prompt_cache(model)
    inputs, first = prompt_ids + response_ids[:-1], len(prompt_ids) - 1
    found: list[float] = []
    pace, at = Pace(prompt_step), 0
    while len(found) < len(response_ids):
        yield
        began = time.monotonic()
        if at < first:
            size = min(pace.tokens, first - at)
            tempered(mx.array([inputs[at : at + size]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        else:
            targets = response_ids[at - first : at - first + min(pace.tokens, _RESPONSE_STEP)]
            size = len(targets)
            found += _logprobs(tempered(mx.array([inputs[at : at + size]]), cache=cache)[0], targets)
        at += size
        pace.took(time.monotonic() - began)
    return found


def _logprobs(logits: Any, targets: list[int]) -> list[float]:
    chosen = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)[:, 0]
    logprobs: Any = chosen - mx.logsumexp(logits, axis=-1)
    return list(logprobs.tolist())
