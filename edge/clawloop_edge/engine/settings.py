"""What the owner may set of the engine; described in docs/configuration.md. Imports no framework."""

import msgspec


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes and bounds of the MLX engine."""

    completion_batch_size: int = 32
    """calls that sample at the same time"""
    prefill_batch_size: int = 8
    """prompts that are computed at the same time"""
    prefill_step_size: int = 512
    """prompt tokens a step; small steps bound the memory of a long prompt"""
    cache_entries: int = 64
    """token sequences whose attention cache is kept for the next turn"""
    cache_bytes: int = 512 << 20
    """memory of those caches"""
    max_queue: int = 1024
    """calls in flight, running and waiting; more are refused"""
    lora_rank_max: int = 64
    """largest rank of an adapter"""
    keep_versions: int = 3
    """adapter versions that stay loaded; those with calls in flight stay in any case"""
    seed: int | None = None
    """seed of the sampler for repeatable drills; None draws one from the system"""
