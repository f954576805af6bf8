"""`privacy budget`: what the noised deltas of this device have cost, and whether more of them would be of use."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_edge.cli.context import Json, console, home_of, opened_pool, print_json, print_table, shown
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.pool.store import Pool

ADAPTER_WEIGHTS = 100_000
"""of a small adapter (rank 1 on a few layers), where no server has said yet what it has learned"""

Weights = Annotated[int, typer.Option(min=1, help="How many weights an adapter trains.")]
Rounds = Annotated[int, typer.Option(min=1, help="How many rounds a model line is learned for.")]


def show_budget(context: typer.Context, weights: Weights = 100_000, rounds: Rounds = 50, as_json: Json = False) -> None:
    """What each model line has cost in privacy, and whether enough devices learn together for it to be of use."""
    from clawloop_edge.privacy.ledger import DELTA, Ledger, part_used, read_cohort, sigma_for

    budget = home_of(context).require().load_config().privacy.epsilon
    with opened_pool(context) as pool:
        ledger = Ledger(pool, epsilon=budget)
        lines, together = ledger.lines(), ledger.spent_all()
        cohort, advice = read_cohort(pool), ledger.advice(weights, rounds=rounds)
    sigma = sigma_for(budget, rounds=rounds)
    if as_json:
        facts = {"epsilon": budget, "delta": DELTA, "lines": lines, "together": together, "sigma": sigma}
        print_json({**facts, "cohort": cohort, "advice": advice})
        return
    rows = [(line, s.releases, f"{s.epsilon:.2f}", f"{part_used(s, budget):.0%}") for line, s in lines.items()]
    if len(lines) > 1:
        rows.append(("all together", together.releases, f"{together.epsilon:.2f}", ""))
    print_table(
        ("model line", "releases", "epsilon", "used"), rows, empty="nothing noised has left: no privacy is spent"
    )
    console.print(f"budget: epsilon {budget:g} a model line, at delta {DELTA:g} ({_meaning(budget)})")
    console.print(f"{rounds} releases fit into it if each has noise of {sigma:.1f} times its clip")
    console.print(shown(advice or "no server has said yet how many devices learn together"))


def advice_for(context: typer.Context, pool: Pool) -> str:
    """Whether noised deltas could be of use, in plain words: for what the server last asked for, if it has."""
    from clawloop_edge.privacy.ledger import Ledger

    home = home_of(context)
    config, asked = home.load_config(), _asked_weights(home, pool)
    ledger = Ledger(pool, epsilon=config.privacy.epsilon)
    advice = ledger.advice(asked or ADAPTER_WEIGHTS, rounds=config.learn.rounds)
    if not advice:
        return "whether they would be of use is not known yet: no server has said how many devices learn with it"
    if asked:
        return f"{advice} (for what the server asked for last)"
    return f"{advice} (reckoned for a small adapter, of {ADAPTER_WEIGHTS:,} weights; a larger one needs more devices)"


def _asked_weights(home: EdgeHome, pool: Pool) -> int:
    """How many weights the server last asked to have learned; 0: it has not, or the model is not at hand."""
    from clawloop_edge.learn.runs import Runs
    from clawloop_edge.opening import model_folder
    from clawloop_shared.deltas import delta_shapes
    from clawloop_shared.model_line import read_shape

    task = Runs(pool).task()
    if task is None:
        return 0
    try:
        shape = read_shape(model_folder(home.load_config().model.path))
        shapes = delta_shapes(task.target_modules, shape, rank=task.rank, method=task.method)
    except ClawloopError:
        return 0
    return sum(map(prod, shapes.values()))


def _meaning(epsilon: float) -> str:
    """What an epsilon promises, in plain words."""
    if epsilon <= 1:
        return "strong: what one device gave can hardly be told"
    if epsilon <= 10:
        return "moderate: it bounds what can be told of one device, but does not rule it out"
    return "weak: hardly a bound on what can be told of one device"
