"""`setup`, `serve`, `status`: making an edge and running it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from clawloop_edge.cli.context import (
    Json,
    Yes,
    answered,
    command,
    confirm,
    console,
    home_of,
    print_json,
    print_table,
    problems,
)
from clawloop_edge.config import ModelConfig, PoolConfig
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_shared import config
from clawloop_shared.errors import ConfigError

_ANSWER_S = 10.0
Model = Annotated[str, typer.Option("--model", help="Model folder, or a hub id like owner/model.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port on loopback for your agent (8100).")]
KeyFile = Annotated[
    bool, typer.Option("--key-file", help="Keep the pool's key in a 0600 file of the home, not in the Keychain.")
]
Passphrase = Annotated[
    bool,
    typer.Option("--passphrase", help="Seal the pool's key by a passphrase (asked, or CLAWLOOP_EDGE_PASSPHRASE)."),
]
Upstream = Annotated[
    str, typer.Option("--upstream", help="Base URL of a server that has the model, like http://127.0.0.1:8000/v1.")
]
UpstreamModel = Annotated[str, typer.Option("--upstream-model", help="Its name there (else the server's first).")]
UpstreamKey = Annotated[str, typer.Option("--upstream-key-file", help="File that holds the server's API key.")]
Script = Annotated[str, typer.Option("--script", help="Drill: answer from this file of texts instead of a model.")]


def setup(
    context: typer.Context,
    model: Model = "",
    port: Port = None,
    key_file: KeyFile = False,
    passphrase: Passphrase = False,
    script: Script = "",
    upstream: Upstream = "",
    upstream_model: UpstreamModel = "",
    upstream_key_file: UpstreamKey = "",
    yes: Yes = False,
) -> None:
    """Make an edge here: configuration, keys, token, encrypted pool. Nothing leaves until you raise the level.

    Run again, it sets the model, and what else is given; all other settings stay.
    """
    from clawloop_edge.opening import key_store, model_folder, open_pool
    from clawloop_edge.pool.crypt import encryption
    from clawloop_edge.pool.keys import open_keys
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_shared.database import encrypts
    from clawloop_shared.model_line import read_line

    if upstream and script:
        raise typer.BadParameter("--upstream and --script exclude each other")
    home = home_of(context)
    old = home.load_config()
    if home.exists:
        confirm(f"{home.config_file} is there already. Change it (other settings, keys and pool stay)?", yes=yes)
    if not model and not upstream and yes:
        raise ConfigError("no model is named; give --model with a folder, or a hub id like owner/model")
    if not model and not upstream:
        model = answered(lambda: typer.prompt("Model (a folder, or a hub id like owner/model)"), instead="--model")
    folder = model_folder(model) if model else None
    server = old.upstream
    if upstream:
        kept_key = server.key_file if server.url == upstream else ""  # no other server may be shown it
        key = _absolute(upstream_key_file) or kept_key
        server = _asked(msgspec.structs.replace(server, url=upstream, model=upstream_model, key_file=key))
    shown = read_line(folder).line_id if folder else f"none (before {server.model} at {server.url}, nothing is learned)"
    kind = "scripted" if script else "upstream" if upstream else "mlx"
    chosen = msgspec.structs.replace(
        old,
        model=ModelConfig(path=str(folder or ""), kind=kind, script=script),
        upstream=server,
        gateway=msgspec.structs.replace(old.gateway, port=port or old.gateway.port),
        pool=_key_place(old.pool, key_file=key_file, passphrase=passphrase),
    )
    store = key_store(home, chosen.pool)
    open_keys(store, home.folder)  # first: where there is none, nothing is set up by half
    config.save(home.config_file, chosen)
    home.token()
    with closing(open_pool(home, writer=False, store=store)) as pool:
        level = ConsentLog(pool).level()
    console.print(f"edge at [bold]{home.folder}[/bold], model line {shown}, privacy level [bold]{level}[/bold]")
    if not encrypts():
        problems.print(f"the pool's encryption: {encryption()}; pip install sqlcipher3 before it is filled")
    typer.echo(f"next: {command(home, 'serve')}")


def _key_place(old: PoolConfig, *, key_file: bool, passphrase: bool) -> PoolConfig:
    """Where the key shall be. Raises BadParameter: two places were named."""
    if key_file and passphrase:
        raise typer.BadParameter("--key-file and --passphrase exclude each other")
    chosen = "file" if key_file else "passphrase" if passphrase else old.key
    return msgspec.structs.replace(old, key=chosen)


def _asked(server: UpstreamSettings) -> UpstreamSettings:
    """An upstream server's settings, with the name of its model. Raises ClawloopError: it does not say."""
    from clawloop_edge.engine.upstream_http import base_url
    from clawloop_edge.engine.upstream_open import served_model

    base_url(server.url)
    return msgspec.structs.replace(server, model=server.model or asyncio.run(served_model(server)))


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if name else ""


