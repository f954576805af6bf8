"""`setup`, `serve`, `status`: making an edge and running it."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import msgspec
import typer

from clawloop_edge.cli.context import Json, Yes, confirm, console, home_of, print_json, print_table
from clawloop_edge.config import EdgeConfig, ModelConfig, PoolConfig
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_shared import config

Model = Annotated[str, typer.Option("--model", help="Model folder, or a hub id like owner/model.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on loopback for your agent.")]
KeyFile = Annotated[
    bool, typer.Option("--key-file", help="Keep the pool's key in a 0600 file of the home, not in the Keychain.")
]
Script = Annotated[str, typer.Option("--script", help="Drill: answer from this file of texts instead of a model.")]


def setup(
    context: typer.Context,
    model: Model = "",
    port: Port = 8100,
    key_file: KeyFile = False,
    script: Script = "",
    yes: Yes = False,
) -> None:
    """Make an edge here: configuration, keys, token, encrypted pool. Nothing leaves until you raise the level."""
    from clawloop_edge.opening import model_folder, open_pool
    from clawloop_shared.model_line import read_line

    home = home_of(context)
    if home.exists:
        confirm(f"{home.config_file} is there already. Write it anew (keys and pool stay)?", yes=yes)
    if not model:
        model = typer.prompt("Model (a folder, or a hub id like owner/model)") if not yes else ""
    folder = model_folder(model)
    line = read_line(folder)
    home.make()
    chosen = EdgeConfig(
        model=ModelConfig(path=str(folder), kind="scripted" if script else "mlx", script=script),
        gateway=GatewaySettings(port=port),
        pool=PoolConfig(key="file" if key_file else "keychain"),
    )
    config.save(home.config_file, chosen)
    home.token()
    open_pool(home, writer=True).close()
    console.print(f"edge at [bold]{home.folder}[/bold], model line {line.line_id}, privacy level [bold]off[/bold]")
    console.print("next: clawloop-edge serve")


def serve(context: typer.Context) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C."""
    from clawloop_edge.app import run

    run(home_of(context).require())


def status(context: typer.Context, as_json: Json = False) -> None:
    """Whether the edge runs, and how it is."""
    home = home_of(context).require()
    found = ask(home)
    if as_json:
        print_json(found)
    elif not found["running"]:
        console.print("not running; start it with: clawloop-edge serve")
    else:
        print_table(("what", "is"), [(k.replace("_", " "), v) for k, v in found.items()], empty="")
    if not found["running"]:
        raise typer.Exit(1)


def ask(home: EdgeHome) -> dict[str, Any]:
    """The running edge's own word on how it is; `running` is false if it does not answer."""
    gateway = home.load_config().gateway
    url = f"http://{gateway.host}:{gateway.port}/v1/status"
    try:
        with urlopen(Request(url, headers={"Authorization": f"Bearer {home.token()}"}), timeout=10) as reply:
            found: dict[str, Any] = msgspec.json.decode(reply.read(), type=dict[str, Any])
    except (URLError, json.JSONDecodeError, TimeoutError, ConnectionError):
        return {"running": False}
    return {"running": True, **found}


def register(app: typer.Typer) -> None:
    for command in (setup, serve, status):
        app.command()(command)
