"""Pooled training: one learner gets what all sampled, as the server does from devices that let trajectories out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import TrainState, run_round
from clawloop_shared.records import Policy
from federate_check.home import EVAL_EPISODES, EVAL_SEED, LIMITS, SETTINGS
from learn_check import world
from learn_check.device import LINE, play, trajectory_of


class Pooled:
    """A learner on the model in `folder` whose updates have `batch` trajectories."""

    def __init__(self, folder: Path, *, batch: int, updates: int, rank: int) -> None:
        settings = msgspec.structs.replace(
            SETTINGS, batch_trajectories=batch, updates_per_round=updates, rank=rank, alpha=2.0 * rank
        )
        self._engine, self._state = TrainEngine.open(folder, settings), TrainState()

    def round(self, parts: Sequence[Sequence[world.Task]], *, seed: int) -> None:
        """Learn from what devices with these tasks sampled, each as much, with the adapter as it is."""
        rng = random.Random(seed)
        count = self._engine.settings.round_trajectories // len(parts)
        tasks = [task for part in parts for task in rng.choices(part, k=count)]
        episodes = play(self._engine, tasks, seed=rng.getrandbits(30))
        made = [
            trajectory_of(e, name=f"{seed}-{n}", policy=Policy(LINE, self._state.version), reward=e.reward)
            for n, e in enumerate(episodes)
        ]
        done = run_round(self._engine, made, state=self._state, limits=LIMITS)
        self._state = msgspec.structs.replace(done.state, version=done.state.version + 1)

    def score(self, tasks: Sequence[world.Task]) -> float:
        """Mean sampled reward, with the same random numbers each time."""
        return fmean(episode.reward for episode in play(self._engine, [*tasks] * EVAL_EPISODES, seed=EVAL_SEED))
