"""`privacy budget`: what the noised deltas of this device have cost, and whether more of them would be of use."""

from __future__ import annotations

from typing import Annotated

import typer

from clawloop_edge.cli.context import Json, console, home_of, opened_pool, print_json, print_table, shown

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


def _meaning(epsilon: float) -> str:
    """What an epsilon promises, in plain words."""
    if epsilon <= 1:
        return "strong: what one device gave can hardly be told"
    if epsilon <= 10:
        return "moderate: it bounds what can be told of one device, but does not rule it out"
    return "weak: hardly a bound on what can be told of one device"
