"""What every command shares: the home, an opened pool, and how facts are printed."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clawloop_edge.cli.moments import FORMS, parse_moment
from clawloop_edge.home import EdgeHome
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

console = Console()
problems = Console(stderr=True)
_NAMED = 6
"""so many ids are named where one was asked for and several begin with it"""
T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Since = Annotated[str, typer.Option("--since", help=f"Not before this time: {FORMS}.")]
Until = Annotated[str, typer.Option("--until", help="Not after this time; a day counts whole.")]
App = Annotated[str, typer.Option("--app", help="Only of this agent, as `sessions list` names it.")]
SessionId = Annotated[
    str, typer.Argument(help="As `sessions list` prints it; its beginning is enough.", metavar="SESSION")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="How many at most.")]


def flow(app: typer.Typer) -> None:
    """Have the help of all commands break where the terminal's lines end, not where those of the source do."""
    for each in app.registered_commands:
        text = inspect.cleandoc(each.help or (each.callback and each.callback.__doc__) or "")
        each.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for group in app.registered_groups:
        if group.typer_instance is not None:
            flow(group.typer_instance)


def home_of(context: typer.Context) -> EdgeHome:
    """The home that `--home` or the environment names."""
    found = context.find_object(EdgeHome)
    return found or EdgeHome.at()


def command(home: EdgeHome, words: str) -> str:
    """A command to print: with `--home`, unless it would find this home by itself."""
    named = "" if home == EdgeHome.at() else f" --home {shlex.quote(str(home.folder))}"
    return f"clawloop-edge{named} {words}"


@contextmanager
def opened_pool(context: typer.Context) -> Iterator[Pool]:
    """The pool of this home, beside a running edge if there is one.

    Raises:
        ConfigError: no edge was set up here.
        KeyMissing: the pool's key is not where the configuration says.
    """
    from clawloop_edge.opening import open_pool

    pool = open_pool(home_of(context).require(), writer=False)
    try:
        yield pool
    finally:
        pool.close()


def the_session(context: typer.Context, pool: Pool, start: str) -> str:
    """The id of the session that begins with `start`, or that its agent calls so.

    Raises:
        ConfigError: there is none, or there are several.
    """
    from clawloop_edge.pool.names import sessions_named
    from clawloop_edge.sessions.names import SessionNames

    with pool.read() as database:
        found = sessions_named(database, start, limit=_NAMED)
        found = found or sessions_named(database, SessionNames(pool.tag).id_of(start), limit=1)
    listing = command(home_of(context), "sessions list")
    return _the_one(found, start, what="session", otherwise=f"`{listing}` shows those that are kept")


def the_step(context: typer.Context, pool: Pool, start: str) -> str:
    """The id of the step that begins with `start`, with or without what its API puts before it.

    Raises:
        ConfigError: there is none, or there are several.
    """
    from clawloop_edge.pool.names import steps_named

    with pool.read() as database:
        found = steps_named(database, start, limit=_NAMED)
    listing = command(home_of(context), "sessions show SESSION")
    return _the_one(found, start, what="step", otherwise=f"`{listing}` shows a session's steps with their ids")


def _the_one(found: Sequence[str], start: str, *, what: str, otherwise: str) -> str:
    if not found:
        raise ConfigError(f"no {what} {start} is kept here; {otherwise}")
    if len(found) > 1:
        more = ", ..." if len(found) == _NAMED else ""
        raise ConfigError(f"several {what}s begin with {start}: {', '.join(found)}{more}; give more of it")
    return found[0]


def time_range(since: str, until: str) -> tuple[int, int | None]:
    """The options `--since` and `--until` as ms since 1970, the second outside of the range.

    Raises:
        ConfigError: one of them is no time.
    """
    now = datetime.now()
    first = parse_moment(since, now=now) if since else 0
    return first, parse_moment(until, now=now, end=True) if until else None


def print_json(value: Any) -> None:
    """Facts for a program: one JSON value on stdout."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    empty: str,
    whole: Collection[str] = (),
    clipped: Collection[str] = (),
) -> None:
    """Facts for a person: a table, or the sentence `empty` if there is nothing.

    Columns named in `whole` keep their width, those in `clipped` their one line; the others are folded.
    """
    if not rows:
        console.print(empty)
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    for row in rows:
        cells = zip(columns, row, strict=True)
        table.add_row(*(on_one_line(cell) if column in clipped else shown(cell) for column, cell in cells))
    console.print(table)


def on_one_line(value: object, *, style: str = "") -> Text:
    """Like `shown`, on one line that ends where there is no more room."""
    text = shown(" ".join(str(value).split()), style=style)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def shown(value: object, *, style: str = "") -> Text:
    """What others wrote, as it is: no markup of ours is read in it, and no control character reaches the terminal."""
    text = str(value)
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), style=style)


def when(time_ms: int) -> str:
    """A time as a person reads it, in the local zone; empty for 0."""
    return datetime.fromtimestamp(time_ms / 1000).strftime("%Y-%m-%d %H:%M:%S") if time_ms else ""


def count(number: int, what: str) -> str:
    """So many things in words: `1 step`, `2 steps`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def confirm(question: str, *, yes: bool) -> None:
    """Ask on stderr, so that stdout holds facts alone, unless `yes`; leave with exit code 1 on a no."""
    if not yes and not answered(lambda: typer.confirm(question, err=True), instead="--yes"):
        raise typer.Exit(1)


def answered(ask: Callable[[], T], *, instead: str) -> T:
    """What the person said.

    Raises:
        ConfigError: there is no terminal to ask at; `instead` is the option to give.
    """
    try:
        return ask()
    except typer.Abort as error:
        if sys.stdin.isatty():
            raise
        typer.echo(err=True)
        raise ConfigError(f"there is no terminal to ask at; give {instead}") from error
