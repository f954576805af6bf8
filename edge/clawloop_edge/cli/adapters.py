"""`adapters`: which adapter serves, and going back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_edge.cli.context import Json, command, home_of, opened_pool, print_json, print_table, when
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.adapters.store import AdapterStore
    from clawloop_edge.pool.store import Pool

group = typer.Typer(help="Look at adapters, choose one, go back.", no_args_is_help=True)
Version = Annotated[int, typer.Argument(min=0, help="0 is the base without an adapter.")]


@group.command("list")
def list_adapters(context: typer.Context, as_json: Json = False) -> None:
    """The adapters that are kept here, and the one in use."""
    from clawloop_edge.adapters.overview import kept_adapters

    with opened_pool(context) as pool:
        store = _store(context, pool)
    found = kept_adapters(store) if store else []
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

    with opened_pool(context) as pool:
        store = _store(context, pool)
        if store is None:
            raise ConfigError("this device has joined no server, so the base serves; see `clawloop-edge join --help`")
        kept = store.versions()
        if version > 0 and version not in kept:
            raise ConfigError(f"adapter {version} is not kept here; kept are {kept}")
        state.want_adapter(pool, version, now_ms=time.time_ns() // 1_000_000)
    status = command(home_of(context), "status")
    typer.echo(f"asked; the edge follows within a second, or when it is started: {status}")


def _store(context: typer.Context, pool: Pool) -> AdapterStore | None:
    """The adapters of the server that this device has joined, if it has."""
    from clawloop_edge import state
    from clawloop_edge.adapters.store import AdapterStore

    member = state.membership(pool)
    return AdapterStore.of_key(home_of(context).adapters, member.release_key) if member else None


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="adapters")
