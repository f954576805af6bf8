"""From a round's trajectories to what each optimizer step learns from: batches, advantages, hints, samples."""

import random
from collections.abc import Sequence

import msgspec

from clawloop_server.trainer.advantages import AdvantageState, Rewarded, advantage_named, rescale
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.hindsight import latest_hints, with_hindsight
from clawloop_server.trainer.rows import Sample, make_samples
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.records import Trajectory


class Lessons(msgspec.Struct, frozen=True, kw_only=True):
    """What an update learns from: its samples, the baseline after them, and how many had a hint."""

    tracked: AdvantageState
    samples: list[Sample] = []
    hinted: int = 0


def batches(usable: Sequence[Trajectory], settings: TrainSettings, *, seed: str) -> list[list[Trajectory]]:
    """All of them, shuffled, `batch_trajectories` an update: a group that is larger than a round makes a longer round,
    and nothing of it is passed by."""
    shuffled, size = list(usable), settings.batch_trajectories
    random.Random(seed).shuffle(shuffled)
    return [shuffled[at : at + size] for at in range(0, len(shuffled), size)]


def prepare(
    batch: Sequence[Trajectory], engine: TrainEngine, *, tracked: AdvantageState, version: int, max_tokens: int
) -> Lessons:
    """The samples of one update. Hints are used as far as a step with its hint has at most `max_tokens`."""
    settings = engine.settings
    rewarded = [
        Rewarded(rescale(t.reward, low=settings.reward_low, high=settings.reward_high), confidence=t.weight)
        for t in batch
    ]
    advantages, tracked = advantage_named(settings.advantage)(rewarded, tracked)
    samples, hinted = with_hindsight(
        make_samples(batch, advantages, version=version),
        latest_hints(batch, vocab_size=engine.model.config.vocab_size),
        logprobs=engine.logprobs,
        weight=settings.hindsight,
        clip=settings.hindsight_clip,
        max_tokens=max_tokens,
    )
    return Lessons(tracked=tracked, samples=samples, hinted=hinted)
