"""Teacher-forced logprobs in steps: a long prompt costs no logits, a long response only a few rows of them at once."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from clawloop_edge.engine.sampling import AtTemperature

_RESPONSE_STEP = 64
"""tokens whose logits live at once: 39 MB for a vocabulary of 152 k"""


def score(
    model: Any, prompt_ids: list[int], *, response_ids: list[int], temperature: float, prompt_step: int
) -> list[float]:
    """logprob of each response id given all before it, under softmax(logits / temperature) in float32."""
    tempered = AtTemperature(model, temperature or 1.0)
    cache = make_prompt_cache(model)
    inputs = prompt_ids + response_ids[:-1]
    first = len(prompt_ids) - 1
    for start in range(0, first, prompt_step):
        tempered(mx.array([inputs[start : min(start + prompt_step, first)]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    found: list[float] = []
    for start in range(0, len(response_ids), _RESPONSE_STEP):
        targets = response_ids[start : start + _RESPONSE_STEP]
        logits = tempered(mx.array([inputs[first + start : first + start + len(targets)]]), cache=cache)[0]
        chosen = mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)[:, 0]
        logprobs: Any = chosen - mx.logsumexp(logits, axis=-1)
        found += logprobs.tolist()
    return found
