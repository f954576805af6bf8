"""What an optimizer step learns from, on the server and at home: batches of trajectories, rewards, advantages.

Knows no model, tensor or hint.
"""

import hashlib
import math
import random
import struct
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

import msgspec

from clawloop_shared.advantages import Advantages, Key, Raw, Rewarded, rescale, returns_to_go
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Sample
from clawloop_shared.signals import FACTORS, OTHER, RewardRules, account_of, step_rewards

OPENING_TOKENS = 64
"""of a first prompt: what an agent's system text begins with tells one kind of work from another"""


class LessonSettings(Protocol):
    """What decides how trajectories become lessons; the server's `[train]` has them all."""

    @property
    def batch_trajectories(self) -> int: ...

    @property
    def credit(self) -> str: ...

    @property
    def discount(self) -> float: ...

    @property
    def reward_low(self) -> float: ...

    @property
    def reward_high(self) -> float: ...


class Place(msgspec.Struct, frozen=True):
    """Where a reward belongs: a trajectory of the update, one of its steps (None: all), and what part of the
    trajectory's confidence is its own."""

    trajectory: int
    step: int | None = None
    part: float = 1.0


def batches(usable: Sequence[Trajectory], settings: LessonSettings, *, seed: str) -> list[list[Trajectory]]:
    """All of them, in updates of about `batch_trajectories` each, as equal as whole groups allow: no group is split,
    and one that is larger than an update makes a larger update. The same in whatever order they are given."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(usable, key=lambda t: t.trajectory_id):
        name = f"group {trajectory.group_id}" if trajectory.group_id else trajectory.trajectory_id
        groups.setdefault(name, []).append(trajectory)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    found: list[list[Trajectory]] = [[] for _ in range(math.ceil(len(usable) / settings.batch_trajectories))]
    for group in sorted(shuffled, key=len, reverse=True):  # the largest first, each where there is least
        min(found, key=len).extend(group)
    return [batch for batch in found if batch]


def rewards_of(
    batch: Sequence[Trajectory], settings: LessonSettings, *, rules: RewardRules
) -> tuple[list[Place], list[Rewarded]]:
    """What the baseline sees of an update, and where each belongs.

    By `credit = "trajectory"` that is the reward of each trajectory in [0, 1]; by `"step"` the return of each step
    after which something was judged, in units of the range of rewards: not shifted, so that a step of which nothing was
    said adds nothing.
    """
    low, high = settings.reward_low, settings.reward_high
    places, rewarded = list[Place](), list[Rewarded]()
    for index, trajectory in enumerate(batch):
        key, group = key_of(trajectory), trajectory.group_id
        if settings.credit == "trajectory":
            places.append(Place(index))
            reward = rescale(trajectory.reward, low=low, high=high)
            rewarded.append(Rewarded(reward, confidence=trajectory.weight, key=key, group=group))
            continue
        judged = [
            (min(high, max(low, reward.value)) / (high - low), reward.weight) if reward else None
            for reward in step_rewards(trajectory, rules)
        ]
        for at, found in enumerate(returns_to_go(judged, discount=settings.discount)):
            if found is not None:
                places.append(Place(index, at, min(1.0, found[1] / trajectory.weight)))
                rewarded.append(
                    Rewarded(found[0], confidence=found[1], key=key, group=group, position=at, trajectory=index)
                )
    return places, rewarded


def spread(
    batch: Sequence[Trajectory], places: Sequence[Place], values: Raw, *, hinted: Container[tuple[int, str]] = ()
) -> list[Raw]:
    """The advantage of each step of each trajectory. None for one that teaches nothing; 0 where
    something else is to: `hinted` are such, by the place of their trajectory and their id."""
    found: list[Raw] = [[None] * len(trajectory.steps) for trajectory in batch]
    for place, value in zip(places, values, strict=True):
        steps = range(len(found[place.trajectory])) if place.step is None else [place.step]
        for at in steps:
            found[place.trajectory][at] = None if value is None else value * place.part
    for index, trajectory in enumerate(batch):
        for at, step in enumerate(trajectory.steps):
            if found[index][at] is None and (index, step.step_id) in hinted:
                found[index][at] = 0.0
    return found


def key_of(trajectory: Trajectory) -> Key:
    """What the tracker compares a trajectory with: others of its device, and of these those whose first prompt begins
    the same. Both are known before anything was sampled, which a baseline must be; hashes, so that a checkpoint names
    nobody.
    """
    device = hashlib.sha256(f"device {trajectory.device_id}".encode()).hexdigest()[:12]
    opening = trajectory.steps[0].prompt_ids[:OPENING_TOKENS]
    if len(opening) < OPENING_TOKENS:
        return (device,)
    return device, hashlib.sha256(struct.pack(f">{OPENING_TOKENS}I", *opening)).hexdigest()[:12]


def advantage_metrics(found: Advantages) -> dict[str, float]:
    """Mean and deviation of the advantages, and how many groups there were."""
    values = [value for value in found.values if value is not None]
    mean = sum(values) / max(1, len(values))
    return {
        "advantage_mean": mean,
        "advantage_std": math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values))),
        "groups": float(found.groups),
        "flat_groups": float(found.flat),
    }


def length_metrics(samples: Iterable[Sample]) -> dict[str, float]:
    """Mean trained tokens of the calls that are encouraged, and of those that are discouraged; 0 where there is
    none."""
    tokens, calls = Counter[str](), Counter[str]()
    for sample in samples:
        direction = sum(sample.advantages)
        name = "length_positive" if direction > 0 else "length_negative" if direction < 0 else ""
        tokens[name] += len(sample.trained)
        calls[name] += 1
    return {name: tokens[name] / max(1, calls[name]) for name in ("length_positive", "length_negative")}


def source_metrics(batch: Sequence[Trajectory], rules: RewardRules) -> dict[str, float]:
    """Mean of what each source says, over the trajectories it speaks of. Sources without a factor of their own are one:
    their names are the devices'."""
    heard: dict[str, list[float]] = {}
    for trajectory in batch:
        for voice in account_of(trajectory.signals, rules).voices:
            known = voice.source in FACTORS or voice.source in rules.weights
            heard.setdefault(voice.source if known else OTHER, []).append(voice.value)
    return {f"reward/{source}": sum(values) / len(values) for source, values in sorted(heard.items())}
