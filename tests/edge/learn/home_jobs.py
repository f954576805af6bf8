"""Jobs for learning at home on a tiny model: what was sampled is made up, what was judged too."""

import hashlib
import random
from pathlib import Path
from typing import Any

from clawloop_edge.learn.job import Job
from clawloop_edge.learn.updates import Updates
from clawloop_shared.deltas import LearnTask
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.records import Policy, Sampling, Step, Trajectory

VOCABULARY = 700
LINE = "line"


def a_step(name: str, *, tokens: int = 14, response: int = 4, version: int = 0) -> Step:
    rng = random.Random(name)
    return Step(
        step_id=name,
        session_id=f"session {name}",
        run_id=f"run {name}",
        prompt_ids=[rng.randrange(3, VOCABULARY) for _ in range(tokens - response)],
        response_ids=[rng.randrange(3, VOCABULARY) for _ in range(response)],
        response_logprobs=[-rng.uniform(5.5, 7.5) for _ in range(response)],
        policy=Policy(LINE, version),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=0,
    )


def a_trajectory(number: int, *, steps: int = 2, **step: Any) -> Trajectory:
    return Trajectory(
        trajectory_id=f"t{number:02}",
        steps=[a_step(f"{number}.{at}", **step) for at in range(steps)],
        signals=[],
        reward=(-1.0, 1.0, 0.5)[number % 3],
        weight=(1.0, 0.5)[number % 2],
    )


def a_job(model: Path, *, adapter: dict[str, bytes] | None = None, count: int = 6, rank: int = 4, **task: Any) -> Job:
    values: dict[str, Any] = {"updates": 3, "batch_trajectories": 3, "lr": 5e-3, "rank": rank, "alpha": 8.0}
    weights = hashlib.sha256(adapter[WEIGHTS_FILE]).hexdigest() if adapter else ""
    return Job(
        task=LearnTask(task_id="task", line_id=LINE, base_version=0, weights_sha256=weights, **values | task),
        rank=rank,
        model=model,
        adapter=adapter or {},
        trajectories=[a_trajectory(number) for number in range(count)],
    )


def finish(updates: Updates) -> Updates:
    while not updates.done:
        updates.step()
    return updates
