"""The `[learn]` table: when this device learns at home, and how much of it that may take."""

from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared.lora import MAX_RANK


class LearnSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When this device learns, and how much of it that may take. The server asks; these limits are the device's own."""

    enabled: bool = True
    """learn at home where the privacy level says that deltas may leave"""
    idle_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    """how long no agent must have called before learning begins; a call interrupts it"""
    on_power: bool = True
    """only while the device is on power; one without a battery always is"""
    max_memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """of the learning process; 0: half of what is free when it starts"""
    max_rank: Annotated[int, Meta(ge=1, le=MAX_RANK)] = 32
    max_updates: Annotated[int, Meta(ge=1, le=10_000)] = 50
    """optimizer steps of one task"""
    max_sample_tokens: Annotated[int, Meta(ge=2)] = 8192
    """longer steps are not learned from at home"""
    min_trajectories: Annotated[int, Meta(ge=1, le=1_000_000)] = 8
    """judged and not learned from before; a delta of fewer would tell too much of each"""
    check_every_s: Annotated[float, Meta(ge=0.05, le=86_400)] = 60.0
    """how often it is looked whether there is something to learn, and time for it"""
    secure_min_members: Annotated[int, Meta(ge=3, le=128)] = 5
    """of a secure sum that this device takes part in, at least"""
    secure_new_members: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """the part of a sum's members that this device may never have been in a sum with, once it was in one"""
    rounds: Annotated[int, Meta(ge=1, le=10_000)] = 50
    """noised deltas of one model line that the budget `[privacy] epsilon` is spread over: more of them, more noise"""
