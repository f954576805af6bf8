"""`privacy`: what may leave this device, for how long, to whom, and what may not."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clawloop_edge.cli import audit, outbox
from clawloop_edge.cli.context import (
    Json,
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
    the_session,
    time_range,
    when,
)
from clawloop_edge.cli.forget import list_deletions
from clawloop_edge.cli.ledger import advice_for, show_budget
from clawloop_edge.cli.moments import duration_ms
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.consent import ConsentLog, ConsentState, Receipt
    from clawloop_edge.privacy.deletions import Deletion
    from clawloop_edge.privacy.forget import Gone
    from clawloop_edge.privacy.limits import Limit, Subject

group = typer.Typer(help="Choose what may leave this device.", no_args_is_help=True)

OfApp = Annotated[str, typer.Option("--app", help="Only for this agent, as `sessions list` names it.")]
OfSession = Annotated[str, typer.Option("--session", help="Only for this session; its beginning is enough.")]
Past = Annotated[bool, typer.Option("--include-past", help="Also what was kept until now; its count is shown first.")]
For = Annotated[str, typer.Option("--for", help="How long, like 30m, 2h or 1d.")]


@group.command("show")
def show_level(context: typer.Context, as_json: Json = False) -> None:
    """The level in force and what it means, limits, pauses, what is on its way, and why anything stays at home."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.deletions import Deletions
    from clawloop_edge.privacy.outbox import Outbox
    from clawloop_edge.privacy.policy import TEXTS

    with opened_pool(context) as pool:
        consent = ConsentLog(pool)
        state, limits = consent.state(), consent.limits()
        items = Outbox(pool, consent)
        totals, left_out, deletions = items.totals(), items.left_out(), Deletions(pool).waiting()
        advice = advice_for(context, pool)
    if as_json:
        on_the_way = {"outbox_waiting": totals.waiting, "outbox_unacknowledged": totals.unacknowledged}
        print_json({**facts(state, limits), **on_the_way, "left_out": left_out, "deletions_waiting": len(deletions)})
        return
    for line in _headlines(context, state):
        console.print(line)
    marked = [("→" if each is state.level else "", each, TEXTS[each]) for each in Level]
    print_table(("", "level", "what leaves"), marked, empty="", whole={"level"})
    if limits:
        rows = [(limit.subject, limit.name, limit.level, when(limit.set_ms)) for limit in limits]
        print_table(("at most for", "name", "level", "since"), rows, empty="")
    if state.chosen is Level.PRIVATE_DELTAS:
        console.print(shown(advice))
    for reason, number in left_out.items():
        console.print(shown(f"stayed at home: {count(number, 'record')}: {reason}"))
    for line in outbox.on_the_way(totals):
        console.print(f"outbox: {line}: {command(home_of(context), 'outbox list')}")
    if deletions:
        _print_deletions(context, deletions)


