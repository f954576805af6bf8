"""From logits to a token. The temperature is in the logits, so that logprobs are those of the sampled distribution.

mlx-lm would report logprobs of the model's own dtype at temperature 1 (up to 0.04 nats off in bfloat16). One sampler
serves all rows of a batch in one call; a sampler a row would cost a Python loop a token. Cutting (top-p, top-k, min-p)
does not show in the logprobs, which is why `Sampling.truncates` makes a step untrainable.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from clawloop_edge.engine.grammar import Constraint
from clawloop_edge.errors import EngineError
from clawloop_shared.records import Sampling

Sampler = Callable[[Any], Any]
_NEVER = -math.inf


class AtTemperature:
    """A model whose logits are float32 and divided by a temperature; in all else the model itself."""

    def __init__(self, model: Any, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    def __call__(self, inputs: Any, cache: Any = None, **more: Any) -> Any:
        """Logits of shape [rows, tokens, vocabulary]."""
        logits = self._model(inputs, cache=cache, **more).astype(mx.float32)
        return logits if self._temperature == 1.0 else logits / self._temperature

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Constrained:
    """A logits processor of mlx-lm that keeps one row in its grammar: what may not follow gets probability 0 before
    logprobs are computed.

    It must know a token before it can mask the next one, so the batch does not run ahead while such a row is in it.
    """

    def __init__(self, constraint: Constraint) -> None:
        self._constraint, self._sampled = constraint, False

    def __call__(self, tokens: Any, logits: Any) -> Any:
        """`tokens` are the row's ids so far, prompt and response; logits [1, vocabulary]."""
        if self._sampled:
            self._constraint.accept(int(tokens[-1].item()))
        self._sampled = True
        allowed = self._constraint.allowed()
        return logits if allowed is None else mx.where(mx.array(allowed), logits, _NEVER)


def likeliest(logprobs: Any, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest ids and their logprobs, likeliest first, the smaller id first among equals. `logprobs` is a
    buffer of float32. Ids of probability 0 are left out."""
    values = np.asarray(logprobs)
    count = min(count, len(values))
    edge = np.partition(values, -count)[-count]
    above, equal = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
    ids = np.concatenate([above, equal[: count - len(above)]])
    order = ids[np.lexsort((ids, -values[ids]))]
    return tuple((int(i), float(values[i])) for i in order if values[i] > _NEVER)


def check_sampling(sampling: Sampling) -> Sampling:
    """Return `sampling` if it can be sampled with.

    Raises:
        EngineError: a temperature that is negative or not finite, or a cut out of its range.
    """
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0:
        raise EngineError(f"temperature {sampling.temperature} is not a number >= 0")
    if not 0 <= sampling.top_p <= 1 or not 0 <= sampling.min_p <= 1 or sampling.top_k < 0:
        raise EngineError(f"top_p {sampling.top_p}, min_p {sampling.min_p} or top_k {sampling.top_k} is out of range")
    return sampling


def logit_temperature(sampling: Sampling) -> float:
    """What the logits are divided by: the temperature, or 1 for greedy, which samples from no distribution."""
    return sampling.temperature or 1.0


def make_sampler(sampling: Sampling) -> Sampler:
    """A function from logprobs [rows, vocabulary] to token ids [rows]. Temperature is already in the logprobs."""
    if sampling.temperature == 0:
        return _greedy
    draw = _Seeded(sampling.seed) if sampling.seed is not None else _draw
    if not sampling.truncates:
        return draw
    return lambda logprobs: draw(_cut(logprobs, sampling))


def _greedy(logprobs: Any) -> Any:
    return mx.argmax(logprobs, axis=-1)


def _draw(logprobs: Any) -> Any:
    return mx.random.categorical(logprobs)


class _Seeded:
    """Draws from its own sequence of keys; for a batch of one row, else rows would share it."""

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed & (2**64 - 1))

    def __call__(self, logprobs: Any) -> Any:
        self._key, now = mx.random.split(self._key)
        return mx.random.categorical(logprobs, key=now)


def _cut(logprobs: Any, sampling: Sampling) -> Any:
    """Top-k, then top-p of what is left, then min-p; the likeliest token always stays."""
    if 0 < sampling.top_k < logprobs.shape[-1]:
        logprobs = _above(logprobs, mx.sort(logprobs, axis=-1)[..., -sampling.top_k, None])
    if sampling.top_p < 1:
        logprobs = _above(logprobs, _nucleus_edge(logprobs, max(sampling.top_p, 1e-9)))
    if sampling.min_p > 0:
        logprobs = _above(logprobs, logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    return logprobs


def _above(logprobs: Any, edge: Any) -> Any:
    return mx.where(logprobs < edge, _NEVER, logprobs)


def _nucleus_edge(logprobs: Any, top_p: float) -> Any:
    """The smallest logprob in the fewest tokens that hold `top_p` of the mass (https://arxiv.org/abs/1904.09751)."""
    rising = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(rising)
    above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    outside = (above >= top_p * probabilities.sum(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(rising, outside, axis=-1)
