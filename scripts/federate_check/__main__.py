"""`python -m federate_check`: does one model learn from many devices, also where some lie and where worlds disagree?

Simulated devices learn at home with the trainer's own loss on a 4-bit base, and the server's own `join` makes one
adapter of their deltas. Twenty of which four attack; six with different tasks of one world; six in two worlds that
disagree. Exit code 0 if all that `verdict.py` demands came about, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from federate_check.attacked import DEFENCES, PLAIN, Attacked, attacked
from federate_check.attacks import ATTACKS
from federate_check.together import ROUNDS, ROUNDS_APART, OneWorld, TwoWorlds, one_world, two_worlds
from federate_check.verdict import Verdict, judge
from learn_check.runs import make_models, models_of

PARTS = ("attacks", "one-world", "two-worlds")
progress = Console(stderr=True, width=120, highlight=False)


def main() -> int:
    """Run, print, judge; 0 if everything that was demanded came about."""
    given = _arguments()
    began = time.perf_counter()
    attacks, ones, twos = list[Attacked](), list[OneWorld](), list[TwoWorlds]()
    with tempfile.TemporaryDirectory(prefix="federate-check-") as folder:
        for seed in given.seeds:
            device = models_of(Path(folder), make_models(Path(folder), seed)) / "device"
            _tell(began, f"seed {seed}: taught the base, and quantised it for the devices")
            if "attacks" in given.parts:
                attacks.append(attacked(device, seed=seed, attacks=given.attacks))
                _tell(began, f"seed {seed}: {len(given.attacks)} attacks")
            if "one-world" in given.parts:
                ones.append(one_world(device, seed=seed, rounds=given.rounds))
                _tell(began, f"seed {seed}: different tasks of one world")
            if "two-worlds" in given.parts:
                twos.append(two_worlds(device, seed=seed, rounds=given.rounds_apart))
                _tell(began, f"seed {seed}: two worlds that disagree")
    verdicts = judge(attacks, ones, twos)
    if given.json:
        report = {"attacks": attacks, "one_world": ones, "two_worlds": twos, "verdicts": [vars(v) for v in verdicts]}
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _show(attacks, ones, twos, verdicts)
        print(f"{time.perf_counter() - began:.0f} s")
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/federate-check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), help="(all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"in one world ({ROUNDS})")
    parser.add_argument("--rounds-apart", type=int, default=ROUNDS_APART, help=f"in two worlds ({ROUNDS_APART})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def _tell(began: float, what: str) -> None:
    progress.print(f"{time.perf_counter() - began:4.0f} s  {what}")


def _show(
    attacks: Sequence[Attacked], ones: Sequence[OneWorld], twos: Sequence[TwoWorlds], verdicts: Sequence[Verdict]
) -> None:
    """Tables of what was found, and each demand."""
    console = Console(width=132, highlight=False)
    for run in attacks:
        console.print(_attack_table(run))
    for one in ones:
        curve = " ".join(f"{score:.2f}" for score in one.curve)
        console.print(
            f"one world, seed {one.seed}: {one.before:.3f} before; by round {curve}; in the last rho {one.rho:.2f},"
            f" tail {one.tail:.2f}"
        )
    for two in twos:
        told = " ".join(f"{same:+.2f}/{across:+.2f}" for same, across in two.cosines)
        console.print(f"two worlds, seed {two.seed}: cosines within/across by round {told}")
        for why in two.why:
            console.print(f"  {why}")
    for verdict in verdicts:
        console.print(f"{'ok' if verdict.holds else 'FAILED':6}  {verdict.part}: {verdict.demand}: {verdict.found}")


def _attack_table(run: Attacked) -> Table:
    names = [*DEFENCES, PLAIN]
    table = Table(title=f"held-out reward after one cycle from {run.before:.3f}, 4 of 20 attack, seed {run.seed}")
    table.add_column("attack")
    for name in (*names, "attackers that gate let count", "attackers first", "and one more"):
        table.add_column(name, justify="right")
    table.add_row("nobody", *(f"{run.free[name]:.3f}" for name in DEFENCES), "", "", f"{run.free_first:.3f}", "")
    for attack, found in run.found.items():
        scores = (_told(found[name]) for name in names)
        table.add_row(attack, *scores, str(run.counted[attack]), _told(run.first[attack]), _told(run.few[attack]))
    return table


def _told(score: float | None) -> str:
    return "none" if score is None else f"{score:.3f}"


if __name__ == "__main__":
    sys.exit(main())
