"""`review`: what most needs a person's word, and taking it key by key."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from clawloop_edge.cli.context import Json, command, console, count, home_of, opened_pool, print_json, shown
from clawloop_edge.cli.moments import told

if TYPE_CHECKING:
    from clawloop_edge.pool.review import Needed
    from clawloop_edge.pool.store import Pool
    from clawloop_shared.signals import RewardRules

_KEYS = "g good · b bad · x not trainable · s skip · q quit"
_PAGES = 10


def review(
    context: typer.Context,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="How many at most.")] = 20,
    before: Annotated[int | None, typer.Option("--before", min=1, help="Before this place; printed if more.")] = None,
    as_json: Json = False,
) -> None:
    """What most needs a word of yours, latest first: sources disagree, only weak signs, nothing said, tagged review.

    At a terminal it shows each and asks; elsewhere, or with --json, it lists them.
    """
    rules = home_of(context).require().load_config().reward
    with opened_pool(context) as pool:
        found, following = _queue(pool, rules, limit=limit, before=before)
        if as_json:
            print_json({"steps": [each.facts() for each in found], "next": following})
            return
        if sys.stdin.isatty() and console.is_terminal:
            done = ask_all(pool, found, key=typer_key)
            console.print(f"{count(done, 'word')} kept")
        else:
            for each in found:
                show(each, now=datetime.now())
    if not found:
        console.print("nothing needs a word of yours")
    if following:
        typer.echo(f"more: {command(home_of(context), f'review --before {following}')}")


def _queue(pool: Pool, rules: RewardRules, *, limit: int, before: int | None) -> tuple[list[Needed], int | None]:
    """What needs a word, over as many pages as it takes, up to `_PAGES`."""
    from clawloop_edge.pool.review import queue

    found: list[Needed] = []
    for _ in range(_PAGES):
        page = queue(pool, rules=rules, now_ms=time.time_ns() // 1_000_000, limit=limit - len(found), before_seq=before)
        found, before = found + page.steps, page.next
        if before is None or len(found) == limit:
            break
    return found, before


def ask_all(pool: Pool, found: Iterable[Needed], *, key: Callable[[], str]) -> int:
    """Show each and do what the pressed key says; gives how many words were kept."""
    done = 0
    for each in found:
        show(each, now=datetime.now())
        console.print(_KEYS, style="dim")
        pressed = next(pressed for pressed in _keys(key) if pressed in "gbxsq")
        if pressed == "q":
            break
        if pressed != "s":
            _say(pool, each, pressed)
            done += 1
    return done


def _keys(key: Callable[[], str]) -> Iterator[str]:
    while True:
        pressed = key().lower()
        if pressed:
            yield "q" if pressed in "\x03\x04\x1b" else pressed[0]


def typer_key() -> str:
    """The key that is pressed next."""
    import click

    try:
        return click.getchar()
    except (KeyboardInterrupt, EOFError):
        return "q"


def _say(pool: Pool, each: Needed, pressed: str) -> None:
    """g and b are feedback on the step, as it comes through the gateway; x takes the step out of training."""
    from clawloop_edge.pool.curation import Word, curate
    from clawloop_edge.pool.review import TAG
    from clawloop_shared.ids import new_id
    from clawloop_shared.records import Signal, Target

    step_id, now_ms = each.step.line.step_id, time.time_ns() // 1_000_000
    untags = [TAG] if TAG in each.step.curated.tags else []
    if pressed == "x":
        curate(pool, Target.STEP, step_id, word=Word(trainable=False, untags=untags)).result()
        return
    signal = Signal(
        signal_id=new_id(),
        target=Target.STEP,
        target_id=step_id,
        source="user",
        value=1.0 if pressed == "g" else -1.0,
        created_ms=now_ms,
    )
    pool.keep_signal(signal).result()
    if untags:
        curate(pool, Target.STEP, step_id, word=Word(untags=untags)).result()


def show(each: Needed, *, now: datetime) -> None:
    """One of them, short."""
    line = each.step.line
    head = " · ".join(filter(None, (told(line.at_ms, now=now), line.app, line.step_id)))
    console.print(shown(head, style="bold"))
    console.print(shown("; ".join(each.why), style="yellow"))
    for who, text in (("user", each.question), ("assistant", each.answer)):
        console.print(shown(f"{who}: {text}" if text else f"{who}: (nothing)"))
    console.print()


def register(app: typer.Typer) -> None:
    app.command("review")(review)
