"""Six devices that learn together: with different tasks of one world, and in two worlds that disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean

import msgspec

from clawloop_server.aggregate.cohorts import Cohort, Evidence, find, update
from clawloop_server.aggregate.round import Account, join
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import Contribution, Update
from federate_check.home import Home
from federate_check.pooled import Pooled
from learn_check import world

BATCH, UPDATES, RANK = 24, 10, 16
ROUNDS, ROUNDS_APART = 10, 16
SETTINGS = FederateSettings()

Tasks = Sequence[world.Task]
OTHER = [world.Task(task.kind, task.thing, other=True) for task in world.TRAIN]
OTHER_HELD_OUT = [world.Task(task.kind, task.thing, other=True) for task in world.HELD_OUT]


class OneWorld(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out rewards of six devices, each of which is asked two of the four kinds of question. `trajectories`: the
    server learned from what they sampled; `pooled`: from as much of one that is asked everything; `curve`: of `deltas`,
    by round; `alone`: of one of them that learned alone."""

    seed: int
    before: float
    deltas: float
    trajectories: float
    pooled: float
    alone: float
    curve: list[float]
    rho: float
    tail: float


class TwoWorlds(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out rewards (one world, the other) of three devices in each: with one adapter for all, with the cohorts that
    were found, and of pooled training of each world alone; all of as many updates.

    `found_after`: rounds until the cohorts were found (none: never, and `apart` is what was shared).
    """

    seed: int
    shared: tuple[float, float]
    apart: tuple[float, float]
    pooled: tuple[float, float]
    cohorts: list[list[str]]
    found_after: int | None
    why: list[str]
    cosines: list[tuple[float, float]]
    """by round: the mean cosine of two devices of a world, and of two of different worlds"""


@dataclass
class _Line:
    """An adapter that some devices learn together, and how it came about."""

    base: Update = field(default_factory=dict)
    rounds: int = 0
    settings: FederateSettings = SETTINGS

    def go_on(self, home: Home, parts: Mapping[str, Tasks], *, seed: int) -> Account:
        """One more round of these devices."""
        drawn = 10_000 * (seed + 1) + 100 * self.rounds
        home.serve(self.base)
        sent = [
            Contribution(f"delta-{n}", device, home.learn(tasks, updates=UPDATES, seed=drawn + n, drawn=drawn), 240.0)
            for n, (device, tasks) in enumerate(parts.items())
        ]
        joined = join(self.base, sent, settings=self.settings, rank=RANK, seed=self.rounds)
        self.base = joined.factors
        self.rounds += 1
        home.serve(self.base)
        return joined.account


def one_world(folder: Path, *, seed: int, rounds: int = ROUNDS) -> OneWorld:
    """Deltas of six devices beside pooled training of as many updates on as much."""
    home = Home(folder, batch=BATCH)
    parts = {
        f"device-{n}": [task for task in world.TRAIN if task.kind in kinds]
        for n, kinds in enumerate(combinations(range(world.KINDS), 2))
    }
    home.serve({})
    before = home.score(world.HELD_OUT)
    line, curve = _Line(), list[float]()
    for _ in range(rounds):
        account = line.go_on(home, parts, seed=seed)
        curve.append(home.score(world.HELD_OUT))
    alone = _Line(settings=msgspec.structs.replace(SETTINGS, min_devices=1))
    for _ in range(rounds):
        alone.go_on(home, {"device-0": parts["device-0"]}, seed=seed)
    return OneWorld(
        seed=seed,
        before=before,
        deltas=curve[-1],
        trajectories=_pooled(folder, list(parts.values()), world.HELD_OUT, seed=seed, rounds=rounds),
        pooled=_pooled(folder, [world.TRAIN] * len(parts), world.HELD_OUT, seed=seed + 50, rounds=rounds),
        alone=home.score(world.HELD_OUT),
        curve=curve,
        rho=account.rho,
        tail=account.tail,
    )


def two_worlds(folder: Path, *, seed: int, rounds: int = ROUNDS_APART) -> TwoWorlds:
    """One adapter for all, and what comes of the cohorts that are found on the way; each of as many rounds."""
    home, parts = Home(folder, batch=BATCH), two_sides()
    found = search(home, parts, seed=seed, rounds=rounds)
    line = found.line
    shared = _scores(home, dict.fromkeys(parts, line.base), parts)
    adapters = dict.fromkeys(parts, line.base)
    for cohort in found.cohorts:
        own = {device: tasks for device, tasks in parts.items() if device in cohort.devices}
        apart = _Line(found.versions[cohort.since], cohort.since)
        while apart.rounds < rounds:
            apart.go_on(home, own, seed=seed)
        adapters |= dict.fromkeys(own, apart.base)
    return TwoWorlds(
        seed=seed,
        shared=shared,
        apart=_scores(home, adapters, parts),
        pooled=(
            _pooled(folder, [world.TRAIN] * 3, world.HELD_OUT, seed=seed, rounds=rounds),
            _pooled(folder, [OTHER] * 3, OTHER_HELD_OUT, seed=seed, rounds=rounds),
        ),
        cohorts=[sorted(cohort.devices) for cohort in found.cohorts],
        found_after=found.after,
        why=[cohort.why for cohort in found.cohorts],
        cosines=found.cosines,
    )


@dataclass
class Found:
    """What a shared line of rounds told of its devices: the cohorts, after how many rounds (none: never), the cosines
    of each round, and each version of the adapter."""

    line: _Line
    versions: list[Update]
    cohorts: list[Cohort] = field(default_factory=list)
    after: int | None = None
    cosines: list[tuple[float, float]] = field(default_factory=list)


def two_sides() -> dict[str, Tasks]:
    """Six devices, every other one in the other world."""
    return {f"device-{n}": world.TRAIN if n % 2 == 0 else OTHER for n in range(6)}


def search(home: Home, parts: Mapping[str, Tasks], *, seed: int, rounds: int, until_found: bool = False) -> Found:
    """Rounds of all these devices together, and what the server finds on the way."""
    line, evidence = _Line(), Evidence()
    found = Found(line, [line.base])
    for number in range(rounds):
        account = line.go_on(home, parts, seed=seed)
        found.versions.append(line.base)
        found.cosines.append(_cosines(account, parts))
        evidence = update(evidence, account, settings=SETTINGS, version=number)
        if found.after is None and (cohorts := find(evidence, SETTINGS)):
            found.cohorts, found.after = cohorts, number + 1
            if until_found:
                break
    return found


def _pooled(folder: Path, parts: Sequence[Tasks], held_out: Tasks, *, seed: int, rounds: int) -> float:
    learner = Pooled(folder, batch=BATCH * len(parts), updates=UPDATES, rank=RANK)
    for number in range(rounds):
        learner.round(parts, seed=1000 * seed + number)
    return learner.score(held_out)


def _scores(home: Home, adapters: Mapping[str, Update], parts: Mapping[str, Tasks]) -> tuple[float, float]:
    """The mean reward of the devices of each world with what they serve."""
    found: dict[bool, list[float]] = {False: [], True: []}
    known: dict[tuple[int, bool], float] = {}
    for device, adapter in adapters.items():
        other = parts[device][0].other
        if (id(adapter), other) not in known:
            home.serve(adapter)
            known[id(adapter), other] = home.score(OTHER_HELD_OUT if other else world.HELD_OUT)
        found[other].append(known[id(adapter), other])
    return fmean(found[False]), fmean(found[True])


def _cosines(account: Account, parts: Mapping[str, Tasks]) -> tuple[float, float]:
    pairs = [(x, y, cosine) for x, found in account.conflict.items() for y, cosine in found.items()]
    same = [cosine for x, y, cosine in pairs if parts[x][0].other == parts[y][0].other]
    return fmean(same), fmean(cosine for x, y, cosine in pairs if parts[x][0].other != parts[y][0].other)
