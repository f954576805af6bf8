"""`audit`: what has left, and what was forgotten, without content."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from clawloop_edge.cli.context import (
    Json,
    Limit,
    Since,
    console,
    opened_pool,
    print_json,
    print_table,
    time_range,
    when,
)

if TYPE_CHECKING:
    from clawloop_edge.privacy.audit import AuditEntry

group = typer.Typer(help="See what has left.", no_args_is_help=True)

Item = Annotated[str, typer.Option("--item", help="Only of this outbox item; its beginning is enough.")]
File = Annotated[Path | None, typer.Argument(help="Where to; by default to standard output.")]

_KINDS = {
    "sent": "given to the network",
    "stopped": "broken off while it was sent",
    "received": "the server has it",
    "forget": "forgotten here",
    "forgotten": "the server has deleted it",
}


@group.command("show")
def show_audit(
    context: typer.Context, since: Since = "", item: Item = "", limit: Limit = 100, as_json: Json = False
) -> None:
    """The latest entries: when, what, how much, at which level, and whether the server signed for it."""
    from clawloop_edge.privacy.audit import AuditLog
    from clawloop_edge.privacy.outbox import Outbox

    start_ms = time_range(since, "")[0]
    with opened_pool(context) as pool:
        item_id = Outbox(pool).find(item).item_id if item else ""
        found = list(deque(AuditLog(pool).entries(since_ms=start_ms, item_id=item_id), maxlen=limit))
    if as_json:
        print_json(found)
        return
    rows = [_row(entry) for entry in found]
    columns = ("seq", "at", "what", "level", "bytes", "item", "signed")
    print_table(columns, rows, empty="nothing has left", whole={"seq", "at", "item"})


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
    console.print(
        f"{report.entries} entries and {len(receipts)} receipts, unbroken; "
        f"the server signed for {report.signed_by_server} of the entries"
    )


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


def _row(entry: AuditEntry) -> tuple[object, ...]:
    what = _KINDS.get(entry.kind, entry.kind)
    signed = "yes" if entry.proof else ""
    return entry.seq, when(entry.at_ms), what, entry.level, f"{entry.size_bytes:,}", entry.item_id, signed


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="audit")
