"""`outbox`: what will leave, byte for byte, before it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from clawloop_edge.cli.context import (
    Json,
    Limit,
    Since,
    Yes,
    command,
    confirm,
    console,
    count,
    home_of,
    opened_pool,
    print_json,
    print_table,
    shown,
    time_range,
)
from clawloop_edge.cli.deltas import held_by, learned_from, show_delta
from clawloop_edge.cli.marks import Marks
from clawloop_edge.cli.moments import told
from clawloop_edge.cli.service import ask
from clawloop_edge.cli.tokens import tokenizer_file
from clawloop_edge.errors import ConsentError
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.items import OutboxItem, OutboxTotals
    from clawloop_edge.privacy.outbox import Outbox
    from clawloop_edge.privacy.preview import Preview
    from clawloop_edge.privacy.transcript import Piece, Told
    from clawloop_shared.records import Signal, Step

group = typer.Typer(help="See what will leave, byte for byte, and stop it.", no_args_is_help=True)

ItemId = Annotated[str, typer.Argument(help="As `outbox list` prints it; its beginning is enough.", metavar="ITEM")]
ItemIds = Annotated[list[str] | None, typer.Argument(help="As `outbox list` prints them.", metavar="ITEM...")]
Raw = Annotated[bool, typer.Option("--raw", help="Write exactly the bytes that leave to standard output.")]
AllItems = Annotated[bool, typer.Option("--all", help="All that are held.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be put there.")]
AtLevel = Annotated[Level | None, typer.Option("--level", help="As if this were the level for all that is kept.")]

_SHORTEST, _ID_CHARS = 12, 26
_MARK_STYLE = "black on yellow"


@contextmanager
def opened_outbox(context: typer.Context) -> Iterator[tuple[Outbox, ConsentLog, Pool]]:
    """The outbox of this home, with the hold times of its configuration. It has nothing to redact with."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox

    settings = home_of(context).require().load_config().privacy
    with opened_pool(context) as pool:
        consent = ConsentLog(pool)
        yield Outbox(pool, consent, hold_s=settings.hold_s, hold_redacted_s=settings.hold_redacted_s), consent, pool


@group.command("list")
def list_items(context: typer.Context, limit: Limit = 50, as_json: Json = False) -> None:
    """What waits, what is held until when, and what was sent or has arrived; the latest last. With --json all of it."""
    with opened_outbox(context) as (items, consent, pool):
        found = items.list(limit=None if as_json else limit)
        level, totals = consent.level(), items.totals()
        titles = _titles(pool, {item.session_id for item in found if item.delta is None})
    if as_json:
        print_json(found)
        return
    width, now = _unique(found), datetime.now()
    rows = [
        (
            item.item_id[:width],
            titles.get(item.session_id) or learned_from(item),
            item.level,
            _holds(item),
            _fate(item, level, now=now),
        )
        for item in found
    ]
    columns = ("item", "session", "level", "holds", "what happens")
    print_table(columns, rows, empty="the outbox is empty", whole={"item", "level"}, clipped={"session"})
    for line in on_the_way(totals):
        console.print(line)
    if totals.waiting:
        see, stop = (command(home_of(context), f"outbox {word} ITEM") for word in ("show", "drop"))
        console.print(f"read one: {see}; take one out: {stop}")


