"""`devices`: who was let in, and who waits to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    OpenServer,
    YesOption,
    confirm,
    counted,
    group,
    open_server,
    print_facts,
    print_json,
    print_table,
    when,
)

if TYPE_CHECKING:
    from clawloop_server.hub.devices import Device
    from clawloop_server.hub.telling import DeviceTold
    from clawloop_server.vault.forgetting import Asked

app = group("The devices that were let in, or wait to be.")
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Device id, as `devices list` shows it.")]


def _told(server: OpenServer, device: Device) -> DeviceTold:
    from clawloop_server.hub.telling import tell

    return tell(server.vault.database, server.registry, device)


@app.command("list")
def list_devices(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every device, oldest first. Of one that waits to be approved, the words to compare with its owner."""
    with open_server(home) as server:
        found = [_told(server, device) for device in server.devices.all()]
    if as_json:
        print_json(found)
        return
    columns = ("device", "state", "level", "adapter", "joined", "last seen", "items", "waits for")
    rows = [
        (d.device_id, d.state, d.level, d.adapter_version, when(d.joined_ms), when(d.seen_ms), d.items, _waiting(d))
        for d in found
    ]
    print_table("devices", columns, rows=rows)


def _waiting(device: DeviceTold) -> str:
    return f"your word; its words: {device.key}" if device.state == "waiting" else device.waits_for


@app.command()
def show(device: DeviceArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One device: how it stands, what it sent and waits for, what happened to it, what it asked to have forgotten."""
    from clawloop_server.vault.forgetting import asked_of

    with open_server(home) as server:
        found, asked = _told(server, server.devices.get(device)), asked_of(server.vault.database, device)
    if as_json:
        print_json(msgspec.structs.asdict(found) | {"forgotten": asked})
        return
    facts = {name.removesuffix("_ms").replace("_", " "): _plain(name, v) for name, v in _shown(found).items()}
    print_facts("device", facts)
    events = [(when(event.at_ms), event.what, event.detail) for event in found.events]
    print_table("what happened", ("when", "what", ""), rows=events)
    if asked:
        columns = ("when", "request", "what", "deleted", "unknown", "adapters that had learned")
        print_table("asked to forget", columns, rows=[_asked(one) for one in asked])


def _shown(device: DeviceTold) -> dict[str, object]:
    return {name: value for name, value in msgspec.structs.asdict(device).items() if name != "events"}


def _plain(name: str, value: object) -> object:
    if name.endswith("_ms"):
        return when(value) if isinstance(value, int) and value else ""
    if isinstance(value, dict):
        return ", ".join(f"{count} {state}" for state, count in value.items())
    return value


def _asked(one: Asked) -> tuple[object, ...]:
    what = "everything" if one.everything else "named records"
    adapters = ", ".join(map(str, one.adapters)) or "none"
    return when(one.at_ms), one.request_id, what, one.deleted, one.unknown, adapters


@app.command()
def approve(device: DeviceArgument, home: HomeOption = None, yes: YesOption = False) -> None:
    """Let a device that waits sync. Compare its words with those that its owner sees before you do."""
    _decide(home, device, question="Are these the words that its owner sees? Then it may sync.", yes=yes, let_in=True)
    typer.echo(f"device {device} may sync")


@app.command()
def reject(device: DeviceArgument, home: HomeOption = None, yes: YesOption = False) -> None:
    """Do not let a device in that waits. It must be invited again to come back."""
    _decide(home, device, question="Reject it?", yes=yes, let_in=False)
    typer.echo(f"device {device} is rejected")


def _decide(home: Path | None, device: str, *, question: str, yes: bool, let_in: bool) -> None:
    from clawloop_shared.signing import key_words

    with open_server(home) as server:
        found = server.devices.get(device)
        if found.waiting:
            typer.echo(f"words of device {device}: {key_words(found.device_key)}", err=True)
            confirm(question, yes=yes)
        (server.devices.approve if let_in else server.devices.reject)(device)


@app.command()
def revoke(device: DeviceArgument, home: HomeOption = None, yes: YesOption = False) -> None:
    """Let a device sync no more. What it sent is kept; `devices delete` shreds it."""
    with open_server(home) as server:
        server.devices.get(device)
        confirm(f"Revoke device {device}? It must be invited again to come back.", yes=yes)
        server.devices.revoke(device)
    typer.echo(f"device {device} is revoked")


@app.command()
def delete(
    device: DeviceArgument, home: HomeOption = None, yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Shred all that a device sent, and let it sync no more. This cannot be undone."""
    with open_server(home) as server:
        server.devices.get(device)
        confirm(f"Shred everything that device {device} sent? This cannot be undone.", yes=yes)
        server.devices.bury(device)
        shredded = server.vault.delete_device(device)
    if as_json:
        print_json(shredded)
        return
    found = f"{shredded.steps} steps, {shredded.signals} signals and {counted(shredded.deltas, 'delta')}"
    typer.echo(f"shredded {found} of device {device}")
    if shredded.adapters:
        named = ", ".join(map(str, shredded.adapters))
        typer.echo(f"adapters that had used any of it, or went on from one that had: {named}; they cannot unlearn")
    else:
        typer.echo("no adapter had used any of it")
