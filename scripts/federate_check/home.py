"""A device of the check that learns at home: a 4-bit base, the adapter that is served beneath, and a LoRA beside it.

What it learns with is the trainer's own round (`run_round`), on episodes that it sampled with what it served. One
engine plays all devices in turn: each begins with a fresh LoRA and an optimizer that remembers nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec
import torch
from safetensors.torch import save
from torch import Tensor

from clawloop_server.aggregate.updates import Factors, Update
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import TrainState, run_round
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.records import Policy
from clawloop_shared.rows import Limits
from learn_check import world
from learn_check.device import LINE, play, trajectory_of

RANK, ALPHA = 8, 16.0
SETTINGS = TrainSettings(rank=RANK, alpha=ALPHA, lr=2e-3, warmup_updates=1, row_tokens=512)
"""what differs from the server's defaults: a rate for a model of 100,000 weights, without a warm-up of ten updates in
tasks that are not much longer, and rows for a dense mask"""
LIMITS = Limits(line_id=LINE, vocab_size=len(world.WORDS), max_tokens=64)
EVAL_SEED, EVAL_EPISODES = 99, 16
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class Home:
    """The engine of all devices, on the model in `folder`."""

    def __init__(self, folder: Path, *, batch: int) -> None:
        self._engine = TrainEngine.open(folder, msgspec.structs.replace(SETTINGS, batch_trajectories=batch))
        self._names = [name for name in self._engine.adapter() if name.endswith(_A)]
        modules = dict(self._engine.model.named_modules())
        self._weights = {_path(name): modules[name.removesuffix(_A)].base_layer.weight for name in self._names}
        self._base = {path: weight.detach().clone() for path, weight in self._weights.items()}

    @torch.no_grad()
    def serve(self, adapter: Update) -> None:
        """Serve the base and `adapter`; what is learned then begins at zero beside it."""
        for path, weight in self._weights.items():
            update = adapter.get(path)
            weight.copy_(self._base[path] if update is None else self._base[path] + update.b @ update.a)
        self._begin(seed=0)

    def learn(self, tasks: Sequence[world.Task], *, updates: int, seed: int, drawn: int) -> Update:
        """What a device with these tasks learns in so many updates, from episodes that it sampled before them all.

        `seed` is the device's own, of what it samples; from `drawn` comes the A that it begins with. Leaves what is
        served as it was.
        """
        rng = random.Random(seed)
        self._begin(seed=drawn)
        chosen = rng.choices(tasks, k=updates * self._engine.settings.batch_trajectories)
        episodes = play(self._engine, chosen, seed=rng.getrandbits(30))
        made = [
            trajectory_of(episode, name=f"{seed}-{number}", policy=Policy(LINE, 0), reward=episode.reward)
            for number, episode in enumerate(episodes)
        ]
        run_round(self._engine, made, state=TrainState(), limits=LIMITS)
        learned = self._engine.adapter()
        self._begin(seed=0)
        return {
            _path(name): Factors(ALPHA / RANK * learned[name.replace(_A, _B)], learned[name]) for name in self._names
        }

    def score(self, tasks: Sequence[world.Task]) -> float:
        """Mean sampled reward of what is served, with the same random numbers each time."""
        return fmean(episode.reward for episode in play(self._engine, [*tasks] * EVAL_EPISODES, seed=EVAL_SEED))

    def _begin(self, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: _fresh(name, tensor, generator) for name, tensor in self._engine.adapter().items()}
        self._engine.start_from(save(tensors))


def _path(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_A)


def _fresh(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """B zero, A as PEFT draws it."""
    if name.endswith(_B):
        return torch.zeros_like(tensor)
    bound = 1 / math.sqrt(tensor.shape[1])
    return (2 * torch.rand(tensor.shape, generator=generator) - 1) * bound
