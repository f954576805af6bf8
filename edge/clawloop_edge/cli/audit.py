"""`audit`: what has left, and what was forgotten, without content."""

from __future__ import annotations

import sys
from collections import deque
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.filesize import decimal

from clawloop_edge.cli.context import (
    Json,
    Limit,
    Since,
    command,
    console,
    count,
    home_of,
    opened_pool,
    print_json,
    print_table,
    time_range,
    when,
)
from clawloop_edge.cli.moments import told

if TYPE_CHECKING:
    from clawloop_edge.privacy.audit import AuditEntry

group = typer.Typer(help="See what has left.", no_args_is_help=True)

Item = Annotated[str, typer.Option("--item", help="Only of this outbox item; its beginning is enough.")]
File = Annotated[Path | None, typer.Argument(help="Where to; by default to standard output.")]

_KINDS = {
    "sent": "sent",
    "stopped": "broken off",
    "received": "received",
    "forget": "forgotten here",
    "forgotten": "deleted there",
    "rotated": "new keys",
    "left": "left the server",
    "restored": "restored",
    "rolled-back": "restored",
    "asked": "asked a model",
}
_RESTORES = {
    "restored": "this log and your receipts went on",
    "rolled-back": "what this log and your receipts had from then until that is lost",
}
_ITEM_CHARS = 13
"""of an item's or request's id, so that a line fits 80 columns; --json has them whole"""


@group.command("show")
def show_audit(
    context: typer.Context, since: Since = "", item: Item = "", limit: Limit = 100, as_json: Json = False
) -> None:
    """The latest entries: when, what, how much, at which level, and whether the server signed for it.

    `sent` is what was given to the network, `received` what the server has on its disk. --json has ids and times whole.
    """
    from clawloop_edge.privacy.audit import AuditLog
    from clawloop_edge.privacy.outbox import Outbox

    start_ms = time_range(since, "")[0]
    with opened_pool(context) as pool:
        item_id = Outbox(pool).find(item).item_id if item else ""
        found = list(deque(AuditLog(pool).entries(since_ms=start_ms, item_id=item_id), maxlen=limit))
    if as_json:
        print_json(found)
        return
    now = datetime.now()
    rows = [_row(entry, now=now) for entry in found]
    print_table(
        ("seq", "at", "what", "level", "size", "item"), rows, empty="nothing has left", whole={"seq", "at", "item"}
    )
    for entry in found:
        if entry.kind in _RESTORES:
            console.print(
                f"entry {entry.seq}: a backup of {when(entry.since_ms)} was restored; {_RESTORES[entry.kind]}"
            )


@group.command("verify")
def verify_audit(context: typer.Context, as_json: Json = False) -> None:
    """Check the audit log's chain, the server's signatures in it, and the chain of your own consent receipts."""
    from clawloop_edge.privacy.audit import AuditLog
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        report, receipts = AuditLog(pool).verify(), ConsentLog(pool).receipts()
    if as_json:
        print_json({**msgspec.to_builtins(report), "receipts": len(receipts)})
        return
    entries = "1 entry" if report.entries == 1 else f"{report.entries} entries"
    console.print(
        f"{entries} and {count(len(receipts), 'receipt')}, unbroken; "
        f"the server signed for {report.signed_by_server} of the entries"
    )
    if report.restored:
        lost = f", and {report.rolled_back} of these took back what had come since" if report.rolled_back else ""
        see = command(home_of(context), "audit show")
        console.print(f"{count(report.restored, 'backup')} restored{lost}: {see}")


@group.command("export")
def export_audit(context: typer.Context, file: File = None) -> None:
    """All entries as JSON, one a line, with the server's signatures; no content."""
    from clawloop_edge.privacy.audit import AuditLog

    with opened_pool(context) as pool:
        lines = (msgspec.json.encode(entry) + b"\n" for entry in AuditLog(pool).entries())
        if file is None:
            sys.stdout.buffer.writelines(lines)
            return
        with file.open("wb") as target:
            target.writelines(lines)
    console.print(f"written to {file}")


def _row(entry: AuditEntry, *, now: datetime) -> tuple[object, ...]:
    what = _KINDS.get(entry.kind, entry.kind) + (", signed" if entry.proof else "")
    return (
        entry.seq,
        told(entry.at_ms, now=now),
        what,
        entry.level,
        decimal(entry.size_bytes),
        entry.item_id[:_ITEM_CHARS],
    )


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="audit")
