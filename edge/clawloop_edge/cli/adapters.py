"""`adapters`: which adapter serves, and going back."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from clawloop_edge.cli.context import Json, command, count, home_of, opened_pool, print_json, print_table, when
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.adapters.export import Exported
    from clawloop_edge.adapters.store import AdapterStore
    from clawloop_edge.pool.store import Pool
    from clawloop_shared.messages import AdapterOffer

group = typer.Typer(help="Look at adapters, choose one, go back.", no_args_is_help=True)
Version = Annotated[int, typer.Argument(min=0, help="0 is the base without an adapter.")]
_NOT_JOINED = "this device has joined no server, so the base serves; see `clawloop-edge join --help`"


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


@group.command("export")
def export(
    context: typer.Context,
    version: Annotated[int, typer.Argument(min=1, help="As `adapters list` shows it.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; an empty one may be there.")],
    peft: Annotated[bool, typer.Option("--peft", help="As released: peft + transformers, vLLM (the default).")] = False,
    mlx: Annotated[bool, typer.Option("--mlx", help="An adapter for mlx-lm's --adapter-path.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="A whole model for mlx-lm, the adapter in it.")] = False,
    as_json: Json = False,
) -> None:
    """Write a kept adapter to a folder for other programs, with its signed manifest as manifest.json.

    --fused keeps the layers that the adapter changes in float32, so that nothing is rounded away: from a 4-bit base
    they grow to about seven times their size.
    """
    from clawloop_edge.adapters.export import export_adapter, form_of
    from clawloop_edge.adapters.verify import AdapterLimits
    from clawloop_edge.opening import model_folder

    form = form_of(peft=peft, mlx=mlx, fused=fused)
    config = home_of(context).require().load_config()
    if form != "peft" and not config.model.path:
        raise ConfigError(f"[model] path names no model folder, which --{form} needs; set it, or use --peft")
    offer, release_key = _kept(context, version)
    done = export_adapter(
        offer,
        out,
        form=form,
        release_key=release_key,
        model=lambda: model_folder(config.model.path),
        limits=AdapterLimits(max_bytes=config.adapters.max_bytes, max_rank=config.adapters.max_rank),
    )
    if as_json:
        print_json({**msgspec.to_builtins(done, enc_hook=str), "size_bytes": done.size_bytes})
        return
    _say_exported(done, base=config.model.path)


def _kept(context: typer.Context, version: int) -> tuple[AdapterOffer, bytes]:
    """A kept adapter as it was offered, and the key that it must be signed by."""
    from clawloop_edge import state

    with opened_pool(context) as pool:
        store, member = _store(context, pool), state.membership(pool)
    if store is None or member is None:
        raise ConfigError(_NOT_JOINED)
    _check_kept(store, version)
    return store.read(version), member.release_key


def _say_exported(done: Exported, *, base: str) -> None:
    typer.echo(f"adapter {done.version} is in {done.folder} ({done.size_bytes:,} bytes): {', '.join(done.files)}")
    if done.widened:
        typer.echo(f"{count(done.widened, 'layer')} of fewer bits in the base are float32 now, so that nothing is lost")
    model = shlex.quote(str(done.folder) if done.form == "fused" else base)
    if done.form != "peft":
        adapter = f" --adapter-path {shlex.quote(str(done.folder))}" if done.form == "mlx" else ""
        typer.echo(f"try it: mlx_lm.generate --model {model}{adapter} --prompt Hello")


def _check_kept(store: AdapterStore, version: int) -> None:
    kept = store.versions()
    if version > 0 and version not in kept:
        raise ConfigError(f"adapter {version} is not kept here; kept are {kept}")


def _want(context: typer.Context, version: int) -> None:
    from clawloop_edge import state

    with opened_pool(context) as pool:
        store = _store(context, pool)
        if store is None:
            raise ConfigError(_NOT_JOINED)
        _check_kept(store, version)
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
