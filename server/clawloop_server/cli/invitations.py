"""`invitations`: who may still join, and who did by which one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from clawloop_server.cli.common import HomeOption, JsonOption, group, open_server, print_json, print_table, when

if TYPE_CHECKING:
    from clawloop_server.hub.invitations import InvitationRecord

app = group("One-time invitations: `invite` makes one. Their codes are not kept, so none can be shown again.")
InvitationArgument = Annotated[
    str, typer.Argument(metavar="INVITATION", help="Its id, as `invitations list` shows it; the beginning is enough.")
]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _facts(found: InvitationRecord, now_ms: int) -> dict[str, object]:
    return {"state": found.state(now_ms).value, **msgspec.structs.asdict(found)}


@app.command("list")
def list_invitations(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Every invitation, oldest first: what it is good for, until when, and which device it let in."""
    from clawloop_server.hub.invitations import Invitations

    with open_server(home) as server:
        found = Invitations(server.vault.database).all()
    now_ms = _now_ms()
    if as_json:
        print_json([_facts(each, now_ms) for each in found])
        return
    columns = ("invitation", "state", "label", "made", "expires", "used", "device")
    rows = [
        (
            each.invitation_id,
            each.state(now_ms).value,
            each.label,
            when(each.created_ms),
            when(each.expires_ms),
            when(each.used_ms),
            each.device_id or "",
        )
        for each in found
    ]
    print_table("invitations", columns, rows=rows)


@app.command()
def revoke(invitation: InvitationArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Take back an invitation that nobody has used. A device that used one is put out by `devices revoke`."""
    from clawloop_server.hub.invitations import Invitations

    with open_server(home) as server:
        found = Invitations(server.vault.database).revoke(invitation.lower())
    if as_json:
        print_json(_facts(found, _now_ms()))
        return
    typer.echo(f"invitation {found.invitation_id} lets nobody in any more")
