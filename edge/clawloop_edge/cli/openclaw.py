"""`openclaw connect`, `disconnect`, `status`: this edge in OpenClaw's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clawloop_edge.cli.context import Json, Yes, answered, confirm, console, home_of, print_json, problems, shown
from clawloop_edge.openclaw.entries import MODEL, Api

if TYPE_CHECKING:
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.openclaw.connect import Plan

group = typer.Typer(help="Make this edge OpenClaw's model, and take that back.", no_args_is_help=True)

Config = Annotated[
    Path | None, typer.Option("--config", help="OpenClaw's configuration, if not ~/.openclaw/openclaw.json.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]


def connect(
    context: typer.Context,
    config: Config = None,
    api: Annotated[Api, typer.Option("--api", help="The API by which OpenClaw shall talk.")] = Api.COMPLETIONS,
    primary: Annotated[
        bool | None, typer.Option("--primary/--no-primary", help="Make it the model of all agents (else asked).")
    ] = None,
    agent: Annotated[str, typer.Option("--agent", help="Make it the model of this agent.")] = "",
    context_tokens: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens that the model takes (else found out).")
    ] = None,
    plugin: Annotated[bool, typer.Option("--plugin/--no-plugin", help="/good, /bad and reactions in OpenClaw.")] = True,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make this edge a model provider of OpenClaw: shows the change, asks, keeps a backup.

    Run again, it changes what has changed here. The token stays in its file; OpenClaw's configuration names the file.
    """
    from clawloop_edge.openclaw import entries
    from clawloop_edge.openclaw.connect import config_path, plan_connect, present
    from clawloop_edge.openclaw.served import edge_of

    home = home_of(context).require()
    path = config_path(config, os.environ)
    if primary is None:
        ask = not (yes or dry_run or agent)
        primary = entries.is_primary(present(path)) or (ask and _wanted())
    wish = entries.Wish(api=api, plugin=plugin, primary=primary, agent=agent)
    plan = plan_connect(home, path, edge_of(home, context_tokens=context_tokens), wish)
    done = _carried_out(plan, home, dry_run=dry_run, yes=yes, as_json=as_json)
    if as_json:
        print_json({**done, "remarks": plan.remarks})
        return
    for remark in plan.remarks:
        problems.print(shown(f"note: {remark}"))
    if not dry_run:
        chosen = primary or agent
        typer.echo(f"the edge is {MODEL} in OpenClaw" + ("" if chosen else f"; choose it there with /model {MODEL}"))


def disconnect(
    context: typer.Context, config: Config = None, dry_run: DryRun = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Take out of OpenClaw's configuration what `connect` put in: the former file, if nobody else changed it since."""
    from clawloop_edge.openclaw.connect import config_path, plan_disconnect

    home = home_of(context)
    plan = plan_disconnect(home, config_path(config, os.environ))
    done = _carried_out(plan, home, dry_run=dry_run, yes=yes, as_json=as_json)
    if as_json:
        print_json(done)
    elif not dry_run:
        typer.echo("nothing of this edge is in OpenClaw's configuration")


def status(context: typer.Context, config: Config = None, as_json: Json = False) -> None:
    """Whether OpenClaw's configuration has this edge, and whether OpenClaw can load the plugin."""
    found = _facts(config)
    if as_json:
        print_json(found)
        return
    connected, plugin = found["connected"], found["plugin"]
    console.print(shown(f"{found['config']}: {'connected' if connected else 'not connected'}"))
    if connected:
        console.print("the model of all agents" if found["primary"] else f"chosen with /model {MODEL}")
    console.print(f"plugin: {plugin}")


def _facts(config: Path | None) -> dict[str, Any]:
    from clawloop_edge.openclaw import entries, json5, program
    from clawloop_edge.openclaw.connect import config_path, present

    path = config_path(config, os.environ)
    node = present(path)
    provider = json5.find(node, ("models", "providers", entries.NAME))
    plugin = json5.find(node, ("plugins", "entries", entries.NAME))
    state = "not installed" if plugin is None else program.plugin_state(path) if program.found() else "not checked"
    return {
        "config": str(path),
        "connected": provider is not None,
        "url": provider.value.get("baseUrl", "") if provider and isinstance(provider.value, dict) else "",
        "primary": entries.is_primary(node),
        "plugin": state,
    }


def _carried_out(plan: Plan, home: EdgeHome, *, dry_run: bool, yes: bool, as_json: bool) -> dict[str, Any]:
    """Show a plan, ask, and make it; what was done."""
    from rich.syntax import Syntax

    from clawloop_edge.openclaw.connect import carry_out, keep_record

    facts: dict[str, Any] = {"config": str(plan.config), "changed": plan.changed}
    if not plan.changed:
        keep_record(home, plan)
        if not as_json:
            typer.echo(f"nothing to change in {plan.config}")
        return facts
    if as_json:
        facts["diff"] = plan.diff()
    else:
        console.print(Syntax(plan.diff(), "diff", background_color="default", word_wrap=True))
    if dry_run:
        return {**facts, "changed": False}
    confirm(f"Write this to {plan.config} (a backup stays beside it)?", yes=yes)
    check = _check()
    backup = carry_out(plan, home, now=datetime.now(), check=check, environment=os.environ)
    if not as_json:
        typer.echo(f"the file as it was: {backup}")
    return {**facts, "backup": str(backup), "validated": check is not None}


def _check() -> Callable[[Path], None] | None:
    """OpenClaw's own validation, if its command is there."""
    from clawloop_edge.openclaw import program

    if program.found():
        return program.validate
    problems.print("no `openclaw` on PATH, so it could not check the new text; run `openclaw config validate`")
    return None


def _wanted() -> bool:
    question = f"Shall {MODEL} be the model of all agents?"
    return answered(lambda: typer.confirm(question, err=True), instead="--primary or --no-primary")


def register(app: typer.Typer) -> None:
    for each in (connect, disconnect, status):
        group.command()(each)
    app.add_typer(group, name="openclaw")
