"""What must have come of the runs, and whether it did. Pure functions of outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from federate_check.attacked import DEFAULT, PLAIN, Attacked
from federate_check.together import OneWorld, TwoWorlds

NEAR = 0.05
"""as near as the issue asks; two standard errors of the 384 sampled episodes of a score"""
LEARNED = 0.1
"""what a cycle without attack must gain at least: else an attack could harm nothing"""
HARMED = 0.1
"""what an attack that is said to succeed must cost at least, beside the same without defence and without an attack"""
FAILED = 0.25
"""what one adapter for two worlds must cost at least beside pooled training of each"""
SUCCEED = {
    "nan": PLAIN,
    "huge": "none",
    "flip-10": "none",
    "flip": "none",
    "sybils-4": "none",
    "sybils-100": "none",
    "misfit": PLAIN,
    "harm": PLAIN,
}
"""attacks that must succeed where there is no defence, and what shows it: numbers that are not finite, layers that do
not fit and what a device says of itself are looked at by every joined round, so that a plain mean shows these"""
BY_OTHERS = {"harm": "multi-krum"}
"""what `gate` is not asked to tell: four devices that learned well in another world, which no cosine tells from honest
ones of rare work; who fears them takes this defence"""


FIRST_SUCCEED = ("flip", "flip-10")
"""attacks that must succeed where the round is of the attackers and one more, since these are the majority there"""


@dataclass(frozen=True)
class Verdict:
    """A demand on a part, what was found, and whether it holds."""

    part: str
    demand: str
    found: str
    holds: bool


def judge(
    attacks: Sequence[Attacked], ones: Sequence[OneWorld], twos: Sequence[TwoWorlds], *, near: float = NEAR
) -> list[Verdict]:
    """Every demand on everything that ran."""
    return [
        *(verdict for run in attacks for verdict in _attacked(run, near)),
        *(verdict for run in ones for verdict in _one(run, near)),
        *(verdict for run in twos for verdict in _two(run, near)),
    ]


def _attacked(run: Attacked, near: float) -> list[Verdict]:
    free, part = run.free[DEFAULT], f"attacks, seed {run.seed}"
    verdicts = [
        Verdict(
            part,
            f"a cycle without attack gains at least {LEARNED:g}",
            f"{run.before:.3f} -> {free:.3f}",
            free >= run.before + LEARNED,
        )
    ]
    for attack, found in run.found.items():
        by = BY_OTHERS.get(attack, DEFAULT)
        got, usual = found[by], run.free[by]
        verdicts.append(
            Verdict(
                part,
                f"{attack}: with {by} within {near:g} of {usual:.3f}, or refused",
                _told(got),
                got is None or got >= usual - near,
            )
        )
        if attack in SUCCEED:
            bare = found[SUCCEED[attack]]
            verdicts.append(
                Verdict(
                    part,
                    f"{attack}: succeeds with {SUCCEED[attack]}: at least {HARMED:g} lost",
                    _told(bare, "no adapter at all"),
                    bare is None or bare <= run.free["none"] - HARMED,
                )
            )
    return [*verdicts, *_first(run, near)]


def _first(run: Attacked, near: float) -> list[Verdict]:
    """What must come of it where those that attack answer first."""
    part, verdicts = f"attackers first, seed {run.seed}", list[Verdict]()
    for attack, got in run.first.items():
        if attack not in BY_OTHERS:
            demand = f"{attack}: with the server's buffer within {near:g} of {run.free_first:.3f}, or refused"
            holds = got is None or got >= run.free_first - near
            verdicts.append(Verdict(part, demand, _told(got), holds))
        if attack in FIRST_SUCCEED:
            few = run.few[attack]
            demand = f"{attack}: succeeds with one honest device beside them: at least {HARMED:g} lost"
            holds = few is None or few <= run.free_first - HARMED
            verdicts.append(Verdict(part, demand, _told(few, "no adapter at all"), holds))
    return verdicts


def _told(score: float | None, refused: str = "refused") -> str:
    return refused if score is None else f"{score:.3f}"


def _one(run: OneWorld, near: float) -> list[Verdict]:
    part = f"one world, seed {run.seed}"
    return [
        Verdict(
            part,
            f"six devices' {what} come within {near:g} of pooled training",
            f"{got:.3f} beside {run.pooled:.3f}",
            got >= run.pooled - near,
        )
        for what, got in (("deltas", run.deltas), ("trajectories", run.trajectories))
    ] + [
        Verdict(
            part,
            f"one of them alone does not: at least {FAILED:g} below",
            f"{run.alone:.3f} beside {run.pooled:.3f}",
            run.alone <= run.pooled - FAILED,
        )
    ]


def _two(run: TwoWorlds, near: float) -> list[Verdict]:
    part = f"two worlds, seed {run.seed}"
    worst, pooled = min(run.shared), dict(zip(run.shared, run.pooled, strict=True))
    wanted = [[f"device-{n}" for n in range(first, 6, 2)] for first in (0, 1)]
    verdicts = [
        Verdict(
            part,
            f"one adapter for both fails: at least {FAILED:g} below pooled training of a world",
            f"{run.shared[0]:.3f} and {run.shared[1]:.3f} beside {run.pooled[0]:.3f} and {run.pooled[1]:.3f}",
            worst <= pooled[worst] - FAILED,
        ),
        Verdict(
            part,
            "the cohorts that are found are the two worlds",
            f"{run.cohorts} after {run.found_after} rounds" if run.cohorts else "none found",
            sorted(run.cohorts) == wanted,
        ),
    ]
    for name, apart, alone in zip(("one", "the other"), run.apart, run.pooled, strict=True):
        verdicts.append(
            Verdict(
                part,
                f"apart, {name} comes within {near:g} of pooled training",
                f"{apart:.3f} beside {alone:.3f}",
                apart >= alone - near,
            )
        )
    return verdicts
