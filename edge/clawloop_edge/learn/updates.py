"""The updates of one job: which trajectories each learns from, its gradient, AdamW's step, and all that the next needs.

The same job and the same state come to the same, bit for bit on one machine: the order is drawn from the task's seed,
never from the clock or the order of arrival. Data that are few are gone through again, in another order, until the
task's updates are done; advantages begin anew with each pass, so that no reward is compared with itself. Knows no
process, file or pipe.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers as optim
import msgspec

from clawloop_edge.errors import NotLearnable
from clawloop_edge.learn.job import MASKED, Job, Learned
from clawloop_edge.learn.lora import Arrays, from_file, to_file
from clawloop_edge.learn.objective import LossInputs, slopes
from clawloop_edge.learn.shares import largest, most_share, scales, too_large
from clawloop_shared.advantages import AdvantageState, advantages_of
from clawloop_shared.deltas import LearnTask
from clawloop_shared.lessons import advantage_metrics, batches, length_metrics, rewards_of, spread
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Limits, Sample, make_samples, screen
from clawloop_shared.whole_step import Sums

BETAS, CLIP_NORM = (0.9, 0.99), 1.0
"""of AdamW, and of the gradient's norm: the defaults of the server's [train]"""
ADVANTAGE, GROUP_ADVANTAGE = "ema", "dr-grpo"
NOT_FINITE = "logprobs under the current policy are not finite"
TOO_LARGE = "a step does not fit the memory of learning"


class Model(Protocol):
    """What is asked of the model that learns (`learn.model.LearningModel`)."""

    def logprobs(self, sample: Sample, *, base: bool = False) -> tuple[list[float], float]: ...

    def gradient(self, sample: Sample, slope_P: Any, learned: Arrays) -> Arrays: ...

    def put(self, learned: Arrays) -> None: ...


class Credit(msgspec.Struct, frozen=True):
    """How a task's trajectories become lessons: each step has the reward of all."""

    batch_trajectories: int
    reward_low: float
    reward_high: float
    credit: str = "trajectory"
    discount: float = 1.0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is: the next update, the baseline, what was learned from, and the metrics of each update."""

    job: bytes
    at_update: int = 0
    tracked: AdvantageState = AdvantageState()
    learned: dict[str, float] = {}
    """rewards by trajectory that moved the factors"""
    shares: dict[str, float] = {}
    """the part that each had, summed over the updates; with the sizes of those parts in `masses` (`learn.shares`)"""
    masses: dict[str, float] = {}
    set_aside: dict[str, str] = {}
    updates: list[dict[str, float]] = []
    tensors: bytes = b""
    """the learned factors and AdamW's moments, a safetensors file"""


def fingerprint(job: Job) -> bytes:
    """What a state must be of to be gone on from: all of the job that decides what comes of it."""
    names = sorted(trajectory.trajectory_id for trajectory in job.trajectories)
    adapter = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(job.adapter.items())}
    limits = (job.max_updates, job.max_sample_tokens, job.min_trajectories)
    told = (job.task, job.rank, adapter, names, job.rules, limits)
    return hashlib.sha256(msgspec.msgpack.encode(told)).digest()


class Plan(msgspec.Struct, frozen=True):
    """Which update learns from which trajectories; `first` are the updates that begin a pass over the data."""

    batches: list[list[Trajectory]]
    first: set[int]
    set_aside: dict[str, str]


def plan_of(job: Job, *, vocabulary: int, fits: Callable[[Sequence[int]], bool]) -> Plan:
    """What to do for a job. `fits` tells whether a step of so many tokens fits the memory.

    Raises:
        NotLearnable: none of the trajectories can be learned from.
    """
    limits = Limits(job.task.line_id, vocabulary, job.max_sample_tokens, rules=job.rules)
    found = screen(sorted(job.trajectories, key=lambda t: t.trajectory_id), limits)
    usable, set_aside = list[Trajectory](), dict(found.rejected_trajectories)
    for trajectory in found.trajectories:
        steps = [step for step in trajectory.steps if fits((len(step.token_ids), len(step.response_ids)))]
        if steps:
            usable.append(msgspec.structs.replace(trajectory, steps=steps))
        else:
            set_aside[trajectory.trajectory_id] = TOO_LARGE
    if not usable:
        reasons = ", ".join(sorted(set(set_aside.values()))) or "there are none"
        raise NotLearnable(f"none of {len(job.trajectories)} trajectories can be learned from: {reasons}")
    wanted, first = min(job.task.updates, job.max_updates), set[int]()
    planned: list[list[Trajectory]] = []
    while len(planned) < wanted:
        first.add(len(planned))
        planned += batches(usable, credit_of(job.task), seed=f"{job.task.seed} pass {len(first)}")
    return Plan(planned[:wanted], first, set_aside)


