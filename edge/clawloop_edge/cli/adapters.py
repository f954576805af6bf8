"""`adapters`: which adapter serves, and going back."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from clawloop_edge.cli.context import Json, console, home_of, opened_pool, print_json, print_table, when
from clawloop_shared.errors import ConfigError

group = typer.Typer(help="Look at adapters, choose one, go back.", no_args_is_help=True)
Version = Annotated[int, typer.Argument(min=0, help="0 is the base without an adapter.")]


@group.command("list")
def list_adapters(context: typer.Context, as_json: Json = False) -> None:
    """The adapters that are kept here, and the one in use."""
    from clawloop_edge.adapters.overview import kept_adapters
    from clawloop_edge.adapters.store import AdapterStore

    found = kept_adapters(AdapterStore(home_of(context).require().adapters))
    if as_json:
        print_json(found)
        return
    rows = [("→" if a.current else "", a.version, a.rank, a.reward, a.reward_before, when(a.created_ms)) for a in found]
    print_table(("", "version", "rank", "reward", "before", "made"), rows, empty="no adapter yet: the base serves")


@group.command("use")
def use_adapter(context: typer.Context, version: Version) -> None:
    """Serve with this version from the next call on; calls in flight finish on theirs."""
    _want(context, version)


@group.command("rollback")
def roll_back(context: typer.Context) -> None:
    """Serve with the version before the current one."""
    _want(context, -1)


def _want(context: typer.Context, version: int) -> None:
    from clawloop_edge import state
    from clawloop_edge.adapters.store import AdapterStore

    kept = AdapterStore(home_of(context).require().adapters).versions()
    if version > 0 and version not in kept:
        raise ConfigError(f"adapter {version} is not kept here; kept are {kept}")
    with opened_pool(context) as pool:
        state.want_adapter(pool, version, now_ms=time.time_ns() // 1_000_000)
    console.print("asked; the running edge follows within a second: clawloop-edge status")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="adapters")
