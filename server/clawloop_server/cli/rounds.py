"""`train` and `rounds`: what the server learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    counted,
    group,
    open_server,
    print_facts,
    print_json,
    print_table,
    when,
)

if TYPE_CHECKING:
    from clawloop_server.vault.store import Lesson

app = group("Updates of the server, and what came of them.")
train = group("The trainer.")


@train.command("status")
def train_status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Whether the trainer runs, what it waits for, and its last round."""
    from clawloop_server.cli.run import server_status

    found = server_status(home)
    with open_server(home) as server:
        latest = next(iter(server.registry.rounds(limit=1)), None)
    part = next((part for part in found.parts if part.name == "trainer"), None)
    facts: dict[str, object] = {
        "trainer": "up" if part and part.pid else "down",
        "line_id": found.line_id,
        "ready_trajectories": found.ready_trajectories,
        "round_trajectories": found.round_trajectories,
        "running_round": found.rounds.running,
    }
    if as_json:
        print_json({**facts, "part": part, "last_round": latest})
        return
    shown = {**facts, "trainer": part.summary if part else "down"}
    last = f"{latest.round_id} {latest.state.value}: {latest.reason}" if latest else "none"
    print_facts("trainer", {name.replace("_", " "): value for name, value in shown.items()} | {"last round": last})


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
        used = f"{counted(r.trajectories, 'trajectory')}, {counted(r.steps, 'step')}"
        rows.append((r.round_id, r.state.value, made, used))
        rows.append((f"{when(r.started_ms)}{took}", "", "", r.reason))
    print_table("rounds", ("round", "state", "adapter", "learned from, reason"), rows=rows)


@app.command()
def show(
    round_id: Annotated[str, typer.Argument(metavar="ROUND", help="Round id, as `rounds list` shows it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """One round: what it learned from, what it measured, why it passed or not."""
    with open_server(home) as server:
        found = server.registry.round(round_id)
        lineage = server.vault.lineage(round_id)
    if as_json:
        print_json({"round": found, "lineage": lineage})
        return
    facts: dict[str, object] = {
        "round": found.round_id,
        "state": found.state.value,
        "reason": found.reason,
        "from adapter": found.base_version,
        "adapter": found.version,
        "trajectories": f"{found.trajectories} ({len(lineage)} recorded)",
        "steps": found.steps,
        "started": when(found.started_ms),
        "finished": when(found.finished_ms),
    }
    facts |= {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in found.metrics.items()
        if not isinstance(value, list | dict)
    }
    print_facts("round", facts)


@app.command()
def explain(
    round_id: Annotated[str, typer.Argument(metavar="ROUND", help="Round id, as `rounds list` shows it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which trajectories moved a round's adapter, and how the reward of each came about. Never content."""
    with open_server(home) as server:
        found = server.registry.round(round_id)
        lessons = server.vault.lessons(round_id)
    if as_json:
        print_json({"round_id": found.round_id, "version": found.version, "trajectories": lessons})
        return
    columns = ("trajectory", "device", "group", "reward", "weight", "how it came about")
    print_table(f"round {found.round_id}", columns, rows=[_lesson_row(lesson) for lesson in lessons])


def _lesson_row(lesson: Lesson) -> tuple[object, ...]:
    named = (lesson.trajectory_id[:12], lesson.device_id[-8:], lesson.group_id[:12])
    if lesson.account is None or lesson.account.reward is None:
        return (*named, "", "", "forgotten since" if lesson.state == "shredded" else "not kept, or forgotten since")
    reward = lesson.account.reward
    voices = (f"{v.source[:32]} {v.value:+.2f} ({v.share:.0%})" for v in lesson.account.voices)
    return (*named, f"{reward.value:+.3f}", f"{reward.weight:.2f}", ", ".join(voices))
