"""A second LoRA beside the served one: the factors that a task's method learns, on top of a model that stays as it is.

Of a target layer the output is `served(x) + scale * (x A^T) B^T` with A (rank, inputs) and B (outputs, rank), both in
float32, as PEFT keeps them. Works on plain and quantised linear layers, with or without a served adapter. Imports MLX;
knows no loss, sample or optimizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from clawloop_edge.adapters.convert import read_factors
from clawloop_edge.engine.lora import second_tree, with_adapter
from clawloop_edge.errors import LearnFailed
from clawloop_shared.deltas import A as A_NAME
from clawloop_shared.deltas import B as B_NAME
from clawloop_shared.deltas import LearnTask, Method, delta_shapes
from clawloop_shared.frozen_factors import frozen_a
from clawloop_shared.lora import CONFIG_FILE, MAX_RANK, WEIGHTS_FILE, ModelShape, parse_config

Arrays = dict[str, Any]
"""arrays by the names that they have in a delta"""
_PEFT = "base_model.model."


class LearnedLora(nn.Module):  # type: ignore[misc]
    """A served linear layer with a LoRA that is learned beside it."""

    def __init__(self, served: Any, a: Any, b: Any, *, scale: float) -> None:
        super().__init__()
        self.served, self.lora_a, self.lora_b = served, a, b
        self._scale = scale

    def __call__(self, x: Any) -> Any:
        y = self.served(x)
        return y + (self._scale * ((x @ self.lora_a.T) @ self.lora_b.T)).astype(y.dtype)


@dataclass(frozen=True)
class Factors:
    """Both factors of each target layer, under the names of a delta: `learned` are trained and sent, `frozen` not."""

    learned: Arrays
    frozen: Arrays

    def pairs(self) -> dict[str, tuple[Any, Any]]:
        """(A, B) by the path of the layer."""
        both = self.learned | self.frozen
        paths = sorted(name.removesuffix(A_NAME) for name in both if name.endswith(A_NAME))
        return {path: (both[path + A_NAME], both[path + B_NAME]) for path in paths}

    @property
    def size_bytes(self) -> int:
        """Of what is learned."""
        return sum(array.nbytes for array in self.learned.values())


def first_factors(task: LearnTask, shape: ModelShape, *, rank: int, adapter: dict[str, bytes]) -> Factors:
    """What learning begins with: an update of 0. A is drawn from the task's seed, for `lora` too: updates that begin
    with the same A can be compared, and joined at a small rank, others hardly (docs/federation.md, "Aggregation").

    Raises:
        LearnFailed: the method needs factors of the served adapter that are not there, or of another rank.
        AdapterInvalid: a target is no linear layer of this model.
    """
    learned = delta_shapes(task.target_modules, shape, rank=rank, method=task.method)
    every = delta_shapes(task.target_modules, shape, rank=rank, method=Method.LORA)
    arrays: Arrays = {}
    served = _served(task, adapter, rank=rank)
    for name, (rows, columns) in every.items():
        path = name.removesuffix(A_NAME).removesuffix(B_NAME)
        if name in learned and not (task.method is Method.LORA and name.endswith(A_NAME)):
            arrays[name] = mx.zeros((rows, columns), dtype=mx.float32)
        elif served:
            arrays[name] = _of_served(served, name, size=(rows, columns))
        else:
            drawn = np.frombuffer(frozen_a(task.seed, path, rank=rows, inputs=columns), "<f4")
            arrays[name] = mx.array(drawn.astype(np.float32).reshape(rows, columns))
    mx.eval(list(arrays.values()))
    return Factors(
        {name: array for name, array in arrays.items() if name in learned},
        {name: array for name, array in arrays.items() if name not in learned},
    )


def _served(task: LearnTask, adapter: dict[str, bytes], *, rank: int) -> Arrays:
    """The served adapter's own factors, where the method freezes one of them."""
    if task.method not in (Method.ROLORA_A, Method.ROLORA_B):
        return {}
    if not adapter and task.method is Method.ROLORA_B:
        return {}
    if not adapter:
        raise LearnFailed(f"task {task.task_id}: {task.method} changes A of an adapter, and there is none yet")
    config = parse_config(adapter[CONFIG_FILE])
    if config.r != rank:
        raise LearnFailed(
            f"task {task.task_id}: {task.method} has the rank of the served adapter, {config.r}, and this device learns"
            f" with {rank}; raise [learn] max_rank to {config.r}"
        )
    found: Any = mx.load(BytesIO(adapter[WEIGHTS_FILE]), format="safetensors")
    return {name.removeprefix(_PEFT): array.astype(mx.float32) for name, array in found.items()}


def _of_served(served: Arrays, name: str, *, size: tuple[int, int]) -> Any:
    if name not in served or served[name].shape != size:
        raise LearnFailed(f"the served adapter has no {name} of shape {size}; the task's targets must be the adapter's")
    return served[name]


def serving(base: Any, adapter: dict[str, bytes]) -> Any:
    """The model that the task starts from: `base` with the adapter's files, or alone. Raises AdapterInvalid."""
    return with_adapter(base, read_factors(adapter, rank_max=MAX_RANK)) if adapter else base


class Learner:
    """The served model with `factors` beside it: what is called, and the arrays that are learned."""

    def __init__(self, served: Any, factors: Factors, *, scale: float) -> None:
        """`scale` multiplies B A. `served` stays as it is."""
        self.model = second_tree(served)
        self._loras: dict[str, LearnedLora] = {}
        layers = dict(served.named_modules())
        for path, (a, b) in factors.pairs().items():
            if path not in layers:
                raise LearnFailed(f"the model has no linear layer {path}")
            self._loras[path] = LearnedLora(layers[path], a, b, scale=scale)
        self.model.update_modules(tree_unflatten(list(self._loras.items())))
        self.model.eval()
        self._names = sorted(factors.learned)
        for layer in self.model.layers:
            _checkpointed(layer)

    def put(self, learned: Arrays) -> None:
        """Compute with these from now on; inside a function that is differentiated they may be its arguments."""
        for name in self._names:
            lora = self._loras[name.removesuffix(A_NAME).removesuffix(B_NAME)]
            if name.endswith(A_NAME):
                lora.lora_a = learned[name]
            else:
                lora.lora_b = learned[name]


def _checkpointed(layer: Any) -> None:
    """Have a layer of this tree keep only its input for the backward pass, and compute the rest again.

    mlx-lm's own `grad_checkpoint` does so for the class, that is for every model of the process.
    """
    kind, loras = type(layer), list(_loras_of(layer))

    def call(self: Any, x: Any, *more: Any, **named: Any) -> Any:
        def inner(x: Any, factors: list[tuple[Any, Any]]) -> Any:
            for lora, (a, b) in zip(loras, factors, strict=True):
                lora.lora_a, lora.lora_b = a, b
            return kind.__call__(self, x, *more, **named)

        return mx.checkpoint(inner)(x, [(lora.lora_a, lora.lora_b) for lora in loras])

    if loras:
        layer.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})


def _loras_of(layer: Any) -> Iterator[LearnedLora]:
    for _, module in layer.named_modules():
        if isinstance(module, LearnedLora):
            yield module


def to_file(arrays: Arrays, *, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of these arrays."""
    file = BytesIO()
    mx.save_safetensors(file, arrays, metadata or {"format": "pt"})
    return file.getvalue()


def from_file(data: bytes) -> Arrays:
    """The arrays of a safetensors file of ours, evaluated."""
    arrays: Any = mx.load(BytesIO(data), format="safetensors")
    mx.eval(list(arrays.values()))
    return dict(arrays)