@group.command("set")
def set_level(
    context: typer.Context,
    level: Annotated[Level, typer.Argument(help=f"{', '.join(Level)}.", metavar="LEVEL")],
    app: OfApp = "",
    session: OfSession = "",
    include_past: Past = False,
    since: Since = "",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Change the level of this device, or set a lower one for an app or a session.

    A lower level holds at once and destroys what waits above it. A higher one holds for what comes after; with
    --include-past also for what was kept before, or --since some time.
    """
    if app or session:
        if include_past or since:
            raise typer.BadParameter("a limit of an app or a session lets nothing more out; leave --include-past away")
        _set_limit(context, level, app=app, session=session, yes=yes, as_json=as_json)
        return
    if since and not include_past:
        raise typer.BadParameter("--since says how much of the past; give --include-past with it")
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.policy import TEXTS

    with opened_pool(context) as pool:
        consent = ConsentLog(pool)
        if level is not Level.OFF:
            typer.echo(f"level {level}: {TEXTS[level]}", err=as_json)
            if level is Level.PRIVATE_DELTAS:
                typer.echo(advice_for(context, pool), err=as_json)
        past_after = _past(pool, consent, level, since=since, quiet=as_json) if include_past else None
        if level is not Level.OFF:
            confirm("Let that leave, until you say otherwise or a year has passed?", yes=yes)
        receipt = consent.set_level(level, past_after=past_after)
        state = consent.state()
    if as_json:
        print_json(receipt)
        return
    console.print(f"level [bold]{level}[/bold] (receipt {receipt.receipt_id})")
    if state.paused_until_ms:
        console.print(f"{state.reason}; nothing leaves until then")


@group.command("clear")
def clear_limit(context: typer.Context, app: OfApp = "", session: OfSession = "") -> None:
    """Take the limit off an app or a session: this device's level holds for what comes after."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.policy import GOES_ON

    with opened_pool(context) as pool:
        subject, name = _subject(context, pool, app=app, session=session)
        consent = ConsentLog(pool)
        consent.lift_limit(subject, name)
        level = consent.level()
    console.print(
        shown(f"{subject} {name} has no limit of its own any more; this device's level is {level}. {GOES_ON}")
    )


@group.command("pause")
def pause(context: typer.Context, duration: For, as_json: Json = False) -> None:
    """Let nothing leave for a time. What is said meanwhile never leaves, nor what follows it in the same session."""
    from clawloop_edge.privacy.consent import ConsentLog

    until_ms = time.time_ns() // 1_000_000 + duration_ms(duration)
    with opened_pool(context) as pool:
        ConsentLog(pool).pause(until_ms)
    if as_json:
        print_json({"paused_until_ms": until_ms})
        return
    console.print(f"nothing leaves until {when(until_ms)}; what waits in the outbox waits on")
    console.print("what is said until then never leaves, nor what follows it in the same session")
    console.print(f"to end it sooner: {command(home_of(context), 'privacy resume')}")


@group.command("resume")
def resume(context: typer.Context) -> None:
    """End a pause."""
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        consent = ConsentLog(pool)
        paused, level = consent.resume(), consent.level()
    console.print(f"the level is [bold]{level}[/bold] again" if paused else f"there is no pause; the level is {level}")


@group.command("receipts")
def list_receipts(context: typer.Context, as_json: Json = False) -> None:
    """Every level that was ever given, signed and chained; checked as they are read."""
    from clawloop_edge.privacy.consent import ConsentLog

    with opened_pool(context) as pool:
        found = ConsentLog(pool).receipts()
    if as_json:
        print_json(found)
        return
    rows = [(r.receipt_id, r.level, when(r.given_ms), when(_ends_ms(r)), r.doubt or r.recipient.url) for r in found]
    columns = ("receipt", "level", "given", "expires", "to, or why it was taken back")
    print_table(columns, rows, empty="no level was ever given: it is off", whole={"receipt", "level"})


def facts(state: ConsentState, limits: list[Limit]) -> dict[str, Any]:
    """What holds, as JSON values."""
    from clawloop_edge.privacy.policy import TEXTS

    receipt = state.receipt
    return {
        "level": state.level,
        "means": TEXTS[state.level],
        "chosen": state.chosen,
        "reason": state.reason,
        "paused_until_ms": state.paused_until_ms,
        "given_ms": receipt.given_ms if receipt else 0,
        "expires_ms": _ends_ms(receipt) if receipt else 0,
        "recipient": receipt.recipient.url if receipt else "",
        "purposes": receipt.purposes if receipt else [],
        "data": receipt.data if receipt else [],
        "limits": [{"subject": x.subject, "name": x.name, "level": x.level, "set_ms": x.set_ms} for x in limits],
    }


def _headlines(context: typer.Context, state: ConsentState) -> list[str]:
    receipt = state.receipt
    if receipt is None or (state.chosen is Level.OFF and not state.reason):
        return ["level [bold]off[/bold]: nothing leaves"]
    ends_ms = _ends_ms(receipt)
    asked = f", asked again {when(ends_ms)}" if ends_ms else ""
    lines = [f"level [bold]{state.level}[/bold], given {when(receipt.given_ms)}{asked}"]
    if state.paused_until_ms:
        resumed = command(home_of(context), "privacy resume")
        return [*lines, f"{state.chosen} was chosen, but {state.reason}; to end that: {resumed}"]
    if state.level is not state.chosen:
        again = command(home_of(context), f"privacy set {state.chosen}")
        return [*lines, f"{state.chosen} was chosen, but {state.reason}; to allow it again: {again}"]
    lines.append(f"what for: {', '.join(receipt.purposes)}; to: {receipt.recipient.url or 'no server was joined yet'}")
    return lines


def _ends_ms(receipt: Receipt) -> int:
    """When its owner is asked again; 0: never, for it lets nothing out."""
    return 0 if receipt.level is Level.OFF else receipt.expires_ms


def _print_deletions(context: typer.Context, deletions: list[Deletion]) -> None:
    """That servers have not signed yet for what they were asked to delete, and what the last of them said."""
    wait = "waits" if len(deletions) == 1 else "wait"
    see, last = command(home_of(context), "privacy deletions"), deletions[-1]
    said = f" (asked {count(last.tries, 'time')}: {last.problem})" if last.problem else ""
    number = count(len(deletions), "request")
    console.print(shown(f"{number} to delete {wait} for the server's signed word{said}: {see}"))


def _set_limit(context: typer.Context, level: Level, *, app: str, session: str, yes: bool, as_json: bool) -> None:
    """A limit lets nothing more out, but at a level at which devices learn something else: so that is asked."""
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.policy import TEXTS

    with opened_pool(context) as pool:
        subject, name = _subject(context, pool, app=app, session=session)
        if level.learns_at_home:
            typer.echo(f"level {level}: {TEXTS[level]}", err=as_json)
            if level is Level.PRIVATE_DELTAS:
                typer.echo(advice_for(context, pool), err=as_json)
            confirm(f"Let that leave of {subject} {name}, where this device's level allows it?", yes=yes)
        limit = ConsentLog(pool).set_limit(subject, name, level=level)
        known = {each.app for each in pool.step_counts()} if app else {app}
        left = _left(pool, app=app, session=name if session else "")
    if as_json:
        facts = {"subject": subject, "name": name, "level": limit.level, "set_ms": limit.set_ms}
        print_json({**facts, "left": [{"server": each.server.url, "records": each.records} for each in left]})
        return
    console.print(shown(f"{subject} {name}: at most {level} from now on; what waited above that is destroyed"))
    for each in left:
        where = each.server.url or "a server that is not known any more"
        console.print(shown(f"{count(each.records, 'name')} of it had left for {where} since {when(each.since_ms)}"))
    if left:
        forget = f"sessions forget {name}" if session else f"sessions forget --app {shlex.quote(name)}"
        console.print("to have it forgotten here and deleted there:")
        typer.echo(command(home_of(context), forget))
    if app not in known:
        named = ", ".join(sorted(filter(None, known))) or "none"
        console.print(shown(f"(nothing of {app} was kept yet; known are: {named})"))


def _left(pool: Pool, *, app: str, session: str) -> list[Gone]:
    """What of an app or a session had left before."""
    from clawloop_edge import state
    from clawloop_edge.privacy.forget import Forgetter, Wanted

    wanted = Wanted(app=app, session_ids=[session] if session else [])
    return Forgetter(pool, state.known_servers(pool)).preview(wanted).left


def _subject(context: typer.Context, pool: Pool, *, app: str, session: str) -> tuple[Subject, str]:
    """What a limit is for. Raises ConfigError: no such session. Raises BadParameter: not one of the two is named."""
    from clawloop_edge.privacy.limits import Subject

    if bool(app) == bool(session):
        raise typer.BadParameter("name one of --app and --session")
    return (Subject.APP, app) if app else (Subject.SESSION, the_session(context, pool, session))


def _past(pool: Pool, consent: ConsentLog, level: Level, *, since: str, quiet: bool) -> int:
    """The change after which the past may leave, told with its count and dates."""
    from clawloop_edge.privacy.preview import change_before, preview

    start_ms = time_range(since, "")[0]
    with pool.reading() as reading:
        after_seq = change_before(reading, start_ms) if start_ms else 0
        supposed = consent.state_in(reading.database).ladder.lowered(level).followed_by(level, after_seq=after_seq)
        found = preview(reading, consent.within(reading.database, supposed=supposed), after_seq=after_seq)
    for line in outbox.counted(found):
        typer.echo(f"the past: {line}", err=quiet)
    return after_seq


def register(app: typer.Typer) -> None:
    group.command("deletions")(list_deletions)
    group.command("budget")(show_budget)
    app.add_typer(group, name="privacy")
    outbox.register(app)
    audit.register(app)
