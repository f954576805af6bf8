"""`devices`: who was let in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    YesOption,
    confirm,
    group,
    open_server,
    print_facts,
    print_json,
    print_table,
    when,
)

if TYPE_CHECKING:
    from clawloop_server.hub.devices import Device
    from clawloop_server.vault.forgetting import Asked

app = group("The devices that were let in.")
DeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Device id, as `devices list` shows it.")]


def _facts(device: Device) -> dict[str, object]:
    from clawloop_shared.signing import key_words

    return {
        "device_id": device.device_id,
        "state": device.state.value,
        "adapter_version": device.adapter_version,
        "line_id": device.line_id,
        "node_id": device.node_id,
        "joined_ms": device.joined_ms,
        "seen_ms": device.seen_ms,
        "key": key_words(device.device_key) if device.device_key else "",
    }


@app.command("list")
def list_devices(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every device, oldest first."""
    with open_server(home) as server:
        found = server.devices.all()
    if as_json:
        print_json([_facts(device) for device in found])
        return
    columns = ("device", "state", "adapter", "joined", "last seen")
    rows = [(d.device_id, d.state.value, d.adapter_version, when(d.joined_ms), when(d.seen_ms)) for d in found]
    print_table("devices", columns, rows=rows)


@app.command()
def show(device: DeviceArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One device, and what it asked to have forgotten."""
    from clawloop_server.vault.forgetting import asked_of

    with open_server(home) as server:
        found, asked = server.devices.get(device), asked_of(server.vault.database, device)
    if as_json:
        print_json(_facts(found) | {"forgotten": asked})
        return
    facts = _facts(found) | {"joined_ms": when(found.joined_ms), "seen_ms": when(found.seen_ms)}
    print_facts("device", {name.removesuffix("_ms").replace("_", " "): value for name, value in facts.items()})
    if asked:
        columns = ("when", "request", "what", "deleted", "unknown", "adapters that had learned")
        print_table("asked to forget", columns, rows=[_asked(one) for one in asked])


def _asked(one: Asked) -> tuple[object, ...]:
    what = "everything" if one.everything else "named records"
    adapters = ", ".join(map(str, one.adapters)) or "none"
    return when(one.at_ms), one.request_id, what, one.deleted, one.unknown, adapters


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
    typer.echo(f"shredded {shredded.steps} steps and {shredded.signals} signals of device {device}")
    if shredded.rounds:
        typer.echo(f"{len(shredded.rounds)} rounds had learned from it; their adapters cannot unlearn: `rounds list`")
