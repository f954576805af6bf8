"""From a round's trajectories to what each optimizer step learns from, hints included."""

from collections.abc import Sequence

import msgspec

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.hindsight import latest_hints, with_hindsight
from clawloop_shared.advantages import AdvantageState, advantages_of
from clawloop_shared.lessons import advantage_metrics, length_metrics, rewards_of, source_metrics, spread
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Limits, Sample, make_samples


class Lessons(msgspec.Struct, frozen=True, kw_only=True):
    """What an update learns from: its samples, the baseline after them, how many had a hint, and what to log."""

    tracked: AdvantageState
    samples: list[Sample] = []
    hinted: int = 0
    metrics: dict[str, float] = {}


def prepare(
    batch: Sequence[Trajectory],
    engine: TrainEngine,
    *,
    tracked: AdvantageState,
    version: int,
    limits: Limits,
) -> Lessons:
    """The samples of one update. Hints are used as far as a step with its hint has at most `limits.max_tokens`;
    `limits.rules` weigh the signals of single steps, with `credit = "step"`."""
    settings = engine.settings
    places, rewarded = rewards_of(batch, settings, rules=limits.rules)
    found = advantages_of(rewarded, tracked, advantage=settings.advantage, group_advantage=settings.group_advantage)
    hints = latest_hints(batch, vocab_size=engine.model.config.vocab_size) if settings.hindsight else {}
    advantages = spread(batch, places, found.values, hinted=hints)
    samples, hinted = with_hindsight(
        make_samples(batch, advantages, version=version),
        hints,
        logprobs=engine.logprobs,
        weight=settings.hindsight,
        clip=settings.hindsight_clip,
        max_tokens=limits.max_tokens,
    )
    metrics = advantage_metrics(found) | length_metrics(samples) | source_metrics(batch, limits.rules)
    taught = {sample.trajectory for sample in samples}
    metrics["unused_trajectories"] = float(len(batch) - len(taught))
    return Lessons(tracked=found.state, samples=samples, hinted=hinted, metrics=metrics)
