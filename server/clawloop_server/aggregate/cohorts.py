"""Which devices should learn apart: found from how their updates agreed over several rounds. Pure and deterministic.

Two updates conflict where their cosine is below zero: what helps one harms the other. One round says little of that, so
the cosine of each pair is averaged over rounds, and a split must be found in several rounds in a row. Average-linkage
clustering joins the two groups that agree most until all that are left conflict; nothing is random. Knows no layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import TypeVar

import msgspec

from clawloop_server.aggregate.account import Account
from clawloop_server.aggregate.settings import FederateSettings

MEMORY = 2
"""rounds that a running mean looks back on. What is learned first agrees (the form of an answer), so a longer memory
finds a conflict later, when more has been unlearned; that it lasts is for `conflict_rounds` to say"""
AGREED = 0.5
HISTORY = 32
"""rounds that are looked back on for where cohorts should begin"""

Groups = tuple[tuple[str, ...], ...]
_Value = TypeVar("_Value")


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
    with, the last one beside which they still agreed. What came after it is a compromise that serves nobody, and a
    policy that is sure of the wrong tool tries no other (docs/log.md)."""

    devices: frozenset[str]
    why: str
    since: int = 0


def update(evidence: Evidence, account: Account, *, settings: FederateSettings, version: int = 0) -> Evidence:
    """The evidence with that of one more round, which began with adapter `version`."""
    pairs = {x: dict(known) for x, known in evidence.pairs.items()}
    for x, found in account.conflict.items():
        for y, cosine in found.items():
            pairs.setdefault(x, {})[y] = _seen(pairs.get(x, {}).get(y), cosine)
    split = split_of(pairs, settings)
    history = (*evidence.history, Seen(version, account.conflict))[-HISTORY:]
    if not split:
        return Evidence(pairs=pairs, history=history)
    told = set(account.conflict) | {y for found in account.conflict.values() for y in found}
    goes_on = evidence.rounds > 0 and _agrees(split, evidence.split)
    counts = _bears_on(split, told) or split != evidence.split
    rounds = evidence.rounds + int(counts) if goes_on else 1
    return Evidence(pairs=pairs, split=split, rounds=rounds, history=history)


def without(evidence: Evidence, device: str) -> Evidence:
    """The evidence without a device that has left."""
    return Evidence(
        pairs=_leaving(evidence.pairs, device),
        split=tuple(tuple(name for name in group if name != device) for group in evidence.split),
        rounds=evidence.rounds,
        history=tuple(Seen(seen.version, _leaving(seen.cosines, device)) for seen in evidence.history),
    )


def _leaving(pairs: Mapping[str, Mapping[str, _Value]], device: str) -> dict[str, dict[str, _Value]]:
    found = {x: {y: value for y, value in known.items() if y != device} for x, known in pairs.items() if x != device}
    return {x: known for x, known in found.items() if known}


def find(evidence: Evidence, settings: FederateSettings) -> list[Cohort]:
    """The cohorts, the largest first, once `conflict_rounds` rounds in a row said the same; none before, or if off.

    A device that is in none of them stays with the first.
    """
    if settings.cohorts == "off" or evidence.rounds < settings.conflict_rounds:
        return []
    means, since = _means(evidence.pairs), _last_agreement(evidence)
    return [Cohort(frozenset(group), _why(group, evidence, means), since) for group in evidence.split]


def split_of(pairs: Mapping[str, Mapping[str, Pair]], settings: FederateSettings) -> Groups:
    """Groups of devices that conflict by the means as they are now, the largest first; empty: no two do.

    A group too small for a round of its own (`min_devices`, and at least 2) is none.
    """
    means = _means(pairs)
    groups: list[tuple[str, ...]] = [(device,) for device in sorted({device for pair in means for device in pair})]
    while len(groups) > 1:
        agreement = {
            (x, y): found
            for x, y in combinations(range(len(groups)), 2)
            if (found := _between(groups[x], groups[y], means)) is not None
        }
        if not agreement:
            break
        x, y = max(agreement, key=lambda at: (agreement[at], -at[0], -at[1]))
        if agreement[x, y] >= settings.conflict_cosine:
            merged = tuple(sorted(groups[x] + groups[y]))
            groups = sorted([group for n, group in enumerate(groups) if n not in (x, y)] + [merged])
        else:
            break
    large = [group for group in groups if len(group) >= max(2, settings.min_devices)]
    large.sort(key=lambda group: (-len(group), group))
    return tuple(large) if len(large) > 1 else ()


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


def _bears_on(split: Groups, told: set[str]) -> bool:
    """Whether a round that compared these devices says anything of the split: it had devices of two of its groups."""
    return sum(bool(told & set(group)) for group in split) > 1


def _agrees(split: Groups, before: Groups) -> bool:
    """Whether devices that were together are together, and devices that were apart are apart, where both know them."""
    was = {device: n for n, group in enumerate(before) for device in group}
    now = {device: n for n, group in enumerate(split) for device in group}
    both = sorted(was.keys() & now.keys())
    return bool(both) and all((was[x] == was[y]) == (now[x] == now[y]) for x, y in combinations(both, 2))


def _last_agreement(evidence: Evidence) -> int:
    """The newest version beside which devices of different groups agreed at least `AGREED` times as much as those of
    one; the oldest that is known, if beside none."""
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
        if found[True] and found[False] and fmean(found[False]) >= AGREED * max(0.0, fmean(found[True])):
            return seen.version
    return min((seen.version for seen in evidence.history), default=0)


def _why(group: Sequence[str], evidence: Evidence, means: Mapping[tuple[str, str], float]) -> str:
    inside = [means[pair] for pair in combinations(sorted(group), 2) if pair in means]
    others = [other for other in evidence.split if tuple(other) != tuple(group)]
    against = [found for other in others if (found := _between(group, other, means)) is not None]
    return (
        f"in {evidence.rounds} rounds in a row the updates of these {len(group)} devices agreed with each other (mean"
        f" cosine {fmean(inside):.2f}) and went against those of {sum(map(len, others))} others ({min(against):.2f}):"
        " one adapter cannot serve both"
    )