def serve(context: typer.Context) -> None:
    """Serve in the foreground until SIGTERM or Ctrl-C; a second one cuts the calls in flight."""
    from clawloop_edge.app import run

    run(home_of(context).require())


def status(context: typer.Context, as_json: Json = False) -> None:
    """Whether the edge runs, and how it is."""
    home = home_of(context).require()
    found = ask(home)
    if as_json:
        print_json(found)
    elif "process" in found:
        typer.echo(f"no answer: starting or stopping (process {found['process']})")
    elif not found["running"]:
        typer.echo(f"not running; start it with: {command(home, 'serve')}")
    else:
        print_table(("what", "is"), list(_told(found)), empty="")
    if not found["running"]:
        raise typer.Exit(1)


def _told(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Facts as a person reads them: one line a scorer, and what has a command of its own is named by it."""
    for name, value in facts.items():
        if name == "scorers":
            yield from ((f"scorer {scorer}", _plain(counts) or "nothing yet") for scorer, counts in value.items())
        elif name == "learning":
            missing = "; ".join(value.get("missing") or ())
            yield "learning", f"{value['state']}{f': {missing}' if missing else ''}" if value else "not here"
        elif name == "rewards":
            yield "rewards", "; ".join(value.get("warnings") or ()) or "nothing odd; see clawloop-edge rewards"
        else:
            yield name.replace("_", " "), _plain(value)


def _plain(value: object) -> str:
    """A value in words; of one with names only what says something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(each)}" for name, each in value.items() if each)
    return str(value)


def ask(home: EdgeHome) -> dict[str, Any]:
    """The running edge's own word on how it is; `state` is `ready`, or why it is not.

    `running` is false if nothing answers; `process` is then the one that has the pool for itself, if there is one.

    Raises:
        ConfigError: what answers at its address is not this edge.
    """
    gateway = home.load_config().gateway
    try:
        status, data = _get(gateway, "/v1/status", token=home.token())
        _, readiness = _get(gateway, "/readyz")
    except OSError:
        process = _process(home)
        return {"running": False, "process": process} if process else {"running": False}
    except HTTPException as error:
        raise _stranger(gateway, type(error).__name__) from error
    if status != HTTPStatus.OK:
        raise _stranger(gateway, f"status {status}")
    try:
        facts, ready = (msgspec.json.decode(said, type=dict[str, Any]) for said in (data, readiness))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _stranger(gateway, "no JSON") from error
    return {"running": True, "state": _state(home, ready), **facts}


def _get(gateway: GatewaySettings, path: str, *, token: str = "") -> tuple[int, bytes]:
    """Status and body. Raises OSError, HTTPException."""
    connection = HTTPConnection(gateway.host, gateway.port, timeout=_ANSWER_S)  # no proxy may see the token
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def _state(home: EdgeHome, readiness: dict[str, Any]) -> str:
    status, detail = readiness.get("status", ""), readiness.get("detail", "")
    if status == "draining":
        return f"stopping (process {_process(home)})"
    return f"{status}: {detail}" if detail and status != "ready" else str(status)


def _process(home: EdgeHome) -> int:
    """The process that has this home's pool for itself; 0 if none has."""
    from clawloop_edge.pool.lock import holder_of
    from clawloop_edge.pool.store import LOCK_NAME

    return holder_of(home.folder / LOCK_NAME)


def _stranger(gateway: GatewaySettings, answer: str) -> ConfigError:
    return ConfigError(
        f"{gateway.host}:{gateway.port} answers, but not as this edge does ({answer}); stop that program, "
        "or set another [gateway] port"
    )


def register(app: typer.Typer) -> None:
    for each in (setup, serve, status):
        app.command()(each)
