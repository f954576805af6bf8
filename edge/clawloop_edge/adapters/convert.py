"""PEFT's bytes to MLX arrays. Imports MLX only when called, and must be called in the thread that owns the model:
an array that is not evaluated yet cannot cross threads (mlx >= 0.31.2).

PEFT keeps A as (rank, inputs) and B as (outputs, rank); here both are transposed and the scale is folded into B.
"""

from collections.abc import Generator
from io import BytesIO
from typing import Any

from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, LoraConfig, parse_config

Factors = tuple[Any, Any]
"""A (inputs, rank) and B (rank, outputs), float32, scale in B"""
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def factor_pieces(files: dict[str, bytes], *, rank_max: int) -> Generator[None, None, dict[str, Factors]]:
    """The factors of an adapter by full module path, evaluated and finite; yields before each module.

    Raises:
        AdapterInvalid: a file is missing, a tensor has no partner or another rank, or a value is not finite.
    """
    import mlx.core as mx

    if CONFIG_FILE not in files or WEIGHTS_FILE not in files:
        raise AdapterInvalid(f"adapter has files {sorted(files)}, needs {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = parse_config(files[CONFIG_FILE])
    if config.r > rank_max:
        raise AdapterInvalid(f"adapter has rank {config.r}, over the limit {rank_max}; raise [engine] lora_rank_max")
    try:
        tensors: Any = mx.load(BytesIO(files[WEIGHTS_FILE]), format="safetensors")
    except RuntimeError as error:
        raise AdapterInvalid(f"{WEIGHTS_FILE} is no safetensors file: {error}") from error
    factors = {}
    for module in _modules(tensors):
        yield
        factors[module] = a, b = _pair(tensors, module, config=config)
        if not (mx.isfinite(a).all() & mx.isfinite(b).all()).item():
            raise AdapterInvalid(f"{WEIGHTS_FILE} holds a value that is not finite (NaN or infinity) in {module}")
    return factors


def read_factors(files: dict[str, bytes], *, rank_max: int) -> dict[str, Factors]:
    """All of `factor_pieces` at once."""
    pieces = factor_pieces(files, rank_max=rank_max)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            found: dict[str, Factors] = end.value
            return found


def _modules(tensors: dict[str, Any]) -> list[str]:
    names = {name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B) for name in tensors}
    wanted = {f"{_PREFIX}{name}{end}" for name in names for end in (_A, _B)}
    if not tensors or wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())
        raise AdapterInvalid(f"{WEIGHTS_FILE} has tensors without a partner or of unknown kind: {odd[:2]}")
    return sorted(names)


def _pair(tensors: dict[str, Any], module: str, *, config: LoraConfig) -> Factors:
    import mlx.core as mx

    a, b = (tensors[f"{_PREFIX}{module}{end}"].astype(mx.float32) for end in (_A, _B))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config.r or b.shape[1] != config.r:
        raise AdapterInvalid(f"adapter of {module}: A {a.shape} and B {b.shape} do not have rank {config.r}")
    return mx.contiguous(a.T), mx.contiguous(b.T * config.scale)
