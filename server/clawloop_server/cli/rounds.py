"""`train` and `rounds`: what the server learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clawloop_server.cli import explaining, joined
from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    group,
    home_of,
    open_server,
    print_facts,
    print_json,
    print_table,
    table_width,
    when,
)

app = group("Updates of the server, and what came of them.")
RoundArgument = Annotated[str, typer.Argument(metavar="ROUND", help="Round id, as `rounds list` shows it.")]
train = group("The trainer.")


@train.command("status")
def train_status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Whether the trainer runs, what it waits for, and its last round."""
    from clawloop_server.cli.run import server_status, under_way

    found = server_status(home)
    with open_server(home) as server:
        latest = next(iter(server.registry.rounds(limit=1)), None)
        waiting = server.vault.deltas.waiting(found.line_id)
    part = next((part for part in found.parts if part.name == "trainer"), None)
    facts: dict[str, object] = {
        "trainer": "up" if part and part.pid else "down",
        "line_id": found.line_id,
        "ready_trajectories": found.ready_trajectories,
        "round_trajectories": found.round_trajectories,
        "deltas": found.deltas,
        "running_round": found.rounds.running,
        "training": found.training,
    }
    if as_json:
        print_json({**facts, "waiting_deltas": waiting, "part": part, "last_round": latest})
        return
    shown = {**facts, "trainer": part.summary if part else "down"}
    shown["running_round"], shown["deltas"] = under_way(found), found.deltas.summary
    del shown["training"]
    last = f"{latest.round_id} {latest.state.value}: {latest.reason}" if latest else "none"
    print_facts("trainer", {name.replace("_", " "): value for name, value in shown.items()} | {"last round": last})
    if waiting:
        columns = ("waiting delta of", "learned beside", "method", "trajectories", "since")
        rows = [(d.device_id, d.base_version, d.method, d.trajectories, when(d.received_ms)) for d in waiting]
        print_table("waiting deltas", columns, rows=rows)


@app.command("list")
def list_rounds(
    limit: Annotated[int, typer.Option(min=1, help="How many of the latest.")] = 20,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The latest rounds, newest first."""
    with open_server(home) as server:
        found = server.registry.rounds(limit=limit)
    if as_json:
        print_json(found)
        return
    rows: list[tuple[object, ...]] = []
    for r in found:
        took = f", {(r.finished_ms - r.started_ms) / 1000:.1f} s" if r.finished_ms else ""
        made = f"{r.base_version} → {r.version}" if r.version else f"{r.base_version} →"
        used = explaining.learned_from(r)
        rows.append((r.round_id, r.state.value, made, used))
        rows.append((f"{when(r.started_ms)}{took}", "", "", r.reason))
    print_table("rounds", ("round", "state", "adapter", "learned from, reason"), rows=rows)


@app.command()
def show(round_id: RoundArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One round: what it was built on, what its updates measured, why it passed or not."""
    found, lineage = _explained(home, round_id)
    if as_json:
        print_json({"round": found.round, "updates": found.updates, "lineage": lineage})
        return
    print_facts("round", explaining.round_facts(found))
    _print_updates(found)


@app.command()
def explain(round_id: RoundArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """What moved a round's adapter: its updates, what was left out, and how each reward came about. Never content."""
    found, _ = _explained(home, round_id)
    if as_json:
        print_json(_as_facts(found))
        return
    print_facts("round", explaining.round_facts(found))
    _print_updates(found)
    left_out = explaining.left_out_rows(found)
    if left_out:
        typer.echo()
        print_table("left out", ("how much", "why", "which"), rows=left_out)
    typer.echo()
    columns, rows = explaining.lesson_rows(found)
    if rows or not found.deltas:
        print_table("trajectories", columns, rows=rows)
    _print_joined(found)


@app.command()
def watch(
    rounds: Annotated[int, typer.Option(min=0, metavar="N", help="End after so many rounds; 0: at Ctrl-C.")] = 0,
    home: HomeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """The round under way as it goes: how far it is, how fast, how long yet, and what the guards see."""
    from clawloop_server.cli import watching

    watching.watch(home_of(home), rounds=rounds, as_json=as_json)


def _explained(home: Path | None, round_id: str) -> tuple[explaining.Explained, list[str]]:
    from clawloop_server.trainer.observing import round_updates

    with open_server(home) as server:
        found = server.registry.round(round_id)
        adapters = {record.version: record for record in server.registry.adapters(line_id=found.line_id)}
        kept, timed = found.metrics.get("updates") or [], round_updates(server.home.trainer, round_id)
        explained = explaining.Explained(
            round=found,
            built_on=adapters.get(found.base_version),
            made=adapters.get(found.version),
            updates=explaining.with_times(kept, timed),
            trajectories=server.vault.lessons(round_id),
            deltas=server.vault.deltas.of_round(round_id),
            rejection=server.registry.rejections().get(found.version),
        )
        return explained, server.vault.lineage(round_id)


def _print_joined(found: explaining.Explained) -> None:
    """What became of each delta, and what joining them cost."""
    metrics = found.round.metrics
    rows = joined.share_rows(metrics, found.deltas)
    if rows:
        typer.echo()
        print_table("joined", joined.SHARE_COLUMNS, rows=rows)
        print_facts("joining", joined.account_facts(metrics))
    pairs = joined.conflict_rows(metrics)
    if pairs:
        print_table("devices that pull apart most", ("device", "and device", "cosine"), rows=pairs)
    for line in joined.split_lines(metrics):
        typer.echo(line)


def _print_updates(found: explaining.Explained) -> None:
    rows = explaining.metric_rows(found.updates, width=table_width())
    if not rows:
        return
    typer.echo()
    print_table("updates", ("metric", "first", "last", "lowest", "highest", "course"), rows=rows)
    passed = explaining.passed_masks(found.updates)
    if passed:
        typer.echo(f"stopped no token: {', '.join(passed)}")
    zeros = explaining.zeros(found.updates)
    if zeros:
        typer.echo(f"0 throughout: {', '.join(zeros)}".replace("_", " "))


def _as_facts(found: explaining.Explained) -> dict[str, object]:
    return {
        "round_id": found.round.round_id,
        "version": found.round.version,
        "round": found.round,
        "evaluation": found.evaluation,
        "built_on": explaining.adapter_facts(found.built_on),
        "made": explaining.adapter_facts(found.made),
        "rejection": found.rejection,
        "updates": found.updates,
        "trajectories": found.trajectories,
        "deltas": found.deltas,
        "joined": found.round.metrics.get("joined"),
        "conflict": found.round.metrics.get("conflict"),
        "split": found.round.metrics.get("split"),
    }
