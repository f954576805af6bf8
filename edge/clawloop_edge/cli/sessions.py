"""`sessions`: looking at what was kept, and finding something in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.text import Text

from clawloop_edge.cli.context import (
    App,
    Json,
    Limit,
    SessionId,
    Since,
    Until,
    command,
    console,
    home_of,
    opened_pool,
    print_json,
    problems,
    shown,
    the_session,
    time_range,
)
from clawloop_edge.cli.forget import forget_sessions
from clawloop_edge.cli.listing import listing
from clawloop_edge.cli.moments import told

if TYPE_CHECKING:
    from clawloop_edge.pool.hits import Hit
    from clawloop_edge.pool.records import SessionSummary
    from clawloop_edge.pool.search import SearchIndex
    from clawloop_edge.pool.store import Pool

group = typer.Typer(help="Look at what was kept.", no_args_is_help=True)
_NOTHING = "nothing was kept yet; call the edge"
_PAGE = 200
_TAKEN_IN = 1000
_MANY = 2000
"""steps; with more to be taken in first, their progress is shown"""

Words = Annotated[list[str], typer.Argument(help="Words to look for.", metavar="WORDS...")]


@group.command("list")
def list_sessions(
    context: typer.Context,
    app: App = "",
    since: Since = "",
    until: Until = "",
    before: Annotated[str, typer.Option("--before", help="Those last used before this session.")] = "",
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """The latest sessions, last used first."""
    since_ms, until_ms = time_range(since, until)
    with opened_pool(context) as pool:
        before_ms = _last_used(context, pool, before)
        matching = (s for s in _sessions(pool, before_ms) if not app or s.app == app)
        found: list[SessionSummary] = []
        for session in matching:
            if session.last_ms < since_ms or len(found) > limit:
                break
            if until_ms is None or session.first_ms < until_ms:
                found.append(session)
    page, more = found[:limit], len(found) > limit
    if as_json:
        print_json(page)
        return
    if not page:
        narrowed = app or since or until or before
        console.print("no session is like that; leave an option out" if narrowed else _NOTHING)
        return
    console.print(listing(page, now=datetime.now()))
    if more:
        again = " ".join(
            [
                "sessions list",
                *_given(app=app, since=since, until=until),
                f"--before {shlex.quote(page[-1].session_id)}",
            ]
        )
        typer.echo(shown(f"more: {command(home_of(context), again)}"))


def _last_used(context: typer.Context, pool: Pool, start: str) -> int | None:
    if not start:
        return None
    session_id = the_session(context, pool, start)
    with pool.reading() as reading:
        session = reading.session(session_id)
    return session.last_ms if session else None


def _sessions(pool: Pool, before_ms: int | None) -> Iterator[SessionSummary]:
    """Sessions from the latest back, page by page. Of those last used in one millisecond all are given."""
    size, seen = _PAGE, set[str]()
    while True:
        page = pool.sessions(limit=size, before_ms=before_ms)
        fresh = [session for session in page if session.session_id not in seen]
        yield from fresh
        seen.update(session.session_id for session in fresh)
        if len(page) < size:
            return
        size = size if fresh else 2 * size
        before_ms = page[-1].last_ms + 1


@group.command("show")
def show_session(
    context: typer.Context,
    session_id: SessionId,
    full: Annotated[bool, typer.Option("--full", help="Everything: instructions, thoughts, whole results.")] = False,
    as_json: Json = False,
) -> None:
    """One session as a transcript: who said what, which tools were called, and what became of each step."""
    from clawloop_edge.cli.explain import facts
    from clawloop_edge.cli.transcript import print_session

    with opened_pool(context) as pool:
        name = the_session(context, pool, session_id)
        if as_json:
            with pool.reading() as reading:
                found = [facts(kept, tokens=False) for kept in reading.session_steps(name)]
            print_json(found)
        else:
            print_session(pool, name, full=full, now=datetime.now())


@group.command("search")
def search_sessions(
    context: typer.Context,
    words: Words,
    app: App = "",
    since: Since = "",
    until: Until = "",
    best: Annotated[bool, typer.Option("--best", help="The best of the latest hits first.")] = False,
    before: Annotated[
        int | None, typer.Option("--before", min=1, help="Hits before this place; printed if there are more.")
    ] = None,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Find words in what people, tools and the model said, latest first. All of them must be in one text.

    In one pair of quotes: 'docker* -compose "no such file"' finds what begins with docker, leaves out texts with
    compose, and takes no such file as it stands.
    """
    from clawloop_edge.pool.search import SearchIndex

    since_ms, until_ms = time_range(since, until)
    query = " ".join(words)
    with opened_pool(context) as pool:
        index = SearchIndex(pool)
        _catch_up(index)
        found = index.search(
            query,
            limit=limit + 1,
            before=before,
            app=app,
            since_ms=since_ms,
            until_ms=until_ms,
            best=best,
        )
    page = found[:limit]
    if as_json:
        print_json(page)
        return
    now = datetime.now()
    for hit in page:
        _print_hit(hit, now)
    if not page:
        narrowed = app or since or until or before
        hint = ", or leave an option out" if narrowed else ""
        console.print(
            shown(f"nothing found for {query}; fewer words find more, and so does a beginning like word*{hint}")
        )
    if len(found) > limit and not best:
        again = ["sessions search", *_given(app=app, since=since, until=until), f"--before {page[-1].place}"]
        typer.echo(shown(f"more: {command(home_of(context), ' '.join([*again, shlex.join(words)]))}"))


def _catch_up(index: SearchIndex) -> None:
    """Take in what was kept since the last search."""
    if not index.kept:
        typer.echo("no search index without SQLCipher: every step is read, which takes long", err=True)
        return
    total = index.catch_up(_TAKEN_IN)
    if total > _MANY:
        with Progress(console=problems, transient=True) as progress:
            task = progress.add_task("taking in what was kept", total=total)
            while left := index.catch_up(_TAKEN_IN):
                progress.update(task, completed=total - left)
    while index.catch_up(_TAKEN_IN):
        pass


def _print_hit(hit: Hit, now: datetime) -> None:
    head = shown(hit.title or hit.session_id, style="bold")
    head.append_text(shown(f"  {' · '.join(filter(None, (told(hit.at_ms, now=now), hit.app, hit.who)))}", style="dim"))
    console.print(head)
    console.print(_marked(hit))
    console.print(shown(f"{hit.step_id} in {hit.session_id}", style="dim"))
    console.print()


def _marked(hit: Hit) -> Text:
    line = shown(hit.snippet)
    for start, end in hit.marks:
        line.stylize("bold yellow", start, end)
    return line


def _given(**options: str) -> list[str]:
    """Options as they are typed again."""
    return [f"--{name} {shlex.quote(value)}" for name, value in options.items() if value]


def register(app: typer.Typer) -> None:
    group.command("forget")(forget_sessions)
    app.add_typer(group, name="sessions")
