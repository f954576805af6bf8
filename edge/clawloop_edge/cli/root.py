"""The tree of commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from clawloop_edge.cli import (
    adapters,
    curate,
    doctor,
    explain,
    exporting,
    learn,
    log,
    openclaw,
    pool,
    privacy,
    redact,
    review,
    rewards,
    rollout,
    server,
    service,
    sessions,
)
from clawloop_edge.cli.context import flow
from clawloop_edge.home import ENVIRONMENT, EdgeHome


class Tree(TyperGroup):
    """The commands, each of which takes `--home` behind it as well."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for command in _leaves(self):
            command.params.append(
                click.Option(["--home"], type=Path, expose_value=False, hidden=True, callback=_name_home)
            )


def _leaves(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from _leaves(command)
        else:
            yield command


def _name_home(context: click.Context, option: click.Parameter, home: Path | None) -> None:
    if home is not None:
        context.obj = EdgeHome.at(home)


app = typer.Typer(
    name="clawloop-edge",
    cls=Tree,
    help="The edge of clawloop: serves your model to your agent, keeps what happens, learns with your consent.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HOME = (
    "Folder that holds everything of this edge; by default ~/.local/share/clawloop/edge, "
    "on macOS ~/Library/Application Support/clawloop/edge."
)
Home = Annotated[Path | None, typer.Option("--home", envvar=ENVIRONMENT, help=_HOME)]


@app.callback()
def root(context: typer.Context, home: Home = None) -> None:
    context.obj = EdgeHome.at(home)


for module in (
    service,
    doctor,
    sessions,
    explain,
    curate,
    review,
    rewards,
    privacy,
    redact,
    learn,
    rollout,
    server,
    adapters,
    log,
    pool,
    exporting,
    openclaw,
):
    module.register(app)
flow(app)
