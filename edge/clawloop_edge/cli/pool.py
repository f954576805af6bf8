"""`pool`: the encrypted database itself."""

from __future__ import annotations

import typer

from clawloop_edge.cli.context import Json, console, opened_pool, print_json, print_table, shown

group = typer.Typer(help="The encrypted pool.", no_args_is_help=True)


@group.command("stats")
def show_stats(context: typer.Context, as_json: Json = False) -> None:
    """Counts and sizes."""
    import msgspec

    with opened_pool(context) as pool:
        found = pool.stats()
    if as_json:
        print_json(found)
        return
    print_table(("what", "is"), list(msgspec.to_builtins(found).items()), empty="")


@group.command("verify")
def verify(context: typer.Context, as_json: Json = False) -> None:
    """Open every sealed row and check the database; exit 1 if anything is wrong."""
    with opened_pool(context) as pool:
        report = pool.verify()
    if as_json:
        print_json(report)
    else:
        console.print(f"{report.steps} steps in {report.sessions} sessions, {report.signals} signals")
        for problem in report.problems:
            console.print("[red]wrong:[/red]", shown(problem))
    if not report.ok:
        raise typer.Exit(1)


@group.command("ids")
def list_ids(context: typer.Context, as_json: Json = False) -> None:
    """The ids of every kept step, oldest first."""
    with opened_pool(context) as pool:
        found = pool.step_ids()
    if as_json:
        print_json(found)
        return
    for step_id in found:
        console.print(shown(step_id))


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="pool")