@group.command("show")
def show_item(context: typer.Context, item_id: ItemId, raw: Raw = False, as_json: Json = False) -> None:
    """What an item says, with ▇ where something was taken out; --json: all of it decoded; --raw: its very bytes."""
    from clawloop_shared import wire
    from clawloop_shared.records import StepBatch

    with opened_outbox(context) as (items, consent, pool):
        item = items.find(item_id)
        body = items.get(item.item_id).body
        if raw:
            sys.stdout.buffer.write(body)
            return
        if item.delta is not None:
            fate = _fate(item, consent.level(), now=datetime.now())
            show_delta(
                context, pool, item, body=body, fate=f"{_holds(item)}, level {item.level}; {fate}", as_json=as_json
            )
            return
        batch = wire.decode(body, StepBatch)
        if as_json:
            print_json(batch)
            return
        title = _titles(pool, {item.session_id})[item.session_id]
        fate = _fate(item, consent.level(), now=datetime.now())
        steps = _told(context, pool, item, steps=batch.steps)
        hints = _hints(context, batch.signals)
    console.print(shown(f"item {item.item_id}: {title}", style="bold"))
    if title != item.session_id and not _say(steps, title, level=item.level):
        console.print("(this title is only here: it is not in what leaves)", style="dim")
    console.print(shown(f"{_holds(item)}, level {item.level}; {fate}", style="dim"))
    for each in steps:
        _print_step(each)
    for signal in batch.signals:
        console.print(shown(_signal(signal, hints.get(signal.signal_id, ""))))
    for mark in batch.marks:
        word = "may be learned from again" if mark.trainable else "must not be learned from"
        console.print(shown(f"mark: step {mark.step_id}, which has left, {word}"))


@group.command("approve")
def approve_items(
    context: typer.Context, item_ids: ItemIds = None, every: AllItems = False, yes: Yes = False, as_json: Json = False
) -> None:
    """Let items leave now instead of after their hold."""
    if bool(item_ids) == every:
        raise typer.BadParameter("name items, or give --all")
    with opened_outbox(context) as (items, consent, _):
        chosen = [item for item in items.list() if item.state == "queued"] if every else _named(items, item_ids)
        if every and chosen:
            confirm(f"Let {count(len(chosen), 'item')} leave ({_size_of(chosen)})?", yes=yes)
        before = [items.approve(item.item_id) for item in chosen]
        changed, level = [items.find(item.item_id) for item in before], consent.level()
    then = _what_then(context, level) if changed else "nothing is held, so there is nothing to approve"
    if as_json:
        print_json({"items": changed, "then": then})
        return
    for item in changed:
        console.print(f"{item.item_id} " + ("was sent already" if item.has_left else "need not wait any longer"))
    console.print(then)


@group.command("drop")
def drop_items(context: typer.Context, item_ids: ItemIds = None, yes: Yes = False, as_json: Json = False) -> None:
    """Take items out: they never leave, and their bytes are destroyed. What is said of their steps later stays too."""
    if not item_ids:
        raise typer.BadParameter("name at least one item")
    with opened_outbox(context) as (items, _, _):
        chosen = _named(items, item_ids)
        for item in chosen:
            if item.has_left:
                raise ConsentError(_left_already(context, item))
        confirm(f"Take {count(len(chosen), 'item')} out for good ({_size_of(chosen)})?", yes=yes)
        for item in chosen:
            items.drop(item.item_id)
        changed = [items.find(item.item_id) for item in chosen]
        telling = {told.item_id for item in chosen for told in items.telling_of(item.item_id)}
    if as_json:
        print_json({"items": changed, "signals_in": sorted(telling)})
        return
    for item in changed:
        console.print(f"{item.item_id} dropped; it never leaves")
    if telling:
        console.print("what was said of these steps waits in another item; to take that out too:")
        typer.echo(command(home_of(context), f"outbox drop {' '.join(sorted(telling))}"))


@group.command("fill")
def fill(
    context: typer.Context, dry_run: DryRun = False, level: AtLevel = None, since: Since = "", as_json: Json = False
) -> None:
    """Put what is new into the outbox, as the running edge does by itself every few seconds.

    With --dry-run nothing is put there: it tells what would be, also for another level (of all that is kept, or --since
    some time).
    """
    if (level or since) and not dry_run:
        raise typer.BadParameter("--level and --since only tell what would be; give --dry-run with them")
    with opened_outbox(context) as (items, consent, pool):
        if not dry_run:
            made, waits = items.fill(), items.waits_for_redactor()
            console.print(f"{count(made, 'item')} made")
            if waits:
                raise ConfigError("the rest must be redacted, which the running edge does: start it with `serve`")
            return
        from clawloop_edge.privacy.ladder import Ladder
        from clawloop_edge.privacy.preview import change_before, preview
        from clawloop_edge.privacy.schema import read_cursor

        start_ms = time_range(since, "")[0]
        with pool.reading() as reading:
            new = level is None and not since
            after = read_cursor(reading.database, pool.keyring) if new else 0
            after = change_before(reading, start_ms) if start_ms else after
            supposed = Ladder.flat(level) if level else None
            found = preview(reading, consent.within(reading.database, supposed=supposed), after_seq=after)
    if as_json:
        print_json(found)
        return
    for line in counted(found):
        console.print(f"would be put into the outbox: {line}")


