"""Which devices should learn apart: found from how their updates agreed over several rounds. Pure and deterministic.

Two updates conflict where their cosine is below zero: what helps one harms the other. One round says little of that, so
the cosine of each pair is averaged over rounds, and a split must be found in several rounds in a row. Average-linkage
clustering joins the two groups that agree most until all that are left conflict; nothing is random. No single device
may make a split: it must be found without any one of them, too. Knows no layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_shared.files import sha256

MEMORY = 2
"""rounds that a running mean looks back on. What is learned first agrees (the form of an answer), so a longer memory
finds a conflict later, when more has been unlearned; that it lasts is for `conflict_rounds` to say"""
AGREED = 0.5
HISTORY = 32
"""rounds that are looked back on for where cohorts should begin"""
MOST_COMPARED = 256
"""devices that are compared: pairs grow with the square"""
REMEMBERED = 64
"""of these, the devices whose cosines of each round of the history are kept"""
FEW = 5
"""devices, of which two may be a cohort; of more it takes three, since two that lie together are soon found"""
WEIGHTY = 16
"""members of a group up to which one of them could make it: its part in each mean is at least a sixteenth"""
TAKEN_OUT = 32
"""devices without which a split must be found again, each by itself, those of the smallest groups first"""

Groups = tuple[tuple[str, ...], ...]
_Value = TypeVar("_Value")
_Name = TypeVar("_Name", str, int)


class Pair(msgspec.Struct, frozen=True):
    """The running mean of the cosine of two devices' updates, and how many rounds it is of (at most `MEMORY`)."""

    cosine: float
    rounds: int


