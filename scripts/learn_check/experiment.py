"""One run: a learner on the server's settings, a device that lags behind it, and what came of it on held-out tasks.

The learner goes through the server's own rounds (`run_round`): screened trajectories, advantages, loss, AdamW. A round
has `updates_per_round` updates, or fewer where an adapter is shipped more often; each makes a version. Knows no file
but the models'.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import msgspec

from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.loop import TrainState, run_round
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.objective import LossSettings
from clawloop_shared.records import Policy, Step, Trajectory
from clawloop_shared.rows import Limits, Sample
from learn_check import world
from learn_check.device import LINE, Episode, play, trajectory_of

SETTINGS = TrainSettings(lr=2e-3, batch_trajectories=128, row_tokens=512)
"""what differs from the server's defaults: a rate for a model of 100,000 weights, a batch that its 120 updates need,
and rows for a dense mask"""
LOSS_IGNORED = LossSettings(opsm_delta=math.inf)
REACHED, REACHED_OVER = 0.8, 5
"""mean reward of what the device sampled, over so many updates, that says how fast a run was"""
_EVAL_SEED, _EVAL_EPISODES = 99, 16
_MAX_TOKENS = 64


@dataclass(frozen=True)
class Variant:
    """How a run differs: every how many updates the device gets the adapter, and what is made wrong on purpose."""

    name: str
    says: str
    ship_every: int = 1
    ignores_ratio: bool = False
    shuffles: bool = False
    same_base: bool = False
    """the learner too trains on the 4-bit base, as the server does; without, the base is what quantisation lost"""

    @property
    def settings(self) -> TrainSettings:
        """The server's settings for it."""
        most = 1 if self.ignores_ratio or self.shuffles else SETTINGS.updates_per_round
        changed = msgspec.structs.replace(SETTINGS, updates_per_round=min(self.ship_every, most))
        return msgspec.structs.replace(changed, loss=LOSS_IGNORED) if self.ignores_ratio else changed


VARIANTS = (
    Variant("fresh", "the device has the newest adapter"),
    Variant("same-base", "fresh, and the learner trains on the device's 4-bit base", same_base=True),
    Variant("stale-10", "an adapter every 10 updates", ship_every=10),
    Variant("stale-30", "an adapter every 30 updates", ship_every=30),
    Variant("ignored", "every 10, as if the learner had sampled itself", ship_every=10, ignores_ratio=True),
    Variant("shuffled", "fresh, each reward given to another episode", shuffles=True),
)


