"""What must have come of the runs, and whether it did. Pure functions of outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from learn_check.experiment import Outcome

MOST_BEFORE, LEAST_AFTER, NOISE = 0.35, 0.75, 0.05
"""`NOISE` is two standard errors of the 384 sampled episodes of a score at .25"""
EXACT_K3 = 1e-6


@dataclass(frozen=True)
class Verdict:
    """A demand on a variant, the seeds that did not meet it (empty: all did), and what they had."""

    variant: str
    demand: str
    failed: dict[int, str]


@dataclass(frozen=True)
class _Demand:
    says: str
    holds: Callable[[Outcome], bool]
    found: Callable[[Outcome], str]


_KNOWS_NOTHING = _Demand(
    f"at most {MOST_BEFORE} before, by learner and device",
    lambda o: o.before.highest <= MOST_BEFORE,
    lambda o: f"{o.before.highest:.3f}",
)
_LEARNS = _Demand(
    f"at least {LEAST_AFTER} after, by learner and device",
    lambda o: o.after.lowest >= LEAST_AFTER,
    lambda o: f"{o.after.lowest:.3f}",
)
_FAILS = _Demand(
    f"fails: at most {MOST_BEFORE} after",
    lambda o: o.after.highest <= MOST_BEFORE,
    lambda o: f"{o.after.highest:.3f}",
)
_GAINS_NOTHING = _Demand(
    f"gains nothing: at most {NOISE} more than before",
    lambda o: o.after.highest <= o.before.highest + NOISE,
    lambda o: f"{o.before.highest:.3f} -> {o.after.highest:.3f}",
)
_IS_EXACT = _Demand(
    f"no mismatch where nothing is stale: k3 of the first update below {EXACT_K3:g}",
    lambda o: o.first_k3 < EXACT_K3,
    lambda o: f"{o.first_k3:.1e}",
)
_DEMANDS = {
    "fresh": (_KNOWS_NOTHING, _LEARNS),
    "same-base": (_KNOWS_NOTHING, _LEARNS, _IS_EXACT),
    "stale-10": (_KNOWS_NOTHING, _LEARNS),
    "stale-30": (_KNOWS_NOTHING, _LEARNS),
    "ignored": (_FAILS,),
    "shuffled": (_GAINS_NOTHING,),
}


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Every demand on the variants that ran, in the order of the variants."""
    by_variant: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_variant.setdefault(outcome.variant, []).append(outcome)
    return [
        Verdict(name, demand.says, {o.seed: demand.found(o) for o in ran if not demand.holds(o)})
        for name, ran in by_variant.items()
        for demand in _DEMANDS[name]
    ]
