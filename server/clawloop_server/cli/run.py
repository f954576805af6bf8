"""`serve` and `status`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    ask_server,
    counted,
    home_of,
    open_server,
    print_facts,
    print_json,
)

if TYPE_CHECKING:
    from clawloop_server.home import Home
    from clawloop_server.hub.status import Running, ServerStatus


def serve(home: HomeOption = None) -> None:
    """Run the server in the foreground until SIGTERM or Ctrl-C: hub, Flower, trainer."""
    import asyncio
    import importlib.util

    for needed in ("aiohttp", "flwr", "torch", "transformers", "peft"):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(f"no module {needed}", name=needed)
    from clawloop_server.config import load_config

    found = home_of(home)
    config = load_config(found.config)
    _log_to(found)
    from clawloop_server import app

    asyncio.run(app.serve(app.ServerApp(found, config), started=_tell))
    typer.echo("stopped")


def _tell(running: Running) -> None:
    typer.echo(f"serving devices at {running.url} (port {running.port})")
    typer.echo(f"admin API at http://127.0.0.1:{running.admin_port}, its token is in admin.token")
    typer.echo("let a device in: clawloop-server invite")


def _log_to(home: Home) -> None:
    from logging.handlers import RotatingFileHandler

    file = RotatingFileHandler(home.logs / "hub.log", maxBytes=10 << 20, backupCount=1)
    handlers: list[logging.Handler] = [logging.StreamHandler(), file]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO, handlers=handlers)
    logging.captureWarnings(True)


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """How the server is: devices, data, rounds, the current adapter, and its processes."""
    found = server_status(home)
    if as_json:
        print_json(found)
        return
    adapter, devices, rounds = found.adapter, found.devices, found.rounds
    facts: dict[str, object] = {
        "state": "running" if found.running else "not running",
        "url": found.url,
        "model line": found.line_id,
        "devices": f"{devices.joined} joined, {devices.online} online, {devices.revoked} revoked, {devices.left} left",
        "ready trajectories": f"{found.ready_trajectories} of {found.round_trajectories} for a round",
        "waiting deltas": found.deltas.summary,
        "rounds": f"{rounds.passed} passed, {rounds.refused} refused, {rounds.failed} failed",
        "round under way": under_way(found),
        "adapter": f"{adapter.version}, in use on {counted(adapter.in_use, 'device')}" if adapter else "none released",
    }
    if devices.waiting:
        facts["approval"] = f"{counted(devices.waiting, 'device')} waiting for your word; see `devices list`"
    if devices.doubled:
        facts["copied"] = f"two edges have the keys of {counted(devices.doubled, 'device')}; see `devices list`"
    if found.waiting_adapters:
        facts["waiting"] = f"{found.waiting_adapters} adapters are not released; see `clawloop-server adapters list`"
    if found.trouble:
        facts["nothing is kept"] = f"{found.trouble}; devices keep what they have, and send it when it can be"
    for device_id, reason in found.held_back.items():
        facts[f"device {device_id}"] = reason
    for part in found.parts:
        facts[part.name] = part.summary
    print_facts("clawloop server", facts)


def under_way(found: ServerStatus) -> str:
    """The round under way in one line."""
    if found.training is not None:
        return found.training.summary
    running = found.rounds.running
    return f"{running}, cut off; it goes on when the trainer runs" if running else "none"


def server_status(home: Any) -> Any:
    """The status as the running server tells it, or as its database does if none runs."""
    from clawloop_server.hub.status import ServerStatus, read_status

    folder = home_of(home)
    told = ask_server(folder, "/v1/status", ServerStatus)
    if told is not None:
        return told
    with open_server(home) as server:
        return read_status(server.home, server.config, vault=server.vault)
