"""A round: rewarded trajectories in, an updated engine and an account of what happened out.

The same engine state, trajectories and `TrainState` give the same round, bit for bit in one process on one thread: the
order comes from the seed and the number of the round, never from the clock or from the order of arrival. Knows no
database, file or gate.
"""

from collections.abc import Callable, Sequence

import msgspec

from clawloop_server.errors import TrainerError
from clawloop_server.trainer.advantages import AdvantageState
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine
from clawloop_server.trainer.guards import mean
from clawloop_server.trainer.learning import Lessons, batches, prepare
from clawloop_server.trainer.losses import Sums
from clawloop_server.trainer.rows import Limits, screen
from clawloop_shared.records import Trajectory

NOT_FINITE = "logprobs under the current policy are not finite"


class TrainState(msgspec.Struct, frozen=True, kw_only=True):
    """What training remembers besides the engine. `version` is that of the adapter that devices have now."""

    updates: int = 0
    rounds: int = 0
    version: int = 0
    advantages: AdvantageState = AdvantageState()


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a round did. `updates` has the metrics of each; `set_aside` names trajectories that could not be used, and
    why; `rejected_steps` counts steps by the reason against them."""

    state: TrainState
    updates: list[dict[str, float]]
    trajectory_ids: list[str]
    steps: int
    reward: float
    set_aside: dict[str, str]
    rejected_steps: dict[str, int]

    def mean(self, metric: str) -> float:
        """The mean of a metric over the updates; 0 if there were none."""
        return mean(self.updates, metric)


Report = Callable[[dict[str, float]], None]


def run_round(
    engine: TrainEngine,
    trajectories: Sequence[Trajectory],
    *,
    state: TrainState,
    limits: Limits,
    report: Report = lambda metrics: None,
) -> RoundResult:
    """Train on each trajectory once, `batch_trajectories` an optimizer step; `report` hears the metrics of each.

    Raises:
        TrainerError: none of the trajectories can be used.
    """
    settings = engine.settings
    screened = screen(sorted(trajectories, key=lambda t: t.trajectory_id), limits)
    usable = screened.trajectories
    if not usable:
        reasons = sorted(set(screened.rejected_trajectories.values()))
        raise TrainerError(
            f"none of {len(trajectories)} trajectories can be used: {', '.join(reasons) or 'none given'}"
        )
    set_aside, metrics, learned = dict(screened.rejected_trajectories), [], list[Trajectory]()
    for batch in batches(usable, settings, seed=f"{settings.seed} round {state.rounds}"):
        done = run_update(engine, batch, state=state, max_tokens=limits.max_tokens)
        state = done.state
        set_aside |= dict.fromkeys(done.poisoned, NOT_FINITE)
        learned += done.learned
        metrics.append(done.metrics)
        report(done.metrics)
    return RoundResult(
        state=msgspec.structs.replace(state, rounds=state.rounds + 1),
        updates=metrics,
        trajectory_ids=sorted(t.trajectory_id for t in learned),
        steps=sum(len(t.steps) for t in learned),
        reward=sum(t.reward for t in learned) / max(1, len(learned)),
        set_aside=set_aside,
        rejected_steps=dict(sorted(screened.rejected_steps.items())),
    )


class UpdateResult(msgspec.Struct, frozen=True):
    """One optimizer step: the state after it, its metrics, what it learned from, and what it could not."""

    state: TrainState
    metrics: dict[str, float]
    learned: list[Trajectory]
    poisoned: list[str]


def run_update(engine: TrainEngine, batch: Sequence[Trajectory], *, state: TrainState, max_tokens: int) -> UpdateResult:
    """One optimizer step on screened trajectories. Those with logprobs that are not finite are left out and named.

    Hints are used as far as a step with its hint has at most `max_tokens`.
    """
    settings, learned, poisoned = engine.settings, list(batch), list[str]()
    sums, lessons = Sums(), Lessons(tracked=state.advantages)
    while learned:
        lessons = prepare(learned, engine, tracked=state.advantages, version=state.version, max_tokens=max_tokens)
        try:
            sums = engine.forward_backward(lessons.samples, settings.loss)
            break
        except PoisonedSamples as error:
            lessons = Lessons(tracked=state.advantages)  # what is left out teaches the baseline nothing either
            poisoned += [learned[index].trajectory_id for index in error.trajectories]
            learned = [t for index, t in enumerate(learned) if index not in error.trajectories]
    lr = settings.lr_at(state.updates)
    norm = engine.optim_step(lr) if learned else 0.0
    metrics = sums.metrics() | {
        "update": float(state.updates),
        "lr": lr,
        "gradient_norm": norm,
        "reward": sum(t.reward for t in learned) / max(1, len(learned)),
        "trajectories": float(len(learned)),
        "hinted_steps": float(lessons.hinted),
    }
    after = msgspec.structs.replace(
        state,
        updates=state.updates + 1,
        advantages=msgspec.structs.replace(lessons.tracked, drift=metrics["k3"]),
    )
    return UpdateResult(after, metrics, learned, poisoned)
