"""A round: rewarded trajectories in, an updated engine and an account of what happened out.

It is planned first: which trajectories can be used, and which update learns from which. Then it goes from update to
update, and `Progress` is all that has to be kept to go on after any of them. The same engine state, plan, trajectories
and `TrainState` give the same round, bit for bit in one process on one thread, in one go or in parts: the order comes
from the seed and the number of the round, never from the clock or from the order of arrival. Knows no database, file
or gate.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from clawloop_server.errors import TrainerError
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine, UnusableSamples
from clawloop_server.trainer.guards import mean, running_entropy
from clawloop_server.trainer.learning import Lessons, prepare
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.advantages import AdvantageState
from clawloop_shared.lessons import batches
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Limits, screen
from clawloop_shared.whole_step import Sums

NOT_FINITE = PoisonedSamples.reason


class NothingFinite(TrainerError):
    """Nothing that an update was to learn from has finite logprobs: it is the base, the adapter or the device."""


class TrainState(msgspec.Struct, frozen=True, kw_only=True):
    """What training remembers besides the engine. `version` is that of the adapter that devices have now."""

    updates: int = 0
    rounds: int = 0
    version: int = 0
    advantages: AdvantageState = AdvantageState()
    entropy: float = 0.0
    """running mean of the policy's entropy over updates; 0 before the first"""


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a round did. `updates` has the metrics of each; `set_aside` names trajectories that could not be used, and
    why; `rejected_steps` counts steps by the reason against them. `deltas` names those of devices that it looked at,
    and why they are not in the adapter (empty: they are); `joined` is the account of that (`aggregate`). `conflict` has
    the cosines of the devices whose trajectories it had (`conflicts`), `split` the cohorts that came of all that."""

    state: TrainState
    updates: list[dict[str, float]]
    trajectory_ids: list[str]
    steps: int
    reward: float
    set_aside: dict[str, str]
    rejected_steps: dict[str, int]
    deltas: dict[str, str] = {}
    joined: dict[str, Any] = {}
    conflict: dict[str, dict[str, float]] = {}
    split: list[dict[str, Any]] = []

    @property
    def joined_ids(self) -> list[str]:
        """The deltas that are in the adapter."""
        return sorted(delta_id for delta_id, why in self.deltas.items() if not why)

    @property
    def lineage(self) -> list[str]:
        """The trajectories and deltas that the adapter was learned from."""
        return [*self.trajectory_ids, *self.joined_ids]

    def mean(self, metric: str) -> float:
        """The mean of a metric over the updates; 0 if there were none."""
        return mean(self.updates, metric)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Which update learns from which trajectories, by their ids; which are of no use, and why; and how many steps of
    the others are not learned from, by the reason."""

    batches: list[list[str]]
    set_aside: dict[str, str] = {}
    rejected_steps: dict[str, int] = {}


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a round is. `at_update` is the next update; `learned` are the trajectories that the updates before it
    learned from, `steps` and `rewards` the sums over these."""

    state: TrainState
    at_update: int = 0
    updates: list[dict[str, float]] = []
    learned: list[str] = []
    steps: int = 0
    rewards: float = 0.0
    set_aside: dict[str, str] = {}


Report = Callable[[dict[str, float]], None]
Read = Callable[[int, Sequence[str]], Sequence[Trajectory]]
"""gives what an update learns from, by its number (from 0) and the ids; what is not there any more it passes by"""
Keep = Callable[[Progress], None]


def plan_round(trajectories: Iterable[Trajectory], settings: TrainSettings, *, rounds: int, limits: Limits) -> Plan:
    """Look at each trajectory once, in the order of their ids, and decide which update learns from which; none is held.

    `rounds` is how many rounds there were before.
    """
    usable, set_aside, rejected = list[Trajectory](), dict[str, str](), Counter[str]()
    for trajectory in trajectories:
        screened = screen([trajectory], limits)
        usable += [msgspec.structs.replace(t, steps=[], signals=[]) for t in screened.trajectories]
        set_aside |= screened.rejected_trajectories
        rejected += screened.rejected_steps
    cut = batches(usable, settings, seed=f"{settings.seed} round {rounds}")
    return Plan(
        batches=[[t.trajectory_id for t in batch] for batch in cut],
        set_aside=set_aside,
        rejected_steps=dict(sorted(rejected.items())),
    )


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
    by_id = {t.trajectory_id: t for t in sorted(trajectories, key=lambda t: t.trajectory_id)}
    plan = plan_round(by_id.values(), engine.settings, rounds=state.rounds, limits=limits)
    return run_plan(
        engine,
        plan,
        read=lambda number, ids: [by_id[trajectory_id] for trajectory_id in ids],
        progress=Progress(state=state),
        limits=limits,
        report=report,
    )


def run_plan(
    engine: TrainEngine,
    plan: Plan,
    *,
    read: Read,
    progress: Progress,
    limits: Limits,
    report: Report = lambda metrics: None,
    keep: Keep = lambda progress: None,
) -> RoundResult:
    """Go on with a planned round where `progress` is, holding what one update learns from at a time.

    `report` hears the metrics of each update, `keep` gets what to go on from after it.

    Raises:
        NothingFinite: it is not the data's fault.
        TrainerError: there is nothing that can be used.
    """
    if not any(plan.batches):
        reasons = ", ".join(sorted(set(plan.set_aside.values()))) or "none given"
        raise TrainerError(f"none of {len(plan.set_aside)} trajectories can be used: {reasons}")
    for number in range(progress.at_update, len(plan.batches)):
        batch = screen(read(number, plan.batches[number]), limits).trajectories
        if batch:
            done = run_update(engine, batch, state=progress.state, limits=limits)
            metrics = done.metrics | {"round_update": float(number + 1), "round_updates": float(len(plan.batches))}
            progress = _after(progress, done, metrics=metrics)
            report(metrics)
        progress = msgspec.structs.replace(progress, at_update=number + 1)
        keep(progress)
    return _result(plan, progress)


def _after(progress: Progress, done: "UpdateResult", *, metrics: dict[str, float]) -> Progress:
    return msgspec.structs.replace(
        progress,
        state=done.state,
        updates=[*progress.updates, metrics],
        learned=[*progress.learned, *(t.trajectory_id for t in done.learned)],
        steps=progress.steps + sum(len(t.steps) for t in done.learned),
        rewards=progress.rewards + sum(t.reward for t in done.learned),
        set_aside=progress.set_aside | done.set_aside,
    )


def _result(plan: Plan, progress: Progress) -> RoundResult:
    return RoundResult(
        state=msgspec.structs.replace(progress.state, rounds=progress.state.rounds + 1),
        updates=progress.updates,
        trajectory_ids=sorted(progress.learned),
        steps=progress.steps,
        reward=progress.rewards / max(1, len(progress.learned)),
        set_aside=plan.set_aside | progress.set_aside,
        rejected_steps=plan.rejected_steps,
    )


class UpdateResult(msgspec.Struct, frozen=True):
    """One optimizer step: the state after it, its metrics, what it learned from, and what it could not
    and why."""

    state: TrainState
    metrics: dict[str, float]
    learned: list[Trajectory]
    set_aside: dict[str, str]


def run_update(engine: TrainEngine, batch: Sequence[Trajectory], *, state: TrainState, limits: Limits) -> UpdateResult:
    """One optimizer step on screened trajectories. Those whose logprobs are not finite, or that do not fit the memory,
    are left out and named.

    Hints are used as far as a step with its hint has at most `limits.max_tokens`.

    Raises:
        NothingFinite: the logprobs of none of them are finite.
    """
    settings, learned, set_aside = engine.settings, list(batch), dict[str, str]()
    sums, lessons = Sums(), Lessons(tracked=state.advantages)
    while learned:
        try:
            lessons = prepare(learned, engine, tracked=state.advantages, version=state.version, limits=limits)
            sums = engine.forward_backward(lessons.samples, settings.loss)
            break
        except UnusableSamples as error:
            lessons = Lessons(tracked=state.advantages)  # what is left out teaches the baseline nothing either
            set_aside |= {learned[index].trajectory_id: error.reason for index in error.trajectories}
            learned = [t for index, t in enumerate(learned) if index not in error.trajectories]
    if not (learned and lessons.samples) and set(set_aside.values()) == {NOT_FINITE}:
        raise NothingFinite(
            f"the logprobs of none of {len(set_aside)} trajectories of an update are finite, so it is the base, the"
            " adapter or the device, not the data; see [train] dtype and device, and check the base's files"
        )
    lr = settings.lr_at(state.updates)
    norm = engine.optim_step(lr) if learned else 0.0
    if not math.isfinite(norm):
        lessons = msgspec.structs.replace(lessons, tracked=state.advantages)  # nothing was learned from these rewards
    metrics = lessons.metrics | sums.metrics()
    metrics |= {
        "update": float(state.updates),
        "lr": lr,
        "gradient_norm": norm if math.isfinite(norm) else 0.0,
        "skipped_steps": float(not math.isfinite(norm)),
        "entropy_before": state.entropy,
        "reward": sum(t.reward for t in learned) / max(1, len(learned)),
        "trajectories": float(len(learned)),
        "hinted_steps": float(lessons.hinted),
    }
    after = msgspec.structs.replace(
        state,
        updates=state.updates + 1,
        advantages=msgspec.structs.replace(lessons.tracked, drift=metrics["k3"])
        if math.isfinite(norm + metrics["k3"])
        else lessons.tracked,
        entropy=running_entropy(state.entropy, metrics) if math.isfinite(norm) else state.entropy,
    )
    return UpdateResult(after, metrics, learned, set_aside)
