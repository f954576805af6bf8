"""Attention that can be learned through in bounded memory: queries go block by block, and each block's scores are
computed again in the backward pass.

MLX has no fused backward pass of attention (0.32): without this a layer would hold several times heads x tokens^2
numbers, 20 GB of them for 8,192 tokens of a model with 32 heads. Knows nothing of models but how mlx-lm's call it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

BLOCK_BYTES = 64 << 20
"""of float32 scores of a block, all heads together"""
_NAME = "scaled_dot_product_attention"


def block_rows(heads: int, tokens: int) -> int:
    """How many queries go at once."""
    return max(1, min(tokens, BLOCK_BYTES // (4 * heads * tokens)))


@contextmanager
def in_blocks(model: Any) -> Iterator[None]:
    """For the time of a `with`, all models of this one's architecture in this process attend block by block; for one
    that calls attention by another name nothing changes."""
    module = sys.modules[type(model).__module__]
    whole = getattr(module, _NAME, None)
    if whole is None:
        yield
        return

    def blocked(
        queries: Any, keys: Any, values: Any, cache: Any = None, *, scale: float, mask: Any, **more: Any
    ) -> Any:
        tokens = queries.shape[2]
        rows = block_rows(queries.shape[1], tokens)
        if cache is not None or more or rows >= tokens or tokens != keys.shape[2] or not _is_plain(mask):
            return whole(queries, keys, values, cache=cache, scale=scale, mask=mask, **more)
        return _blocks(queries, keys, values, scale=scale, mask=mask, rows=rows)

    setattr(module, _NAME, blocked)
    try:
        yield
    finally:
        setattr(module, _NAME, whole)


def _is_plain(mask: Any) -> bool:
    """Causal, or a table of queries by keys."""
    return mask == "causal" if isinstance(mask, str) else isinstance(mask, mx.array) and mask.ndim >= 2


def _blocks(queries: Any, keys: Any, values: Any, *, scale: float, mask: Any, rows: int) -> Any:
    """Each block of queries with the keys up to its last one, which is all that it may see. A block waits for the one
    before: MLX would else be free to compute the scores of all of them first."""
    tokens = queries.shape[2]
    blocks = [(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]

    def attend(block: Any, keys: Any, values: Any, start: int) -> Any:
        end = start + block.shape[2]
        own = mask if isinstance(mask, str) else mask[..., start:end, :end]
        return mx.fast.scaled_dot_product_attention(block, keys, values, scale=scale, mask=own)

    @mx.custom_function
    def attention(queries: Any, keys: Any, values: Any) -> Any:
        found: list[Any] = []
        for start, end in blocks:
            (block,) = mx.depends([queries[:, :, start:end]], found[-1:]) if found else (queries[:, :, start:end],)
            found.append(attend(block, keys[:, :, :end], values[:, :, :end], start))
        return mx.concatenate(found, axis=2)

    @attention.vjp
    def backward(primals: Any, cotangent: Any, _: Any) -> Any:
        queries, keys, values = primals
        of_queries: list[Any] = []
        of_keys, of_values = mx.zeros_like(keys), mx.zeros_like(values)
        for start, end in blocks:
            (block,) = mx.depends([queries[:, :, start:end]], [of_keys, of_values, *of_queries[-1:]])
            given = [block, keys[:, :, :end], values[:, :, :end]]
            _, slopes = mx.vjp(partial(attend, start=start), given, [cotangent[:, :, start:end]])
            of_queries.append(slopes[0])
            of_keys = of_keys.at[:, :, :end].add(slopes[1])
            of_values = of_values.at[:, :, :end].add(slopes[2])
        return mx.concatenate(of_queries, axis=2), of_keys, of_values

    return attention(queries, keys, values)
