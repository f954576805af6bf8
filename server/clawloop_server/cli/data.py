"""`data`: what devices sent, in numbers."""

from __future__ import annotations

import typer

from clawloop_server.cli.common import HomeOption, JsonOption, group, open_server, print_facts, print_json, print_table

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
