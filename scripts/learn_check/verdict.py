"""What must have come of the runs, and whether it did. Pure functions of outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from learn_check.experiment import Outcome

MOST_BEFORE, LEAST_AFTER, NOISE, LEAST_LOST = 0.35, 0.75, 0.05, 0.3
"""`NOISE` is two standard errors of the 384 sampled episodes of a score at .25; `LEAST_LOST`: what ignoring the ratio
must cost, beside the same data with it"""
CORRECTED = "stale-10"
"""what `ignored` is but for the ratio"""
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
_GAINS_NOTHING = _Demand(
    f"gains nothing: at most {NOISE} more than before",
    lambda o: o.after.highest <= o.before.highest + NOISE,
    lambda o: f"{o.before.highest:.3f} -> {o.after.highest:.3f}",
)
_IS_EXACT = _Demand(
    f"no mismatch where nothing is stale: k3 of each update below {EXACT_K3:g}",
    lambda o: o.largest_k3 < EXACT_K3,
    lambda o: f"{o.largest_k3:.1e}",
)
_IS_NOT_REFUSED = _Demand(
    "the guards refuse none of its rounds",
    lambda o: not o.refused_rounds,
    lambda o: f"{len(o.refused_rounds)} refused, the first because {o.refused_rounds[0]}",
)
_DEMANDS = {
    "fresh": (_KNOWS_NOTHING, _LEARNS, _IS_NOT_REFUSED),
    "same-base": (_KNOWS_NOTHING, _LEARNS, _IS_NOT_REFUSED, _IS_EXACT),
    "stale-10": (_KNOWS_NOTHING, _LEARNS, _IS_NOT_REFUSED),
    "stale-30": (_KNOWS_NOTHING, _LEARNS, _IS_NOT_REFUSED),
    "ignored": (_GAINS_NOTHING,),
    "shuffled": (_GAINS_NOTHING,),
}


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Every demand on the variants that ran, in the order of the variants. What `ignored` lost is judged where
    `stale-10` ran too."""
    by_variant: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_variant.setdefault(outcome.variant, []).append(outcome)
    verdicts = []
    for name, ran in by_variant.items():
        for demand in _DEMANDS[name]:
            failed = {o.seed: demand.found(o) for o in ran if not demand.holds(o)}
            verdicts.append(Verdict(name, demand.says, failed))
        if name == "ignored" and CORRECTED in by_variant:
            verdicts.append(_loses(ran, by_variant[CORRECTED]))
    return verdicts


def _loses(ignored: Sequence[Outcome], corrected: Sequence[Outcome]) -> Verdict:
    """Whether ignoring the ratio cost something, seed by seed: its best beside the worst of what does not."""
    best = {o.seed: o.after.highest for o in ignored}
    worst = {o.seed: o.after.lowest for o in corrected}
    failed = {
        seed: f"{found:.3f} beside {worst[seed]:.3f}" if seed in worst else f"{CORRECTED} has not run"
        for seed, found in best.items()
        if seed not in worst or found > worst[seed] - LEAST_LOST
    }
    return Verdict("ignored", f"ends at least {LEAST_LOST} below {CORRECTED} of the same seed", failed)
