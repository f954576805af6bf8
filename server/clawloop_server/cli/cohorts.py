"""`cohorts`: devices that learn apart, because one adapter cannot serve them all."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
import typer

from clawloop_server.cli.common import (
    HomeOption,
    JsonOption,
    OpenServer,
    YesOption,
    confirm,
    group,
    open_server,
    print_json,
    print_table,
)

app = group("Devices that learn apart from the others: their updates kept conflicting, or the operator said so.")
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]{0,31}")
MAIN = "everybody else"


class CohortTold(msgspec.Struct, frozen=True, kw_only=True):
    """One cohort; `cohort` is empty for all devices that are in none. `why` is what the round said that made it."""

    cohort: str
    devices: list[str]
    adapter_version: int
    round_id: str = ""
    why: str = ""


@app.command("list")
def list_cohorts(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every cohort: its devices, the adapter that they should have, and why they learn apart."""
    with open_server(home) as server:
        found = told(server)
    if as_json:
        print_json(found)
        return
    rows = [
        (one.cohort or MAIN, len(one.devices), one.adapter_version or "none", ", ".join(d[-8:] for d in one.devices))
        for one in found
    ]
    print_table("cohorts", ("cohort", "devices", "adapter", "which"), rows=rows)
    for one in found:
        if one.why:
            typer.echo(f"{one.cohort}: {one.why} (rounds explain {one.round_id})")


def told(server: OpenServer) -> list[CohortTold]:
    """What there is to tell of each cohort, that of everybody else first."""
    from clawloop_server.bases import find_base
    from clawloop_server.hub.devices import DeviceState

    line_id = find_base(server.home, server.config.hub.line).line_id
    joined = [d for d in server.devices.all() if d.state is DeviceState.JOINED and d.line_id == line_id]
    names = sorted({"", *(d.cohort for d in joined), *server.registry.cohorts(line_id)})
    reasons = _reasons(server)
    found = []
    for name in names:
        current = server.registry.current(line_id, cohort=name)
        round_id, why = reasons.get(name, ("", ""))
        found.append(
            CohortTold(
                cohort=name,
                devices=[d.device_id for d in joined if d.cohort == name],
                adapter_version=current.version if current else 0,
                round_id=round_id,
                why=why,
            )
        )
    return found


def _reasons(server: OpenServer) -> dict[str, tuple[str, str]]:
    """The round that made each cohort, and what it said."""
    found: dict[str, tuple[str, str]] = {}
    for round_ in server.registry.splits():
        for split in round_.metrics.get("split", []):
            found[split["cohort"]] = (round_.round_id, split["why"])
    return found


@app.command()
def move(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Device id, as `devices list` shows it.")],
    to: Annotated[str, typer.Option(metavar="NAME", help="A cohort, there or new; without, it leaves its own.")] = "",
    home: HomeOption = None,
    yes: YesOption = False,
) -> None:
    """Have a device learn with those of a cohort from now on, and get that cohort's adapters.

    Devices take no lower version than they have: where it has a higher one than that of the cohort, this is released
    again under a new one."""
    from clawloop_server.release.keys import load_keys
    from clawloop_server.release.release import give_again

    if to and not _NAME.fullmatch(to):
        raise typer.BadParameter(f"{to!r}: a name has up to 32 letters, digits and -", param_hint="--to")
    with open_server(home) as server:
        found = server.devices.get(device)
        confirm(f"Move device {device} from {found.cohort or MAIN} to {to or MAIN}?", yes=yes)
        registry, line_id = server.registry, found.line_id
        mine, keys = registry.current(line_id, cohort=found.cohort), load_keys(server.home)
        above, days = max(found.adapter_version, mine.version if mine else 0), server.config.release.expires_days
        with registry.within():
            server.devices.set_cohort(device, to)
            again = give_again(registry, keys, line_id=line_id, cohort=to, above=above, expires_days=days)
            current = registry.current(line_id, cohort=to)
    typer.echo(f"device {device} learns with {to or MAIN}")
    if again:
        typer.echo(f"their adapter is released again, as {again}: the device may have {above}, and takes none below")
    elif above and current is None:
        typer.echo(f"they have no adapter yet, so that it may keep {above} until there is one")
