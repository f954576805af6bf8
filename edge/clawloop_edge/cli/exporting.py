"""`pool export` and `pool import`: what was kept, as a plain file of its owner's own, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.progress import Progress

from clawloop_edge.cli.context import (
    Json,
    Since,
    Until,
    Yes,
    confirm,
    opened_pool,
    print_json,
    problems,
    the_session,
    time_range,
)
from clawloop_edge.cli.pool import group

Out = Annotated[Path, typer.Argument(help="File to write; one named .zst is packed.", metavar="OUT", dir_okay=False)]
In = Annotated[Path, typer.Argument(help="File that `pool export` wrote.", metavar="FILE", exists=True, dir_okay=False)]


def export(
    context: typer.Context,
    out: Out,
    form: Annotated[
        Literal["jsonl", "parquet"] | None, typer.Option("--format", help="By default what OUT's name ends in.")
    ] = None,
    session: Annotated[list[str] | None, typer.Option("--session", help="Only this session; may be repeated.")] = None,
    since: Since = "",
    until: Until = "",
    text: Annotated[bool, typer.Option("--with-text/--tokens-only", help="With what was said, or ids alone.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write steps and signals to a file of your own. It is NOT encrypted.

    Each step has its tokens, logprobs, policy, sampling, and whether it may be learned from.
    """
    from clawloop_edge.pool.exported import Chosen
    from clawloop_edge.pool.exporting import ExportFormat, export_pool

    since_ms, until_ms = time_range(since, until)
    with opened_pool(context) as pool, _progress("exporting", pool.stats().steps) as told:
        sessions = [the_session(context, pool, start) for start in session or ()]
        chosen = Chosen(sessions=sessions, since_ms=since_ms, until_ms=until_ms, text=text)
        ending = form or ("parquet" if out.suffix == ".parquet" else "jsonl")
        manifest = export_pool(pool, out, chosen, form=ExportFormat(ending), replace=force, progress=told)
    size = out.stat().st_size
    if as_json:
        print_json(msgspec.to_builtins(manifest) | {"file": str(out), "size_bytes": size, "encrypted": False})
        return
    typer.echo(f"{manifest.steps:,} steps and {manifest.signals:,} signals are in {out} ({size:,} bytes)")
    typer.echo("that file is not encrypted: whoever can read it reads your conversations; delete it when you are done")


def take_in(context: typer.Context, file: In, yes: Yes = False, as_json: Json = False) -> None:
    """Take a file of `pool export` into the pool. All of it is checked first; what is here already stays as it is.

    What was forgotten here stays forgotten.
    """
    from clawloop_edge.pool.importing import check_export, import_export
    from clawloop_edge.privacy.consent import ConsentLog

    with _progress("checking", 0) as told:
        head, manifest = check_export(file, progress=told)
    records = manifest.steps + manifest.signals
    with opened_pool(context) as pool:
        level = ConsentLog(pool).level()
        if level.sends_steps:
            question = f"The level is {level}: what comes in may leave this device, like all that is kept from now on."
            confirm(f"{question} Take in {manifest.steps:,} steps?", yes=yes)
        with _progress("taking in", records) as told:
            found = import_export(pool, file, progress=told)
    if as_json:
        print_json(msgspec.to_builtins(found) | {"pool_id": head.pool_id, "exported_ms": head.exported_ms})
        return
    typer.echo(f"{found.steps:,} steps and {found.signals:,} signals were taken in")
    left_out = {
        "were here already": found.known,
        "were forgotten here and stay so": found.forgotten,
        "judge what is not here": found.loose,
    }
    for why, number in left_out.items():
        if number:
            typer.echo(f"{number:,} {why}")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal."""
    with Progress(console=problems, transient=True, disable=not problems.is_terminal) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.update(task, completed=done)


def register(app: typer.Typer) -> None:
    group.command("export")(export)
    group.command("import")(take_in)
