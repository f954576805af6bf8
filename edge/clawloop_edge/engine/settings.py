"""What the owner may set of the engine; described in docs/configuration.md. Imports no framework."""

from typing import Annotated

import msgspec
from msgspec import Meta


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes and bounds of the MLX engine."""

    completion_batch_size: Annotated[int, Meta(ge=1)] = 32
    """calls that sample at the same time"""
    prefill_batch_size: Annotated[int, Meta(ge=1)] = 8
    """prompts that are computed at the same time"""
    prefill_step_size: Annotated[int, Meta(ge=1)] = 512
    """prompt tokens a step; small steps bound the memory of a long prompt"""
    cache_entries: Annotated[int, Meta(ge=0)] = 64
    """token sequences whose attention cache is kept for the next turn"""
    cache_bytes: Annotated[int, Meta(ge=0)] = 4 << 30
    """memory of those caches, about 28,000 tokens of a 4B model; less where running calls need it"""
    memory_budget_bytes: Annotated[int, Meta(ge=0)] = 0
    """memory of weights, adapters and attention caches together; calls that do not fit wait. 0: the smallest of 60 % of
    the RAM, the RAM less 8 GiB, and what Metal recommends, but always the weights and 1 GiB"""
    wired_limit_bytes: Annotated[int, Meta(ge=0)] = 0
    """memory that macOS may not page out (mx.set_wired_limit); 0: the system decides. Wiring all that is recommended is
    the attributed trigger of kernel panics (mlx issue 3186)"""
    max_queue: Annotated[int, Meta(ge=1)] = 1024
    """calls in flight, running and waiting; more are refused"""
    queue_timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    """a call that waited this long for a place is refused, unless others got one in that time: a long queue that moves
    is served to its end"""
    lora_rank_max: Annotated[int, Meta(ge=1)] = 64
    """largest rank of an adapter"""
    keep_versions: Annotated[int, Meta(ge=1)] = 3
    """adapter versions that stay loaded; those with calls in flight stay in any case"""
    seed: int | None = None
    """seed of the sampler for repeatable drills; None draws one from the system"""