class Seen(msgspec.Struct, frozen=True):
    """The cosines of one round, and the version of the adapter that it began with."""

    version: int
    cosines: dict[str, dict[str, float]]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of which devices agree. `pairs[x][y]` for devices x < y; `split` is what the last rounds said, the
    largest group first, and `rounds` how many in a row said it (0: they said none); `history` has the last rounds."""

    pairs: dict[str, dict[str, Pair]] = {}
    split: Groups = ()
    rounds: int = 0
    history: tuple[Seen, ...] = ()


class Cohort(msgspec.Struct, frozen=True):
    """Devices that should learn together, apart from the others, and why; `since`: the version of the adapter to begin
    with, the last one beside which they still agreed; where none is known, that of the last round, so that nobody goes
    back. What came after it is a compromise that serves nobody, and a policy that is sure of the wrong tool tries no
    other (docs/log.md). `part`: how much of all devices that were compared these are."""

    devices: frozenset[str]
    why: str
    since: int = 0
    part: float = 0.0


def compared(devices: Iterable[str], most: int = MOST_COMPARED) -> frozenset[str]:
    """Those of these devices that are compared: all, or so many, by hash, so that nobody chooses to be one."""
    found = set(devices)
    return frozenset(found if len(found) <= most else sorted(found, key=lambda name: sha256(name.encode()))[:most])


def update(evidence: Evidence, account: Account, *, settings: FederateSettings, version: int = 0) -> Evidence:
    """The evidence with that of one more round, which began with adapter `version`."""
    pairs = {x: dict(known) for x, known in evidence.pairs.items()}
    for x, found in account.conflict.items():
        for y, cosine in found.items():
            pairs.setdefault(x, {})[y] = _seen(pairs.get(x, {}).get(y), cosine)
    kept = compared(names_of(pairs))
    pairs = _among(pairs, kept)
    split = split_of(pairs, settings)
    seen = Seen(version, _among(account.conflict, compared(kept, REMEMBERED)))
    history = (*evidence.history, seen)[-HISTORY:]
    if not split:
        return Evidence(pairs=pairs, history=history)
    told = names_of(account.conflict)
    goes_on = evidence.rounds > 0 and _agrees(split, evidence.split)
    counts = _bears_on(split, told) or split != evidence.split
    rounds = evidence.rounds + int(counts) if goes_on else 1
    return Evidence(pairs=pairs, split=split, rounds=rounds, history=history)


def names_of(pairs: Mapping[str, Mapping[str, object]]) -> frozenset[str]:
    """The devices that a table of pairs knows."""
    return frozenset(pairs) | frozenset(y for known in pairs.values() for y in known)


def only(evidence: Evidence, devices: Collection[str]) -> Evidence:
    """The evidence of these devices, without any that has left."""
    if names_of(evidence.pairs) <= frozenset(devices):
        return evidence
    return Evidence(
        pairs=_among(evidence.pairs, devices),
        split=tuple(tuple(name for name in group if name in devices) for group in evidence.split),
        rounds=evidence.rounds,
        history=tuple(Seen(seen.version, _among(seen.cosines, devices)) for seen in evidence.history),
    )


def _among(pairs: Mapping[str, Mapping[str, _Value]], devices: Collection[str]) -> dict[str, dict[str, _Value]]:
    found = {x: {y: value for y, value in known.items() if y in devices} for x, known in pairs.items() if x in devices}
    return {x: known for x, known in found.items() if known}


def find(evidence: Evidence, settings: FederateSettings) -> list[Cohort]:
    """The cohorts, the largest first, once `conflict_rounds` rounds in a row said the same; none before, or if off.

    A device that is in none of them stays with the first.
    """
    if settings.cohorts == "off" or evidence.rounds < settings.conflict_rounds:
        return []
    means, since, known = _means(evidence.pairs), _last_agreement(evidence), len(names_of(evidence.pairs))
    return [
        Cohort(frozenset(group), _why(group, evidence, means), since, len(group) / known) for group in evidence.split
    ]


def split_of(pairs: Mapping[str, Mapping[str, Pair]], settings: FederateSettings) -> Groups:
    """Groups of devices that conflict by the means as they are now, the largest first; empty: no two do, or one device
    alone makes the difference.

    A group too small for a round of its own (`min_devices`) is none, nor is one of fewer than 3 devices (of 2 where at
    most `FEW` were compared).
    """
    devices, sums, counts = _matrices(pairs)
    least = max(2 if len(devices) <= FEW else 3, settings.min_devices)
    every = range(len(devices))
    groups = [group for group in _linked(sums, counts, every, settings.conflict_cosine) if len(group) >= least]
    if len(groups) < 2 or not _holds(groups, sums, counts, settings.conflict_cosine):
        return ()
    named = [tuple(devices[n] for n in group) for group in groups]
    return tuple(sorted(named, key=lambda group: (-len(group), group)))


_Matrix = NDArray[np.float64]


def _matrices(pairs: Mapping[str, Mapping[str, Pair]]) -> tuple[list[str], _Matrix, _Matrix]:
    """The devices in order, and of each two of them (N, N) the cosine, 0 where it is not known, and whether it is."""
    devices = sorted(names_of(pairs))
    at = {device: n for n, device in enumerate(devices)}
    sums, counts = np.zeros((len(devices), len(devices))), np.zeros((len(devices), len(devices)))
    for x, known in pairs.items():
        for y, pair in known.items():
            sums[at[x], at[y]] = sums[at[y], at[x]] = pair.cosine
            counts[at[x], at[y]] = counts[at[y], at[x]] = 1.0
    return devices, sums, counts


def _linked(sums: _Matrix, counts: _Matrix, at: Sequence[int], least: float) -> list[list[int]]:
    """Average linkage of these devices: the two groups whose pairs agree most are joined, until no two do by `least`.

    The mean between two groups is kept as its sum and its count (Lance and Williams, 1967), and of each group the one
    that it agrees with most, so that n devices take about n^2 steps, and n^3 at the very worst.
    """
    own = np.ix_(at, at)
    total, known = sums[own].copy(), counts[own].copy()
    np.fill_diagonal(known, 0.0)
    means = np.where(known > 0, total / np.maximum(known, 1.0), -np.inf)
    groups: dict[int, list[int]] = {n: [device] for n, device in enumerate(at)}
    nearest = means.argmax(axis=1) if len(at) else np.zeros(0, dtype=np.intp)
    best = means.max(axis=1, initial=-np.inf)
    while len(groups) > 1:
        x = int(best.argmax())
        if not best[x] >= least:
            break
        x, y = sorted((x, int(nearest[x])))
        groups[x] = sorted(groups[x] + groups.pop(y))
        total[x] += total[y]
        known[x] += known[y]
        known[x, x] = known[x, y] = 0.0
        total[:, x], known[:, x], known[y], known[:, y] = total[x], known[x], 0.0, 0.0
        means[x] = means[:, x] = np.where(known[x] > 0, total[x] / np.maximum(known[x], 1.0), -np.inf)
        means[y] = means[:, y] = -np.inf
        for n in {x, y, *np.flatnonzero((nearest == x) | (nearest == y) | (means[:, x] > best)).tolist()}:
            nearest[n], best[n] = means[n].argmax(), means[n].max()
    return list(groups.values())


def _holds(groups: Sequence[Sequence[int]], sums: _Matrix, counts: _Matrix, least: float) -> bool:
    """Whether the same is found without any one of the devices, as far as one of its group could make it."""
    weighty = sorted((len(group), n) for group in groups if len(group) <= WEIGHTY for n in group)
    for _, one in weighty[:TAKEN_OUT]:
        without = _linked(sums, counts, [n for n in range(len(sums)) if n != one], least)
        if not _agrees(without, [[n for n in group if n != one] for group in groups]):
            return False
    return True


def _seen(pair: Pair | None, cosine: float) -> Pair:
    if pair is None:
        return Pair(cosine, 1)
    rounds = min(pair.rounds + 1, MEMORY)
    return Pair(pair.cosine + (cosine - pair.cosine) / rounds, rounds)


def _means(pairs: Mapping[str, Mapping[str, Pair]]) -> dict[tuple[str, str], float]:
    return {(x, y): pair.cosine for x, known in pairs.items() for y, pair in known.items()}


def _between(group: Sequence[str], other: Sequence[str], means: Mapping[tuple[str, str], float]) -> float | None:
    """The mean cosine of the pairs between two groups that were ever compared; none: no pair was."""
    known = [means[pair] for x in group for y in other if (pair := (min(x, y), max(x, y))) in means]
    return fmean(known) if known else None


def _bears_on(split: Groups, told: Collection[str]) -> bool:
    """Whether a round that compared these devices says anything of the split: it had devices of two of its groups."""
    return sum(any(device in told for device in group) for group in split) > 1


def _agrees(split: Iterable[Iterable[_Name]], before: Iterable[Iterable[_Name]]) -> bool:
    """Whether devices that were together are together, and devices that were apart are apart, where both know them."""
    was = {device: n for n, group in enumerate(before) for device in group}
    now = {device: n for n, group in enumerate(split) for device in group}
    both = {(was[device], now[device]) for device in was.keys() & now.keys()}
    return bool(both) and len({a for a, _ in both}) == len({b for _, b in both}) == len(both)


def _last_agreement(evidence: Evidence) -> int:
    """The newest version beside which devices of different groups agreed at least `AGREED` times as much as those of
    one; that of the last round, if it is known of none: devices that never agreed with the others, as those that lie
    do, take nobody back."""
    group = {device: n for n, members in enumerate(evidence.split) for device in members}
    for seen in reversed(evidence.history):
        found = {
            same: [
                cosine
                for x, known in seen.cosines.items()
                for y, cosine in known.items()
                if x in group and y in group and (group[x] == group[y]) == same
            ]
            for same in (True, False)
        }
        if found[True] and found[False] and fmean(found[False]) >= max(0.0, AGREED * fmean(found[True])):
            return seen.version
    return evidence.history[-1].version if evidence.history else 0


def _why(group: Sequence[str], evidence: Evidence, means: Mapping[tuple[str, str], float]) -> str:
    inside = [means[pair] for pair in combinations(sorted(group), 2) if pair in means]
    others = [other for other in evidence.split if tuple(other) != tuple(group)]
    against = [found for other in others if (found := _between(group, other, means)) is not None]
    return (
        f"in {evidence.rounds} rounds in a row the updates of these {len(group)} devices agreed with each other (mean"
        f" cosine {fmean(inside):.2f}) and went against those of {sum(map(len, others))} others ({min(against):.2f}):"
        " one adapter cannot serve both"
    )
