"""`setup`, `serve`, `status`: making an edge and running it."""

from __future__ import annotations

from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Annotated, Any

import msgspec
import typer

from clawloop_edge.cli.context import Json, Yes, confirm, console, home_of, print_json, print_table
from clawloop_edge.config import ModelConfig
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_shared import config
from clawloop_shared.errors import ConfigError

Model = Annotated[str, typer.Option("--model", help="Model folder, or a hub id like owner/model.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port on loopback for your agent (8100).")]
KeyFile = Annotated[
    bool, typer.Option("--key-file", help="Keep the pool's key in a 0600 file of the home, not in the Keychain.")
]
Script = Annotated[str, typer.Option("--script", help="Drill: answer from this file of texts instead of a model.")]


def setup(
    context: typer.Context,
    model: Model = "",
    port: Port = None,
    key_file: KeyFile = False,
    script: Script = "",
    yes: Yes = False,
) -> None:
    """Make an edge here: configuration, keys, token, encrypted pool. Nothing leaves until you raise the level.

    Run again, it sets the model, and what else is given; all other settings stay.
    """
    from clawloop_edge.opening import model_folder, open_pool
    from clawloop_shared.model_line import read_line

    home = home_of(context)
    old = home.load_config()
    if home.exists:
        confirm(f"{home.config_file} is there already. Change it (other settings, keys and pool stay)?", yes=yes)
    if not model and yes:
        raise ConfigError("no model is named; give --model with a folder, or a hub id like owner/model")
    folder = model_folder(model or typer.prompt("Model (a folder, or a hub id like owner/model)"))
    line = read_line(folder)
    home.make()
    chosen = msgspec.structs.replace(
        old,
        model=ModelConfig(path=str(folder), kind="scripted" if script else "mlx", script=script),
        gateway=msgspec.structs.replace(old.gateway, port=port or old.gateway.port),
        pool=msgspec.structs.replace(old.pool, key="file") if key_file else old.pool,
    )
    config.save(home.config_file, chosen)
    home.token()
    open_pool(home, writer=False).close()
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
    """The running edge's own word on how it is; `running` is false if nothing answers.

    Raises:
        ConfigError: what answers at its address is not this edge.
    """
    gateway = home.load_config().gateway
    connection = HTTPConnection(gateway.host, gateway.port, timeout=10)  # no proxy may see the token
    try:
        connection.request("GET", "/v1/status", headers={"Authorization": f"Bearer {home.token()}"})
        reply = connection.getresponse()
        status, data = reply.status, reply.read()
    except OSError:
        return {"running": False}
    except HTTPException as error:
        raise _stranger(gateway, type(error).__name__) from error
    finally:
        connection.close()
    if status != HTTPStatus.OK:
        raise _stranger(gateway, f"status {status}")
    try:
        return {"running": True, **msgspec.json.decode(data, type=dict[str, Any])}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _stranger(gateway, "no JSON") from error


def _stranger(gateway: GatewaySettings, answer: str) -> ConfigError:
    return ConfigError(
        f"{gateway.host}:{gateway.port} answers, but not as this edge does ({answer}); stop that program, "
        "or set another [gateway] port"
    )


def register(app: typer.Typer) -> None:
    for command in (setup, serve, status):
        app.command()(command)
