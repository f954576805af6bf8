"""`log`: what this device knows of its server's log of released adapters, and what to do if it did not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from clawloop_edge.cli.context import Json, Yes, confirm, home_of, opened_pool, print_json, print_table, when
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.node.join import Membership
    from clawloop_edge.pool.store import Pool
    from clawloop_shared.log_head import TreeHead

group = typer.Typer(help="The server's log of released adapters, as this device saw it.", no_args_is_help=True)


@group.command("show")
def show(context: typer.Context, as_json: Json = False) -> None:
    """The log's size and root, to compare with other devices and the operator's `log show`; why updates stopped."""
    from clawloop_edge import state

    with opened_pool(context) as pool:
        member = _member(context, pool)
        known = state.known_log(pool, member)
    if as_json:
        print_json({"server": member.url, "line_id": member.line.line_id, "known": known})
        return
    rows = [("server", member.url), ("model line", member.line.line_id), ("seen last", _told(known.head))]
    if known.stopped:
        rows += [("updates", "stopped"), ("since", when(known.stopped_ms)), ("because", known.stopped)]
        rows += [("shown then", _told(known.shown))]
    print_table(("what", "is"), rows, empty="")


@group.command("accept")
def accept(context: typer.Context, yes: Yes = False) -> None:
    """Go on from the log that the server showed when updates stopped, whatever was seen before."""
    from clawloop_edge import state

    with opened_pool(context) as pool:
        member = _member(context, pool)
        known = state.known_log(pool, member)
        if not known.stopped:
            raise ConfigError("updates are not stopped; `clawloop-edge log show` prints the log that is known")
        typer.echo(f"seen before: {_told(known.head)}\nshown since: {_told(known.shown)}\n{known.stopped}", err=True)
        confirm("Believe the server, and go on from the log that it showed?", yes=yes)
        state.keep_log(pool, member, known.accepted())
    typer.echo("accepted; the next adapter is checked against that log")


def _told(head: TreeHead | None) -> str:
    if head is None:
        return "no log"
    return f"{head.size} entries, root {head.root}, signed {when(head.at_ms)}"


def _member(context: typer.Context, pool: Pool) -> Membership:
    from clawloop_edge import state

    member = state.membership(pool)
    if member is None:
        raise ConfigError(
            f"the edge in {home_of(context).folder} has joined no server; see `clawloop-edge join --help`"
        )
    return member


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="log")