def counted(found: Preview) -> list[str]:
    """A preview in words."""
    if not found.steps:
        return ["no trainable step"]
    now = datetime.now()
    span = f"{told(found.first_ms, now=now)} to {told(found.last_ms, now=now)}"
    lines = [f"{count(found.steps, 'trainable step')} of {count(found.sessions, 'session')}, {span}"]
    for each in found.apps if len(found.apps) > 1 else ():
        lines.append(f"{each.steps} of {count(each.sessions, 'session')} of {each.app or 'unknown programs'}")
    return lines


def on_the_way(totals: OutboxTotals) -> list[str]:
    """How many items have yet to leave, and how many the server has not acknowledged, in words; nothing if none."""
    lines = []
    if totals.waiting:
        lines.append(f"{count(totals.waiting, 'item')} {'waits' if totals.waiting == 1 else 'wait'}")
    if totals.unacknowledged:
        lines.append(f"{count(totals.unacknowledged, 'item')} sent, not yet acknowledged by the server")
    return lines


def _titles(pool: Pool, session_ids: Iterable[str]) -> dict[str, str]:
    """What to call each session: its title, else its id."""
    with pool.reading() as reading:
        found = {session_id: reading.session(session_id) for session_id in session_ids}
    return {session_id: (known.title if known else "") or session_id for session_id, known in found.items()}


def _unique(items: Sequence[OutboxItem]) -> int:
    """How many characters tell these items apart."""
    widths = range(_SHORTEST, _ID_CHARS)
    return next((n for n in widths if len({item.item_id[:n] for item in items}) == len(items)), _ID_CHARS)


def _holds(item: OutboxItem) -> str:
    if item.delta is not None:
        return f"{held_by(item.delta)}, {_size(item.size_bytes)}"
    parts = [count(item.steps, "step")]
    if item.signals:
        parts.append(count(item.signals, "signal"))
    if item.marks:
        parts.append(count(item.marks, "mark"))
    if item.redacted_tokens:
        parts.append(f"{count(item.redacted_tokens, 'token')} taken out")
    return ", ".join([*parts, _size(item.size_bytes)])


def _size(size_bytes: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} B"


def _fate(item: OutboxItem, level: Level, *, now: datetime) -> str:
    """What has become of an item, or will."""
    from clawloop_edge.privacy.schema import ItemState

    if item.state is ItemState.DROPPED:
        return "dropped, never left"
    if item.state is ItemState.RECEIVED:
        gone = "" if item.has_bytes else ", its bytes are destroyed here"
        return f"the server has it since {told(item.received_ms, now=now)}{gone}"
    if item.goes_masked and item.has_left:
        return "went into a secure sum, masked"
    if item.state is ItemState.SENT:
        return "sent, not yet acknowledged" if item.has_bytes else "sent in part or whole, then withdrawn"
    if item.level.rank > level.rank:
        return f"waits, as the level is {level} now"
    held = item.state is ItemState.QUEUED and now.timestamp() * 1000 < item.release_ms
    return f"held until {told(item.release_ms, now=now)}" if held else "leaves when the server asks next"


def _told(context: typer.Context, pool: Pool, item: OutboxItem, *, steps: Sequence[Step]) -> list[Told]:
    """The steps as text; none if the model's tokenizer is not on this disk."""
    from clawloop_edge.privacy.redact.machine import detector
    from clawloop_edge.privacy.transcript import told as tell

    model = home_of(context).load_config().model.path
    file = tokenizer_file(model)
    if file is None:
        if steps:
            hint = "so no text is shown; --json shows the ids"
            console.print(shown(f"(the tokenizer of {model or 'the model'} is not on this disk, {hint})"))
        return []
    decode = _decoder(file)
    marks = Marks(pool, item.item_id, decode=decode, detector=lambda: detector(home_of(context)))
    return list(tell(steps, decode, kind_of=marks.kind))


