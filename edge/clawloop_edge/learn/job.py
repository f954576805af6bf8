"""What is given to the learning process, and what comes of it. Frozen values; knows no MLX, pool or process."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from clawloop_shared.deltas import LearnTask
from clawloop_shared.records import Trajectory
from clawloop_shared.signals import DEFAULT_RULES, RewardRules

MASKED = "the task's loss lets nothing be learned from it"
"""of what was set aside: it is as good as it was, and is learned from another time"""


class Interrupted(Exception):
    """Who was asked whether to go on said no."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One task with all that it needs. `adapter` are the files of the adapter that the task starts from (empty: there
    is none yet), `trajectories` what is learned from, judged; their order does not matter. `rank` is the task's, or
    the lower one that this device allows; `min_trajectories` bounds how much of it one trajectory may be
    (`learn.shares`)."""

    task: LearnTask
    rank: int
    model: Path
    adapter: dict[str, bytes]
    trajectories: list[Trajectory]
    rules: RewardRules = DEFAULT_RULES
    max_updates: int = 50
    max_sample_tokens: int = 8192
    max_memory_bytes: int = 0
    min_trajectories: int = 1


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned: `weights`, a safetensors file (float32) of the factors that the task's method learns, under the
    names of `clawloop_shared.deltas`; nothing is clipped or noised yet. `trajectory_ids` are those that moved it, each
    by some of its tokens; `set_aside` are the others, by their reason. `updates` has each step's metrics."""

    weights: bytes
    trajectory_ids: list[str]
    set_aside: dict[str, str]
    reward: float
    updates: list[dict[str, float]]


class Learner(Protocol):
    """Does jobs, one at a time."""

    def learn(
        self,
        job: Job,
        *,
        go_on: Callable[[], bool],
        kept: bytes = b"",
        keep: Callable[[bytes], None] = lambda _: None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Learned | None:
        """What came of the job; None if `go_on` said no before it was done. Blocking: for a thread.

        `keep` gets the state after an update, now and then, and that after the last whole one before this ends without
        a result; it may be slow, and is called in another thread, one at a time. `kept` is the last that it got of this
        very job: then it goes on from there, and comes to the same. The state holds parts of what was learned from; it
        is for the pool alone. `told` gets how many updates are done.

        Raises:
            NotLearnable: it cannot be done, however often it is tried.
            LearnFailed: it cannot be done, with the reason.
        """
        ...
