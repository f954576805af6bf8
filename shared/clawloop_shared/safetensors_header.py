"""Reading the header of a safetensors file before any framework sees a byte of it.

Refuses what the format allows but an adapter never needs: duplicate keys, gaps, overlaps, huge headers.
Format: https://github.com/huggingface/safetensors#format. Knows no tensor library; values are checked elsewhere.
"""

import json
from math import prod
from typing import Any

import msgspec

from clawloop_shared.errors import AdapterInvalid

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4000
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class TensorInfo(msgspec.Struct, frozen=True):
    """Where a tensor lies: dtype, shape and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(data: bytes, *, max_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of a whole safetensors file by name, in file order.

    Raises:
        AdapterInvalid: larger than `max_bytes`, or a header that is not exactly what the format says.
    """
    if len(data) > max_bytes:
        raise AdapterInvalid(f"safetensors file of {len(data)} bytes; the limit is {max_bytes}")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > MAX_HEADER_BYTES or 8 + size > len(data):
        raise AdapterInvalid(f"safetensors header of {size} bytes in a file of {len(data)}")
    entries = _parse(data[8 : 8 + size])
    if len(entries) > MAX_TENSORS:
        raise AdapterInvalid(f"{len(entries)} tensors; the limit is {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry, base=8 + size) for name, entry in entries.items()}
    _check_cover(tensors, start=8 + size, end=len(data))
    return tensors


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"safetensors header is not plain JSON: {error}") from error
    if not isinstance(header, dict):
        raise AdapterInvalid(f"safetensors header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _tensor(name: str, entry: Any, *, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(f"tensor {name}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterInvalid(f"tensor {name}: unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(_is_size(n) for n in numbers):
            raise AdapterInvalid(f"tensor {name}: {numbers!r} is no list of sizes")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * DTYPE_BYTES[dtype] or not prod(shape):
        raise AdapterInvalid(f"tensor {name}: shape {shape} of {dtype} does not fill bytes {offsets}")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=base + offsets[0], end=base + offsets[1])


def _check_cover(tensors: dict[str, TensorInfo], *, start: int, end: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != at:
            raise AdapterInvalid(f"tensor {name}: starts at byte {tensor.start}, expected {at} (gap or overlap)")
        at = tensor.end
    if at != end:
        raise AdapterInvalid(f"safetensors file has {end - at} bytes after its last tensor")
