"""`pool export` and `pool import`: what was kept, as a plain file of its owner's own, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.progress import Progress

from clawloop_edge.cli.context import (
    App,
    Json,
    Since,
    Until,
    Yes,
    confirm,
    home_of,
    opened_pool,
    print_json,
    problems,
    the_session,
)
from clawloop_edge.cli.curate import Channel, QualityMin, RewardMax, RewardMin, Tag, picked_by
from clawloop_edge.cli.pool import group
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.config import EdgeConfig
    from clawloop_edge.pool.derived import DerivedManifest
    from clawloop_edge.pool.deriving import Task
    from clawloop_edge.pool.exported import Basis, Manifest
    from clawloop_edge.pool.reading import Reading
    from clawloop_edge.pool.store import Pool

_OUT = "File to write, or a folder for it; one named .zst is packed."
Out = Annotated[Path, typer.Argument(help=_OUT, metavar="FILE|FOLDER")]
In = Annotated[Path, typer.Argument(help="File that `pool export` wrote.", metavar="FILE", exists=True, dir_okay=False)]
Form = Annotated[
    Literal["jsonl", "parquet", "chat", "trl-preference", "trl-completion", "verl"] | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="jsonl, parquet, chat, trl-preference, trl-completion or verl; by default what the name ends in: jsonl or "
        "parquet. The others are text alone.",
    ),
]


def export(
    context: typer.Context,
    out: Out,
    form: Form = None,
    session: Annotated[list[str] | None, typer.Option("--session", help="Only this session; may be repeated.")] = None,
    since: Since = "",
    until: Until = "",
    app: App = "",
    tag: Tag = None,
    quality_min: QualityMin = None,
    channel: Channel = None,
    trainable_only: Annotated[
        bool, typer.Option("--trainable-only", help="Token-exact steps that you did not take out.")
    ] = False,
    reward_min: RewardMin = None,
    reward_max: RewardMax = None,
    margin: Annotated[
        float, typer.Option(min=0, max=2, help="How far the rewards of a pair of answers are apart (trl-preference).")
    ] = 0.5,
    text: Annotated[bool, typer.Option("--with-text/--tokens-only", help="With what was said, or ids alone.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write steps and signals to a file of your own. It is NOT encrypted.

    jsonl and parquet have all that is kept (tokens, logprobs, policy, signals, your words) and can be imported; the
    other formats are for other programs: of the channel train if none is given, without what you took out of training,
    and with FILE.manifest.json beside.
    """
    from clawloop_edge.pool.exported import Chosen
    from clawloop_edge.pool.exporting import Derived, ExportFormat, export_pool

    if form and not ExportFormat(form).is_own and not text:
        raise ConfigError(f"{form} is text alone; leave --tokens-only out, or choose jsonl or parquet")
    config = home_of(context).require().load_config()
    chosen_form = ExportFormat(form or ("parquet" if out.suffix == ".parquet" else "jsonl"))
    file = out / f"{chosen_form}{chosen_form.suffix}" if out.is_dir() else out
    options = context.params | {
        "trainable": "yes" if trainable_only else None,
        "no_signal": False,
        "source": "",
    }
    with opened_pool(context) as pool, _progress("exporting", pool.stats().steps) as told:
        sessions = [the_session(context, pool, start) for start in session or ()]
        picked = msgspec.structs.asdict(picked_by(options, sessions=sessions))
        derived = Derived(rules=config.reward, margin=margin, task_of=_task_of(config))
        manifest = export_pool(
            pool,
            file,
            Chosen(**picked, text=text),
            form=chosen_form,
            basis=_basis(pool),
            derived=derived,
            replace=force,
            progress=told,
        )
    _say_written(manifest, file=file, as_json=as_json)


def _say_written(manifest: Manifest | DerivedManifest, *, file: Path, as_json: bool) -> None:
    from clawloop_edge.pool.derived import DerivedManifest

    size = file.stat().st_size
    if as_json:
        print_json(msgspec.to_builtins(manifest) | {"file": str(file), "size_bytes": size, "encrypted": False})
        return
    rows = f" as {manifest.rows:,} rows" if isinstance(manifest, DerivedManifest) else ""
    typer.echo(f"{manifest.steps:,} steps and {manifest.signals:,} signals{rows} are in {file} ({size:,} bytes)")
    for why, number in manifest.left_out.items() if isinstance(manifest, DerivedManifest) else ():
        typer.echo(f"left out: {why}: {number:,}")
    typer.echo("that file is not encrypted: whoever can read it reads your conversations; delete it when you are done")


def _basis(pool: Pool) -> Basis:
    """What may leave this device by itself now, and by which consent."""
    from clawloop_edge.pool.exported import Basis
    from clawloop_edge.privacy.consent import ConsentLog

    state = ConsentLog(pool).state()
    return Basis(level=str(state.level), receipt_id=state.receipt.receipt_id if state.receipt else "")


def _task_of(config: EdgeConfig) -> Callable[[Reading, str], Task]:
    """What a trajectory's metadata say of its task, where the scorer of exact answers looks for it too."""
    from clawloop_edge.pool.deriving import Task
    from clawloop_edge.scoring import metadata_of
    from clawloop_edge.signals.answer import answers_in

    def told(reading: Reading, trajectory_id: str) -> Task:
        metadata = metadata_of(reading, trajectory_id)
        source, ability = (str(metadata.get(name) or "") for name in ("data_source", "ability"))
        answers = answers_in(metadata, config.signals.exact.keys)
        return Task(data_source=source, ability=ability, ground_truth=answers[0] if answers else "")

    return told


def take_in(
    context: typer.Context,
    file: In,
    check: Annotated[bool, typer.Option("--check", help="Only hold it against its manifest, of any format.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take a file of `pool export` into the pool. All of it is checked first; what is here already stays as it is.

    What was forgotten here stays forgotten.
    """
    from clawloop_edge.pool.derived import beside, check_derived
    from clawloop_edge.pool.importing import check_export, import_export, is_export
    from clawloop_edge.privacy.consent import ConsentLog

    if not is_export(file) and beside(file).exists():
        if not check:
            raise ConfigError(f"{file} is text for other programs, and cannot be taken in; --check says if it is whole")
        _say_checked(check_derived(file), file=file, as_json=as_json)
        return
    with _progress("checking", 0) as told:
        head, manifest = check_export(file, progress=told)
    if check:
        _say_checked(manifest, file=file, as_json=as_json)
        return
    records = manifest.steps + manifest.signals + manifest.curations
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
    words = f", {found.curations:,} words of yours" if found.curations else ""
    typer.echo(f"{found.steps:,} steps and {found.signals:,} signals{words} were taken in")
    left_out = {
        "were here already": found.known,
        "were forgotten here and stay so": found.forgotten,
        "judge what is not here": found.loose,
    }
    for why, number in left_out.items():
        if number:
            typer.echo(f"{number:,} {why}")


def _say_checked(manifest: Manifest | DerivedManifest, *, file: Path, as_json: bool) -> None:
    if as_json:
        print_json(manifest)
    else:
        typer.echo(f"{file} is what its manifest says: {manifest.steps:,} steps of {manifest.sessions:,} sessions")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal."""
    with Progress(console=problems, transient=True, disable=not problems.is_terminal) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda done: progress.update(task, completed=done)


def register(app: typer.Typer) -> None:
    group.command("export")(export)
    group.command("import")(take_in)
