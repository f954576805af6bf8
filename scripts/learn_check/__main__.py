"""`python -m learn_check`: does the trainer learn from a quantised device that lags behind, and only from true rewards?

A small model is taught the form of an episode, but not which tool answers which question; only rewards tell. A device
samples with 4-bit weights and the adapter that was last shipped to it. Each variant is run with each seed, and must do
what `verdict.py` demands of it. Exit code 0 if all did, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec
from rich.console import Console
from rich.table import Table

from learn_check.experiment import REACHED, VARIANTS, Outcome
from learn_check.runs import free_cores, run_all
from learn_check.verdict import Verdict, judge

UPDATES, QUICK_UPDATES = 120, 60
QUICK = ("fresh", "stale-10")


def main() -> int:
    """Run, print, judge; 0 if everything that was demanded came about."""
    given = _arguments()
    chosen = [variant for variant in VARIANTS if variant.name in given.variants]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="learn-check-") as folder:
        outcomes = run_all(Path(folder), chosen, seeds=given.seeds, updates=given.updates, jobs=given.jobs)
    verdicts = judge(outcomes)
    if given.json:
        report = {"outcomes": outcomes, "verdicts": [vars(verdict) for verdict in verdicts]}
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        show(outcomes, verdicts, seconds=time.perf_counter() - began)
    return 1 if any(verdict.failed for verdict in verdicts) else 0


def _arguments() -> argparse.Namespace:
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser(prog="scripts/learn-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--variants", nargs="+", choices=names, default=names, help="(all)")
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"of each run, a multiple of 30 ({UPDATES})")
    parser.add_argument("--jobs", type=int, default=free_cores(), help="processes at once (as many as cores are free)")
    parser.add_argument("--quick", action="store_true", help=f"seed 0, {QUICK_UPDATES} updates, {' and '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.variants, given.updates = [0], list(QUICK), QUICK_UPDATES
    if given.updates % 30 or given.updates < 1:
        parser.error(f"--updates {given.updates}: give a multiple of 30, so that every variant has whole rounds")
    return given


def show(outcomes: Sequence[Outcome], verdicts: Sequence[Verdict], *, seconds: float) -> None:
    """A table of the runs, and what was demanded of them."""
    console = Console(width=132, highlight=False)
    table = Table(title="held-out reward")
    for title in (
        "variant",
        "seed",
        "sampled",
        "by the device",
        "greedy",
        f"updates to {REACHED:g}",
        "k3",
        "kept",
        "gap",
    ):
        table.add_column(title, justify="left" if title == "variant" else "right")
    table.add_column("refused rounds", justify="right")
    for o in outcomes:
        table.add_row(
            o.variant,
            str(o.seed),
            f"{o.before.sampled:.3f} -> {o.after.sampled:.3f}",
            f"{o.before.device:.3f} -> {o.after.device:.3f}",
            f"{o.before.greedy:.2f} -> {o.after.greedy:.2f}",
            "never" if o.updates_to_reached is None else str(o.updates_to_reached),
            f"{o.k3:.1e}",
            f"{o.kept:.3f}",
            str(o.largest_version_gap),
            str(len(o.refused_rounds)),
        )
    console.print(table)
    for verdict in verdicts:
        missed = ", ".join(f"seed {seed}: {found}" for seed, found in verdict.failed.items())
        console.print(
            f"{'FAILED' if missed else 'ok':6}  {verdict.variant}: {verdict.demand}{'; ' + missed if missed else ''}"
        )
    each = fmean(outcome.seconds for outcome in outcomes)
    console.print(f"{len(outcomes)} runs of {outcomes[0].updates} updates in {seconds:.0f} s, each {each:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
