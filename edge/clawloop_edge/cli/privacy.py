"""`privacy`, `outbox`, `audit`: what may leave, what will leave, what has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_edge.cli.context import (
    Json,
    Yes,
    command,
    confirm,
    console,
    home_of,
    opened_pool,
    print_json,
    print_table,
    when,
)
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from clawloop_edge.privacy.outbox import Outbox

privacy = typer.Typer(help="Choose what may leave this device.", no_args_is_help=True)
outbox = typer.Typer(help="See what will leave, byte for byte, and stop it.", no_args_is_help=True)
audit = typer.Typer(help="See what has left.", no_args_is_help=True)

ItemId = Annotated[str, typer.Argument(help="As `outbox list` prints it.")]


def meaning(level: Level) -> str:
    """What a level lets out, in the words that a consent is given to; and which levels are not built."""
    from clawloop_edge.privacy.policy import TEXTS

    return TEXTS.get(level, "not built yet")


@contextmanager
def opened_outbox(context: typer.Context) -> Iterator[Outbox]:
    """The outbox of this home, with the hold time of its configuration."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox

    settings = home_of(context).require().load_config().privacy
    with opened_pool(context) as pool:
        yield Outbox(pool, ConsentLog(pool), hold_s=settings.hold_s)


@privacy.command("show")
def show_level(context: typer.Context, as_json: Json = False) -> None:
    """The level in force, and what each level means."""
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        state = ConsentLog(pool).state()
    level = state.level
    if as_json:
        print_json({"level": level, "means": meaning(level), "chosen": state.chosen, "reason": state.reason})
        return
    if state.chosen is not level:
        again = command(home_of(context), f"privacy set {state.chosen}")
        typer.echo(f"{state.chosen} was chosen, but {state.reason}; to allow it again: {again}")
    rows = [("→" if each is level else "", each, meaning(each)) for each in Level]
    print_table(("", "level", "what leaves"), rows, empty="")


@privacy.command("set")
def set_level(context: typer.Context, level: Level, yes: Yes = False, as_json: Json = False) -> None:
    """Change the level. A lower one holds at once and empties the queue; a higher one holds for what comes after."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.policy import policy_text

    if level is not Level.OFF:
        typer.echo(f"level {level}: {policy_text(level)}", err=as_json)
        confirm("Let that leave from now on?", yes=yes)
    with opened_pool(context) as pool:
        receipt = ConsentLog(pool).set_level(level)
    if as_json:
        print_json(receipt)
    else:
        console.print(f"level [bold]{level}[/bold]: {meaning(level)} (receipt {receipt.receipt_id})")


@privacy.command("receipts")
def list_receipts(context: typer.Context, as_json: Json = False) -> None:
    """Every level that was ever given, signed and chained."""
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        found = ConsentLog(pool).receipts()
    if as_json:
        print_json(found)
        return
    rows = [(r.receipt_id, r.level, when(r.given_ms), when(r.expires_ms)) for r in found]
    print_table(("receipt", "level", "given", "expires"), rows, empty="no level was ever given: it is off")


@outbox.command("list")
def list_items(context: typer.Context, as_json: Json = False) -> None:
    """Items that wait, are held, or were sent."""
    with opened_outbox(context) as items:
        found = items.list()
    if as_json:
        print_json(found)
        return
    rows = [(i.item_id, i.state, i.steps, i.signals, i.size_bytes, when(i.release_ms)) for i in found]
    print_table(("item", "state", "steps", "signals", "bytes", "may leave at"), rows, empty="the outbox is empty")


@outbox.command("show")
def show_item(context: typer.Context, item_id: ItemId) -> None:
    """Exactly what an item holds, as JSON."""
    from clawloop_shared import wire
    from clawloop_shared.records import StepBatch

    with opened_outbox(context) as items:
        item = items.get(item_id)
    print_json(wire.decode(item.body, StepBatch))


@outbox.command("approve")
def approve_item(context: typer.Context, item_id: ItemId) -> None:
    """Let an item leave now instead of after its hold."""
    with opened_outbox(context) as items:
        items.approve(item_id)


@outbox.command("drop")
def drop_item(context: typer.Context, item_id: ItemId) -> None:
    """Take an item out: it never leaves."""
    with opened_outbox(context) as items:
        items.drop(item_id)


@audit.command("show")
def show_audit(context: typer.Context, as_json: Json = False) -> None:
    """What happened to whatever left or was to leave; no content."""
    from clawloop_edge.privacy.audit import AuditLog

    with opened_pool(context) as pool:
        found = AuditLog(pool).entries()
    if as_json:
        print_json(found)
        return
    rows = [(e.seq, when(e.at_ms), e.kind, e.size_bytes, e.item_id) for e in found]
    print_table(("seq", "at", "what", "bytes", "item"), rows, empty="nothing ever left")


@audit.command("verify")
def verify_audit(context: typer.Context) -> None:
    """Check the chain of the audit log and of the receipts."""
    from clawloop_edge.privacy.audit import AuditLog
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        count, receipts = AuditLog(pool).verify(), ConsentLog(pool).receipts()
    console.print(f"{count} entries and {len(receipts)} receipts, unbroken")


def register(app: typer.Typer) -> None:
    app.add_typer(privacy, name="privacy")
    app.add_typer(outbox, name="outbox")
    app.add_typer(audit, name="audit")