def _decoder(file: Path) -> Callable[[Sequence[int]], str]:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    return lambda ids: str(backend.decode(list(ids), skip_special_tokens=False))


def _print_step(one: Told) -> None:
    step = one.step
    console.rule(f"step {step.step_id}", style="dim", align="left")
    if one.repeated:
        console.print(f"({one.repeated:,} tokens as in the step before)", style="dim")
    console.print(_line(one.prompt, style="dim"))
    console.print(_line(one.response))


def _line(pieces: Sequence[Piece], *, style: str = "") -> Text:
    line = Text()
    for piece in pieces:
        line.append_text(shown(piece.text, style=_MARK_STYLE if piece.redacted else style))
    return line


def _hints(context: typer.Context, signals: Sequence[Signal]) -> dict[str, str]:
    """What the hints of signals say, by signal; where the tokenizer is not at hand, how many tokens they are."""
    hints = {signal.signal_id: signal.hint for signal in signals if signal.hint}
    file = tokenizer_file(home_of(context).load_config().model.path) if hints else None
    if file is None:
        return {signal_id: count(len(hint.token_ids), "token") for signal_id, hint in hints.items()}
    decode = _decoder(file)
    return {signal_id: decode(hint.token_ids).strip() for signal_id, hint in hints.items()}


def _signal(signal: Signal, hint: str) -> str:
    words = f': "{signal.comment}"' if signal.comment else ""
    shown_by = f" ({signal.evidence})" if signal.evidence else ""
    learned = f"; a hint goes with it: {hint}" if hint else ""
    return f"{signal.value:+g} by {signal.source} on {signal.target} {signal.target_id}{shown_by}{words}{learned}"


def _named(items: Outbox, item_ids: Sequence[str] | None) -> list[OutboxItem]:
    """The items that are named, each once. Raises PoolError: there is none of that name, or there are several."""
    found = [items.find(item_id) for item_id in item_ids or ()]
    return list({item.item_id: item for item in found}.values())


def _left_already(context: typer.Context, item: OutboxItem) -> str:
    """That an item cannot be taken back, and what to do instead."""
    how = "the server has it" if item.state == "received" else "it was sent, at least in part"
    if item.delta is not None and item.sessions:
        forget = command(home_of(context), f"sessions forget {item.sessions[0]}")
        instead = f"to have the server delete it, forget a session that it learned from: {forget}"
    elif item.session_id:
        instead = f"to have the server delete it: {command(home_of(context), f'sessions forget {item.session_id}')}"
    else:
        asked = command(home_of(context), "privacy deletions")
        instead = f"its session was forgotten here; what the server was asked to delete: {asked}"
    return f"item {item.item_id} has left: {how}; {instead}"


def _what_then(context: typer.Context, level: Level) -> str:
    """What happens to items that need not wait any longer, and when."""
    if not level.sends_items:
        return f"they leave once the level allows it; it is {level} now"
    home = home_of(context)
    try:
        status = ask(home)
    except ClawloopError:
        status = {"running": False}
    if not status["running"]:
        return f"they leave once the edge runs, which it does not now: {command(home, 'serve')}"
    if not status.get("server"):
        return f"they leave once a server was joined: {command(home, 'join INVITATION')}"
    return f"they leave when the server asks next (sync: {status.get('server_state', 'unknown')})"


def _say(steps: Sequence[Told], title: str, *, level: Level) -> bool:
    """Whether a title is in what leaves. Where no text can be shown, it is, unless something was taken out."""
    if not steps:
        return level is Level.FULL
    pieces = (piece for each in steps for piece in (*each.prompt, *each.response) if not piece.redacted)
    return title.rstrip("…") in " ".join(" ".join(piece.text for piece in pieces).split())


def _size_of(items: Iterable[OutboxItem]) -> str:
    return _size(sum(item.size_bytes for item in items))


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="outbox")
