"""The tree of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clawloop_edge.cli import (
    adapters,
    doctor,
    explain,
    exporting,
    pool,
    privacy,
    redact,
    rewards,
    server,
    service,
    sessions,
)
from clawloop_edge.home import ENVIRONMENT, EdgeHome

app = typer.Typer(
    name="clawloop-edge",
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
    rewards,
    privacy,
    redact,
    rewards,
    server,
    adapters,
    pool,
    exporting,
):
    module.register(app)
