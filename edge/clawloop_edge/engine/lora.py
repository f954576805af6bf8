"""A base model with an adapter on it: a second tree of modules over the same arrays.

The base tree is never changed, so version 0 is the base to the last bit, and every version costs only its own adapter.
Works on plain and on quantised linear layers. Nothing is fused: fusing would copy the base and, on 4 bits, round again.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from clawloop_edge.adapters.convert import Factors
from clawloop_shared.errors import AdapterInvalid


class LoraLinear(nn.Module):  # type: ignore[misc]
    """`linear(x) + x·A·B`, with the scale already in B. A is (inputs, rank), B (rank, outputs)."""

    def __init__(self, linear: Any, factors: Factors) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = factors

    def __call__(self, x: Any) -> Any:
        return self.linear(x) + ((x @ self.lora_a) @ self.lora_b).astype(x.dtype)


def with_adapter(base: Any, factors: dict[str, Factors]) -> Any:
    """A model with `factors` (by full module path) on the linear layers of `base`, evaluated. `base` stays as it is.

    Raises:
        AdapterInvalid: `base` has no such linear layer, or one of another size.
    """
    linears = linears_for(base, factors)
    wrapped = [(name, LoraLinear(linears[name], pair)) for name, pair in factors.items()]
    model = second_tree(base)
    model.update_modules(tree_unflatten(wrapped))
    model.eval()
    mx.eval([array for pair in factors.values() for array in pair])
    return model


def linears_for(base: Any, factors: dict[str, Factors]) -> dict[str, Any]:
    """The linear layers of `base` by full path, among them each that `factors` are for.

    Raises:
        AdapterInvalid: `base` has no such linear layer, or one of another size.
    """
    linears = {
        name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    for name, pair in factors.items():
        if name not in linears:
            raise AdapterInvalid(f"the model has no linear layer {name}")
        _check_size(name, linears[name], pair)
    return linears


class _Float32Embedding(nn.Module):  # type: ignore[misc]
    """`embedding`, with vectors in float32; the head, if it is the same table, computes in that too."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding = embedding

    def __call__(self, ids: Any) -> Any:
        table = self.embedding
        if not isinstance(table, nn.QuantizedEmbedding):
            return table(ids).astype(mx.float32)
        scales, biases = (part[ids].astype(mx.float32) for part in (table["scales"], table["biases"]))
        return mx.dequantize(table["weight"][ids], scales, biases, group_size=table.group_size, bits=table.bits)

    def as_linear(self, x: Any) -> Any:
        return self.embedding.as_linear(x)


def in_float32(model: Any) -> Any:
    """The same weights, computed with in float32: MLX takes the wider type of input and weight, from the embedding on.

    In half precision the logprobs of a small model were off by up to half a nat on MLX's CPU backend, so that a wrong
    adapter could not be told from a right one. A weight that is not quantised is copied for the time of its product.
    """
    tables = [
        (name, _Float32Embedding(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.QuantizedEmbedding) and module.mode == "affine")
    ]
    exact = second_tree(model)
    exact.update_modules(tree_unflatten(tables))
    exact.eval()
    return exact


def _check_size(name: str, linear: Any, factors: Factors) -> None:
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    a, b = factors
    if a.shape[0] != inputs or b.shape[1] != outputs or a.shape[1] != b.shape[0]:
        raise AdapterInvalid(
            f"adapter of {name}: A {a.shape} and B {b.shape} do not fit {inputs} inputs, {outputs} outputs"
        )


def second_tree(module: Any) -> Any:
    """The same arrays under new modules, lists and dicts."""
    if isinstance(module, nn.Module):
        twin = module.__class__.__new__(module.__class__)
        twin.__dict__.update(module.__dict__)
        dict.update(twin, {name: second_tree(child) for name, child in module.items()})
        return twin
    if isinstance(module, dict):
        return {name: second_tree(child) for name, child in module.items()}
    if isinstance(module, list | tuple):
        return type(module)(second_tree(child) for child in module)
    return module