def credit_of(task: LearnTask) -> Credit:
    """What the task says of rewards."""
    return Credit(task.batch_trajectories, task.reward_low, task.reward_high)


class Updates:
    """A job under way: `step` until `done`, then `learned`."""

    def __init__(self, job: Job, plan: Plan, model: Model, *, learned: Arrays, progress: Progress) -> None:
        """`learned` is what the job begins with; a progress that is further has its own."""
        self._job, self._plan, self._model, self._progress = job, plan, model, progress
        self._reference: dict[str, list[float]] = {}
        self._optimizer = optim.AdamW(job.task.lr, betas=list(BETAS), weight_decay=0.0, bias_correction=True)
        self._learned = dict(sorted(learned.items()))
        self._optimizer.init(self._learned)
        if progress.tensors:
            self._restore(from_file(progress.tensors))
        model.put(self._learned)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do."""
        return self._progress.at_update >= len(self._plan.batches)

    @property
    def progress(self) -> Progress:
        """All that the rest depends on."""
        return msgspec.structs.replace(self._progress, tensors=to_file(self._tensors()))

    def result(self) -> Learned:
        """What was learned.

        Raises:
            NotLearnable: nothing was: there was nothing to tell good from bad, or nothing finite; or one trajectory had
                more of it than it may.
        """
        progress = self._progress
        if not any(update["gradient_norm"] > 0 for update in progress.updates):
            bad = sorted(set(progress.set_aside.values())) or ["what was judged was judged alike"]
            raise NotLearnable(f"{len(progress.updates)} updates changed nothing: {', '.join(bad)}")
        share, most = largest(progress.shares, progress.masses), most_share(self._job.min_trajectories)
        if too_large(share, most):
            raise NotLearnable(
                f"one trajectory is {share:.2f} of what was learned, and may be {most:.2f}; wait for a task"
            )
        tried = {t.trajectory_id for batch in self._plan.batches for t in batch}
        masked = dict.fromkeys(sorted(tried - progress.learned.keys()), MASKED)
        return Learned(
            weights=to_file(self._learned),
            trajectory_ids=sorted(progress.learned),
            set_aside=masked | self._plan.set_aside | progress.set_aside,
            reward=sum(progress.learned.values()) / max(1, len(progress.learned)),
            updates=progress.updates,
        )

    def step(self) -> None:
        """The next update. What turns out to be of no use is set aside, and the update is made without it."""
        before, number = self._progress, self._progress.at_update
        tracked = AdvantageState() if number in self._plan.first else before.tracked
        batch = [t for t in self._plan.batches[number] if t.trajectory_id not in before.set_aside]
        samples, logprobs, aside = list[Sample](), list[list[float]](), dict[str, str]()
        metrics, after, entropy = dict[str, float](), tracked, 0.0
        while batch:
            samples, metrics, after = self._lessons(batch, tracked)
            logprobs, entropy, broken = self._score(samples)
            if not broken:
                break
            aside |= {batch[index].trajectory_id: reason for index, reason in broken.items()}
            batch = [t for index, t in enumerate(batch) if index not in broken]
            samples = []
        sums, norm, parts = Sums(), 0.0, dict[int, float]()
        if samples:
            sums, norm, gradient, parts = self._gradient(samples, logprobs)
            sums += Sums(entropy=entropy)
            self._apply(gradient, norm)
        metrics = metrics | sums.metrics()
        metrics |= {
            "update": float(number),
            "lr": self._job.task.lr,
            "gradient_norm": norm if math.isfinite(norm) else 0.0,
            "skipped_steps": float(not math.isfinite(norm)),
            "reward": sum(t.reward for t in batch) / max(1, len(batch)),
            "trajectories": float(len(batch)),
        }
        whole = sum(parts.values()) if math.isfinite(norm) else 0.0
        taught = {batch[at].trajectory_id: part for at, part in parts.items() if part > 0 and whole}
        self._progress = msgspec.structs.replace(
            before,
            at_update=number + 1,
            tracked=after if batch and math.isfinite(norm) else tracked,
            learned=before.learned | {t.trajectory_id: t.reward for t in batch if t.trajectory_id in taught},
            shares=_more(before.shares, {name: part / whole for name, part in taught.items()}),
            masses=_more(before.masses, taught),
            set_aside=before.set_aside | aside,
            updates=[*before.updates, metrics],
        )

    def _lessons(
        self, batch: Sequence[Trajectory], tracked: AdvantageState
    ) -> tuple[list[Sample], dict[str, float], AdvantageState]:
        """The samples of an update, what to log, and the baseline after it, as the server's `prepare` makes them."""
        places, rewarded = rewards_of(batch, credit_of(self._job.task), rules=self._job.rules)
        found = advantages_of(rewarded, tracked, advantage=ADVANTAGE, group_advantage=GROUP_ADVANTAGE)
        advantages = spread(batch, places, found.values)
        samples = make_samples(batch, advantages, version=self._job.task.base_version)
        return samples, advantage_metrics(found) | length_metrics(samples), found.state

    def _score(self, samples: Sequence[Sample]) -> tuple[list[list[float]], float, dict[int, str]]:
        """The current logprobs of each sample, the sum of entropies, and which trajectories are of no use, and why."""
        found, entropy, broken = list[list[float]](), 0.0, dict[int, str]()
        for sample in samples:
            logprobs, own = self._model.logprobs(sample)
            found.append(logprobs)
            entropy += own
            reference = self._reference_of(sample) if self._job.task.loss.kl_beta else []
            if not all(math.isfinite(logprob) for logprob in (*logprobs, *reference)):
                broken[sample.trajectory] = NOT_FINITE
        return found, entropy, broken

    def _reference_of(self, sample: Sample) -> list[float]:
        """The base's logprobs, found once a job."""
        if sample.step_id not in self._reference:
            self._reference[sample.step_id] = self._model.logprobs(sample, base=True)[0]
        return self._reference[sample.step_id]

    def _gradient(
        self, samples: Sequence[Sample], logprobs: Sequence[list[float]]
    ) -> tuple[Sums, float, Arrays, dict[int, float]]:
        """What to log, the gradient's norm, and the gradient, sample by sample; and each trajectory's part in it."""
        loss = self._job.task.loss
        reference = [self._reference_of(sample) for sample in samples] if loss.kl_beta else None
        slope_P, sums = slopes(logprobs, LossInputs.of(samples, loss, reference=reference), loss)
        parts = _split(slope_P, samples)
        masses = _masses(parts, samples)
        found_scales = scales([*masses.values()], most_share(self._job.min_trajectories))
        scale = dict(zip(masses, found_scales, strict=True))
        total = {name: mx.zeros_like(array) for name, array in self._learned.items()}
        for sample, part in zip(samples, parts, strict=True):
            if bool((part != 0).any().item()):  # also where it is NaN
                found = self._model.gradient(sample, part * scale[sample.trajectory], self._learned)
                total = {name: array + found[name] for name, array in total.items()}
                mx.eval(list(total.values()))
        norm: Any = mx.sqrt(mx.stack([mx.square(array).sum() for array in total.values()]).sum())
        return sums, float(norm.item()), total, {at: mass * scale[at] for at, mass in masses.items()}

    def _apply(self, gradient: Arrays, norm: float) -> None:
        """AdamW's step on the gradient, cut to CLIP_NORM; without a finite one nothing moves."""
        if not math.isfinite(norm):
            return
        cut = min(1.0, CLIP_NORM / (norm + 1e-6))
        gradient = {name: array * cut for name, array in gradient.items()}
        self._learned = self._optimizer.apply_gradients(gradient, self._learned)
        mx.eval(list(self._tensors().values()))
        self._model.put(self._learned)

    def _tensors(self) -> Arrays:
        state: Any = self._optimizer.state
        moments = {f"{part}/{name}": state[name][part] for name in self._learned for part in ("m", "v")}
        return {f"learned/{name}": array for name, array in self._learned.items()} | moments | {"step": state["step"]}

    def _restore(self, tensors: Arrays) -> None:
        self._learned = {name: tensors[f"learned/{name}"] for name in self._learned}
        for name in self._learned:
            self._optimizer.state[name] = {part: tensors[f"{part}/{name}"] for part in ("m", "v")}
        self._optimizer.state["step"] = tensors["step"]


def _split(slope_P: Any, samples: Sequence[Sample]) -> list[Any]:
    """slope_P of each sample."""
    found, at = list[Any](), 0
    for sample in samples:
        found.append(slope_P[at : at + len(sample.trained)])
        at += len(sample.trained)
    return found


def _masses(parts: Sequence[Any], samples: Sequence[Sample]) -> dict[int, float]:
    """The sum of the absolute slopes of each trajectory."""
    found = dict[int, float]()
    for sample, part in zip(samples, parts, strict=True):
        mass: Any = mx.abs(part).sum()
        found[sample.trajectory] = found.get(sample.trajectory, 0.0) + float(mass.item())
    return found


def _more(before: dict[str, float], added: dict[str, float]) -> dict[str, float]:
    return before | {name: before.get(name, 0.0) + number for name, number in added.items()}