class Score(msgspec.Struct, frozen=True):
    """Mean reward on the held-out tasks: sampled and greedy by the learner, sampled by a device with its adapter."""

    sampled: float
    greedy: float
    device: float

    @property
    def lowest(self) -> float:
        """The worse of learner and device, sampled."""
        return min(self.sampled, self.device)

    @property
    def highest(self) -> float:
        """The better of both."""
        return max(self.sampled, self.device)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run. `curve` is the mean reward that the device sampled for each update."""

    variant: str
    seed: int
    updates: int
    before: Score
    after: Score
    curve: list[float]
    updates_to_reached: int | None
    k3: float
    kept: float
    first_k3: float
    largest_k3: float
    """of all updates; that of the first knows only an adapter whose B is zero"""
    largest_version_gap: int
    refused_rounds: list[str]
    seconds: float


Report = Callable[[int, float], None]
"""hears the number of updates that are done, and the mean reward of the last"""


class Run:
    """A learner and a device on the models in `folder`, which `model.py` made."""

    def __init__(self, folder: Path, variant: Variant, *, seed: int) -> None:
        self.variant, self.seed = variant, seed
        settings = msgspec.structs.replace(variant.settings, seed=seed)
        self.learner = TrainEngine.open(folder / ("device" if variant.same_base else "base"), settings)
        self.device = TrainEngine.open(folder / "device", settings)
        self.state, self.shipped = TrainState(), 0
        self.limits = Limits(line_id=LINE, vocab_size=len(world.WORDS), max_tokens=_MAX_TOKENS)
        self._rng = random.Random(seed)

    def outcome(self, updates: int, *, report: Report = lambda done, reward: None) -> Outcome:
        """Train for so many updates, and measure before and after.

        Raises:
            ValueError: `updates` are no whole number of rounds.
        """
        size = self.learner.settings.updates_per_round
        if updates % size:
            raise ValueError(f"{updates} updates are no whole number of rounds of {size}")
        began, before = time.perf_counter(), self.score()
        curve, metrics, drifts, refused, gaps = list[float](), list[dict[str, float]](), list[float](), list[str](), [0]
        for done in range(0, updates, size):
            if done % self.variant.ship_every == 0:
                self.ship()
            gaps.append(self.state.version - self.shipped)
            episodes, trajectories = self.collect(self.learner.settings.round_trajectories)
            if self.variant.ignores_ratio:
                trajectories, drift = self.relabelled(trajectories)
                drifts.append(drift)
            result = run_round(self.learner, trajectories, state=self.state, limits=self.limits)
            self.state = msgspec.structs.replace(result.state, version=result.state.version + 1)
            metrics += result.updates
            refused += [reason] if (reason := unhealthy(result.updates, self.learner.settings)) else []
            curve += self._rewards(episodes)
            report(done + size, curve[-1])
        drifts = drifts or [update["k3"] for update in metrics]
        return Outcome(
            variant=self.variant.name,
            seed=self.seed,
            updates=updates,
            before=before,
            after=self.score(),
            curve=curve,
            updates_to_reached=reached(curve),
            k3=fmean(drifts),
            kept=fmean(update["kept"] for update in metrics),
            first_k3=drifts[0],
            largest_k3=max(drifts),
            largest_version_gap=max(gaps),
            refused_rounds=refused,
            seconds=time.perf_counter() - began,
        )

    def ship(self) -> None:
        """Give the device the learner's adapter, as the file that it would be sent."""
        self.device.start_from(self.learner.adapter_files()[WEIGHTS_FILE])
        self.shipped = self.state.version

    def collect(self, count: int) -> tuple[list[Episode], list[Trajectory]]:
        """Episodes that the device samples now, and the rewarded trajectories that they are."""
        tasks = self._rng.choices(world.TRAIN, k=count)
        episodes = play(self.device, tasks, seed=self._rng.getrandbits(30))
        rewards = [episode.reward for episode in episodes]
        if self.variant.shuffles:
            self._rng.shuffle(rewards)
        policy = Policy(LINE, self.shipped)
        made = [
            trajectory_of(episode, name=f"{self.state.updates}-{number}", policy=policy, reward=reward)
            for number, (episode, reward) in enumerate(zip(episodes, rewards, strict=True))
        ]
        return episodes, made

    def relabelled(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory], float]:
        """The same with the learner's own logprobs, as a trainer has it that forgets who sampled; and the k3 between
        both that it does not see."""
        samples = [_unjudged(step, at) for at, each in enumerate(trajectories) for step in each.steps]
        mine = {sample.step_id: found for sample, found in zip(samples, self.learner.logprobs(samples), strict=True)}
        ratios = [
            now - then for sample in samples for now, then in zip(mine[sample.step_id], sample.logprobs, strict=True)
        ]
        forged = [
            msgspec.structs.replace(
                each, steps=[msgspec.structs.replace(s, response_logprobs=mine[s.step_id]) for s in each.steps]
            )
            for each in trajectories
        ]
        return forged, fmean(math.exp(ratio) - 1.0 - ratio for ratio in ratios)

    def score(self) -> Score:
        """Held-out reward, with the same random numbers each time. Leaves the device with its adapter."""
        adapter = self.learner.adapter()
        with self.device.with_adapter(adapter):
            device = self._sampled(self.device)
        return Score(self._sampled(self.learner), self._greedy(), device)

    def _sampled(self, engine: TrainEngine) -> float:
        return fmean(e.reward for e in play(engine, world.HELD_OUT * _EVAL_EPISODES, seed=_EVAL_SEED))

    def _greedy(self) -> float:
        return fmean(e.reward for e in play(self.learner, world.HELD_OUT, seed=_EVAL_SEED, temperature=0.0))

    def _rewards(self, episodes: Sequence[Episode]) -> list[float]:
        size = self.learner.settings.batch_trajectories
        return [fmean(e.reward for e in episodes[at : at + size]) for at in range(0, len(episodes), size)]


def reached(curve: Sequence[float]) -> int | None:
    """The first update from which `REACHED_OVER` in a row have a mean of `REACHED`; None if there is none."""
    spans = range(len(curve) - REACHED_OVER + 1)
    return next((at for at in spans if fmean(curve[at : at + REACHED_OVER]) >= REACHED), None)


def _unjudged(step: Step, trajectory: int) -> Sample:
    """A step as the engine scores it."""
    size = len(step.response_ids)
    return Sample(
        step_id=step.step_id,
        trajectory=trajectory,
        token_ids=step.token_ids,
        trained=range(len(step.prompt_ids), len(step.prompt_ids) + size),
        logprobs=step.logprobs,
        advantages=[0.0] * size,
        temperature=step.sampling.temperature,
    )
