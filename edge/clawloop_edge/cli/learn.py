"""`learn`: what this device learns at home, when, and what came of it."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from clawloop_edge.cli.context import (
    Json,
    Limit,
    command,
    console,
    count,
    home_of,
    opened_pool,
    print_json,
    print_table,
    shown,
    when,
)
from clawloop_edge.cli.moments import lasted, told
from clawloop_edge.cli.service import ask
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from clawloop_edge.learn.runs import Outcome
    from clawloop_edge.pool.store import Pool

group = typer.Typer(help="See what this device learns at home, and when.", no_args_is_help=True)


@group.command("status")
def show_status(context: typer.Context, as_json: Json = False) -> None:
    """The task, what is missing to begin, and what came of the last one."""
    found = facts(context)
    if as_json:
        print_json(found)
        return
    for line in _lines(context, found):
        console.print(shown(line))


@group.command("history")
def show_history(context: typer.Context, limit: Limit = 20, as_json: Json = False) -> None:
    """What came of the latest tasks: the item in the outbox, or why there is none."""
    from clawloop_edge.learn.runs import Runs

    with opened_pool(context) as pool:
        history = Runs(pool).history()[-limit:]
    if as_json:
        print_json(history)
        return
    rows = [
        (
            when(each.at_ms),
            each.level,
            each.trajectories,
            each.updates,
            "" if each.reward is None else f"{each.reward:+.2f}",
            lasted(int(each.took_s * 1000)),
            f"{each.epsilon:.2f}" if each.epsilon else "",
            f"item {each.item_id}" if each.item_id else each.reason,
        )
        for each in history
    ]
    columns = ("when", "level", "trajectories", "updates", "reward", "took", "epsilon", "what came of it")
    print_table(columns, rows, empty="nothing was learned here yet", whole={"when"})


@group.command("now")
def learn_now(context: typer.Context, as_json: Json = False) -> None:
    """Learn as soon as nobody calls, on power or not. Less than `min_trajectories` never make a delta."""
    from clawloop_edge.learn.runs import Runs

    now_ms = time.time_ns() // 1_000_000
    with opened_pool(context) as pool:
        Runs(pool).ask_now(now_ms)
    found = facts(context)
    if as_json:
        print_json({"asked_ms": now_ms, **found})
        return
    console.print("it begins when no call is in flight")
    if not found["running"]:
        console.print(f"the edge does not run: {command(home_of(context), 'serve')}")
    for line in found["missing"]:
        if not line.startswith(("idle:", "power:")):
            console.print(shown(f"missing: {line}"))


def facts(context: typer.Context) -> dict[str, Any]:
    """How learning stands: as the running edge says, and what the pool knows."""
    home = home_of(context).require()
    config = home.load_config()
    running: dict[str, Any]
    try:
        running = ask(home) if home.token_file.is_file() else {"running": False}
    except ClawloopError:
        running = {"running": False}
    live: dict[str, Any] = running.get("learning") or {}
    with opened_pool(context) as pool:
        found = _of_pool(pool, epsilon=config.privacy.epsilon)
    state = live.get("state", "not running" if not running["running"] else "off")
    return {
        "running": running["running"],
        "enabled": config.learn.enabled,
        "state": state,
        "missing": live.get("missing", []),
        "power": live.get("power", ""),
        "updates": live.get("updates", 0),
        "wanted": config.learn.min_trajectories,
        **found,
    }


def _of_pool(pool: Pool, *, epsilon: float) -> dict[str, Any]:
    from clawloop_edge.learn.choosing import ready_in
    from clawloop_edge.learn.runs import Runs
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.ledger import Ledger

    runs, ledger = Runs(pool), Ledger(pool, epsilon=epsilon)
    state, task, run, history = ConsentLog(pool).state(), runs.task(), runs.run(), runs.history()
    spent = ledger.spent(task.line_id if task else history[-1].line_id if history else "")
    return {
        "level": state.level,
        "level_reason": state.reason,
        "ready": ready_in(pool),
        "task": msgspec.to_builtins(task),
        "begun_ms": run.started_ms if run else 0,
        "asked_ms": runs.asked_ms(),
        "last": msgspec.to_builtins(history[-1]) if history else None,
        "releases": spent.releases,
        "epsilon": spent.epsilon,
        "budget": epsilon,
    }


def _lines(context: typer.Context, found: dict[str, Any]) -> list[str]:
    now = datetime.now()
    if not found["enabled"]:
        return ["learning at home is switched off: [learn] enabled is false"]
    if not (found["level"].learns_at_home or sum(found["ready"].values())):
        change = command(home_of(context), "privacy set LEVEL")
        why = f" ({found['level_reason']})" if found["level_reason"] else ""
        return [f"the level is {found['level']}{why}, at which nothing is learned here; to change it: {change}"]
    lines = [f"{found['state']}, level {found['level']}"]
    if not found["running"]:
        lines = [f"the edge does not run, so nothing is learned: {command(home_of(context), 'serve')}"]
    task = found["task"]
    if task:
        lines.append(
            f"task {task['task_id']}: {task['method']} of rank {task['rank']} beside adapter {task['base_version']}"
        )
    waiting = sum(found["ready"].values())
    lines.append(f"{waiting} judged and not learned from before, of {found['wanted']} at least")
    if found["begun_ms"]:
        lines.append(
            f"begun {told(found['begun_ms'], now=now)}, {count(found['updates'], 'update')} since the edge began"
        )
    lines += [f"missing: {each}" for each in found["missing"]]
    if found["releases"]:
        lines.append(
            f"{count(found['releases'], 'noised delta')} so far: epsilon {found['epsilon']:.2f} of {found['budget']:g}"
        )
    if found["last"]:
        last = found["last"]
        came = f"item {last['item_id']}" if last["item_id"] else last["reason"]
        lines.append(f"last: {told(last['at_ms'], now=now)}, from {last['trajectories']} trajectories: {came}")
    return lines


def last_outcome(pool: Pool) -> Outcome | None:
    """What came of the last run; None if there was none."""
    from clawloop_edge.learn.runs import Runs

    return next(reversed(Runs(pool).history()), None)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="learn")
