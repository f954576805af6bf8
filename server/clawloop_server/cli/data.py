"""`data`: what devices sent, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from clawloop_server.cli.common import HomeOption, JsonOption, group, open_server, print_facts, print_json, print_table

if TYPE_CHECKING:
    from clawloop_server.aggregate.secure_store import SumFacts

app = group("What devices sent.")


@app.callback()
def _group() -> None:
    """What devices sent."""


@app.command()
def stats(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """How much is in the vault, how far it is, and what was set aside for which reason. Never content."""
    with open_server(home) as server:
        found = server.vault.stats()
    if as_json:
        print_json(found)
        return
    facts: dict[str, object] = {
        "devices": found.devices,
        "items": f"{found.items} ({found.received_bytes / 1e6:.1f} MB as sent)",
        "steps": f"{found.steps} ({found.tokens} tokens)",
        "signals": found.signals,
        "marks": found.marks,
    }
    if found.deltas:
        facts["deltas"] = ", ".join(f"{number} {state}" for state, number in found.deltas.items())
    for channel, states in sorted(found.trajectories.items()):
        facts[f"trajectories ({channel})"] = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    print_facts("vault", facts)
    if found.set_aside:
        typer.echo()
        print_table("set aside", ("reason", "records"), rows=found.set_aside.items())


@app.command()
def sums(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Secure sums, the latest first: of which task, how far, of how many devices, and why one failed."""
    from clawloop_server.aggregate.secure_store import overview

    with open_server(home) as server:
        found = overview(server.vault.database)
    if as_json:
        print_json(found)
        return
    rows = ((each.sum_id, each.task_id, _stage(each), len(each.members), each.reason) for each in found)
    print_table("secure sums", ("sum", "task", "stage", "devices", "reason"), rows=rows)


def _stage(found: SumFacts) -> str:
    return f"phase {found.phase}" if found.status == "running" else str(found.status)
