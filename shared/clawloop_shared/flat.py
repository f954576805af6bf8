"""The numbers of a delta as one vector, in the order of its tensors' names, and back. Float32, as it is clipped, noised
and summed."""

import json
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from clawloop_shared.deltas import MAX_DELTA_BYTES
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.safetensors_header import read_header


def flatten(weights: bytes) -> NDArray[np.float32]:
    """All numbers of a safetensors file of float32 tensors, tensor after tensor by name.

    Raises:
        AdapterInvalid: it is no such file.
    """
    tensors = read_header(weights, max_bytes=MAX_DELTA_BYTES)
    wrong = next((name for name, tensor in tensors.items() if tensor.dtype != "F32"), None)
    if wrong is not None:
        raise AdapterInvalid(f"tensor {wrong} is {tensors[wrong].dtype}; only float32 can be summed")
    parts = [np.frombuffer(weights[tensor.start : tensor.end], "<f4") for _, tensor in sorted(tensors.items())]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def unflatten(values: NDArray[np.floating], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of float32 tensors of these names and shapes, filled from `values` by name.

    Raises:
        ValueError: there are more or fewer numbers than the shapes have.
    """
    if len(values) != sum(prod(shape) for shape in shapes.values()):
        raise ValueError(f"{len(values)} numbers do not fill {len(shapes)} tensors")
    header, at = {}, 0
    for name, shape in sorted(shapes.items()):
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + values.astype("<f4").tobytes()
