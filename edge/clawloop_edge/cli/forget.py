"""`sessions forget` and `privacy deletions`: having this device forget, and servers delete what they got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, SpinnerColumn, TextColumn

from clawloop_edge.cli.context import (
    App,
    Json,
    Since,
    Until,
    Yes,
    command,
    confirm,
    console,
    count,
    home_of,
    opened_pool,
    print_json,
    print_table,
    problems,
    shown,
    the_session,
    time_range,
    when,
)
from clawloop_edge.cli.listing import listing

if TYPE_CHECKING:
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.deletions import Deletion
    from clawloop_edge.privacy.forget import Done, Forgetter, Gone, Preview, Wanted

Sessions = Annotated[
    list[str] | None,
    typer.Argument(help="As `sessions list` prints them; their beginnings are enough.", metavar="SESSION..."),
]
Everything = Annotated[bool, typer.Option("--everything", help="All sessions, and what belongs to none.")]
KeepRemote = Annotated[bool, typer.Option("--keep-remote", help="Do not ask the server to delete what it got.")]

_SHOWN = 20
_TIMEOUT_S = 10.0
_DOING = {
    "search": "writing the search index anew",
    "key": "changing the pool's key",
    "log": "clearing the database's log",
}
_COPIES = (
    "Earlier copies of the pool (backups, snapshots of the disk) open no more with today's key; with a copy of the key "
    "from then they do, and so does a backup that holds its own keys."
)
_AGENT = "What your agent keeps itself, such as its own transcripts, is not touched."
_LEARNED = "An adapter that was trained on it cannot unlearn it"


def forget_sessions(
    context: typer.Context,
    sessions: Sessions = None,
    app: App = "",
    since: Since = "",
    until: Until = "",
    everything: Everything = False,
    keep_remote: KeepRemote = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Forget sessions for good: these, those of an agent, those in use in a time, or everything.

    Shows what goes and asks. Its keys are destroyed and the pool's key is changed, so that earlier copies of the pool
    cannot be read with it. A server that got any of it is asked to delete that, until it has signed that it did.
    A conversation that goes on in a forgotten session is answered and not kept.
    """
    from clawloop_edge import state
    from clawloop_edge.privacy.forget import Forgetter

    narrowed = bool(sessions or app or since or until)
    if narrowed == everything:
        raise typer.BadParameter("name sessions, --app, --since or --until; or give --everything alone")
    with opened_pool(context) as pool:
        forgetter = Forgetter(pool, state.known_servers(pool))
        named = [_session(context, pool, start=start, forgetter=forgetter) for start in sessions or []]
        wanted = _wanted(named, app=app, since=since, until=until)
        preview = forgetter.preview(wanted)
        adapters = _adapters_since(home_of(context), preview.left)
        if not preview.sessions and not everything:
            typer.echo("nothing that is kept is meant by that; nothing was forgotten", err=as_json)
            raise typer.Exit(1)
        if not as_json or not yes:  # what is asked about is shown; with --json it is no fact yet
            _print_preview(preview, adapters, keep_remote=keep_remote, to=problems if as_json else console)
        confirm(f"Forget {count(len(preview.sessions), 'session')} for good?", yes=yes)
        with _progress() as say:
            say("forgetting")
            done = forgetter.forget(preview, everything=everything, keep_remote=keep_remote)
            left_undone = forgetter.finish(lambda part: say(_DOING[part]))
            deletions = _ask(forgetter, done, say=say)
    cannot = _cannot_be_undone(preview, deletions, adapters=adapters, keep_remote=keep_remote)
    if as_json:
        print_json(_facts(done, deletions, unfinished=left_undone, cannot_be_undone=cannot))
    else:
        _print_done(context, done, deletions=deletions, unfinished=left_undone, cannot=cannot)


def list_deletions(context: typer.Context, as_json: Json = False) -> None:
    """What servers were asked to delete, and whether they signed that they did."""
    from clawloop_edge.privacy.deletions import Deletions

    with opened_pool(context) as pool:
        found = Deletions(pool).all()
    if as_json:
        print_json([_told(deletion) for deletion in found])
        return
    rows = [
        (
            when(deletion.asked_ms),
            deletion.server.url or "unknown",
            "everything" if deletion.everything else deletion.records,
            _state(deletion),
            ", ".join(map(str, deletion.adapters)),
        )
        for deletion in found
    ]
    empty = "no server was ever asked to delete anything"
    print_table(("asked", "server", "names", "state", "adapters that had learned"), rows, empty=empty)


def _session(context: typer.Context, pool: Pool, *, start: str, forgetter: Forgetter) -> str:
    """The session that begins so: one that is kept, or one that is not any more and of which something had left."""
    from clawloop_edge.pool.names import sessions_named

    left = forgetter.left_named(start)
    with pool.read() as database:
        kept = sessions_named(database, start, limit=1)
    return left[0] if len(left) == 1 and not kept else the_session(context, pool, start)


def _wanted(sessions: Sequence[str], *, app: str, since: str, until: str) -> Wanted:
    from clawloop_edge.privacy.forget import Wanted

    since_ms, until_ms = time_range(since, until)
    everything = not (sessions or app or since or until)
    return Wanted(
        session_ids=sessions,
        app=app,
        since_ms=since_ms,
        until_ms=1 << 62 if until_ms is None else until_ms - 1,
        everything=everything,
    )


def _adapters_since(home: EdgeHome, left: Iterable[Gone]) -> list[int]:
    """The adapters on this device that their servers made after they had got something of what goes."""
    from clawloop_edge.adapters.overview import kept_adapters
    from clawloop_edge.adapters.store import AdapterStore
    from clawloop_shared.signing import key_id

    found: set[int] = set()
    for gone in left:
        key = gone.server.release_key
        if key and (home.adapters / key_id(key)).is_dir():
            kept = kept_adapters(AdapterStore.of_key(home.adapters, key))
            found.update(adapter.version for adapter in kept if adapter.created_ms >= gone.since_ms)
    return sorted(found)


def _ask(forgetter: Forgetter, done: Done, *, say: Say) -> list[Deletion]:
    """Ask each server once now; the running edge asks again."""
    from clawloop_edge.node.deleting import ask

    found = []
    for request_id in done.requests:
        deletion = forgetter.deletions.get(request_id)
        say(f"asking {deletion.server.url} to delete it")
        found.append(ask(forgetter.deletions, request_id, timeout_s=_TIMEOUT_S))
    return found


class Say:
    """Says what is being done, in one line that goes again."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("")

    def __call__(self, what: str) -> None:
        self._progress.update(self._task, description=what)


@contextmanager
def _progress() -> Iterator[Say]:
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=problems, transient=True, disable=not problems.is_terminal) as progress:
        yield Say(progress)


def _print_preview(preview: Preview, adapters: Sequence[int], *, keep_remote: bool, to: Console) -> None:
    shortened = preview.sessions[:_SHOWN]
    to.print(listing(shortened, now=datetime.now()) if shortened else "no session is kept")
    if len(preview.sessions) > _SHOWN:
        to.print(f"... and {count(len(preview.sessions) - _SHOWN, 'session')} more")
    if preview.sessions:
        first, last = when(preview.first_ms), when(preview.last_ms)
        counts = f"{count(len(preview.sessions), 'session')} with {count(preview.steps, 'step')}"
        to.print(f"{counts}, from {first} to {last}")
    for gone in preview.left:
        where = gone.server.url or "a server that is not known any more"
        asked = "it keeps them" if keep_remote else "it is asked to delete them"
        names = f"{count(gone.records, 'name')} of steps, feedback and sessions"
        to.print(shown(f"{names} had left for {where} since {when(gone.since_ms)}; {asked}"))
    if not preview.left:
        to.print("nothing of it had left this device")
    if adapters:
        to.print(f"adapters here that may have been trained on it: {', '.join(map(str, adapters))}")


def _print_done(
    context: typer.Context, done: Done, *, deletions: Sequence[Deletion], unfinished: list[str], cannot: list[str]
) -> None:
    counts = f"{count(done.sessions, 'session')}, {count(done.steps, 'step')}, {count(done.signals, 'signal')}"
    console.print(f"forgotten: {counts} ({decimal(done.size_bytes)})")
    for deletion in deletions:
        console.print(shown(f"{deletion.server.url or 'a server'}: {_state(deletion)}"))
    if any(deletion.state == "waiting" for deletion in deletions):
        again = command(home_of(context), "privacy deletions")
        console.print(f"it is asked again while the edge runs; see {again}")
    for problem in unfinished:
        console.print(
            shown(f"not finished yet, tried again by the edge or the next command: {problem}"), style="yellow"
        )
    console.print("what cannot be undone:")
    for line in cannot:
        console.print(shown(f"- {line}"))


def _cannot_be_undone(
    preview: Preview, deletions: Sequence[Deletion], *, adapters: Sequence[int], keep_remote: bool
) -> list[str]:
    learned = sorted({*adapters, *(version for deletion in deletions for version in deletion.adapters)})
    lines = [_COPIES, _AGENT]
    if learned:
        lines.append(f"{_LEARNED}: {', '.join(map(str, learned))}. `adapters use 0` goes back to the base.")
    elif preview.left:
        lines.append(f"{_LEARNED}; no adapter is known to have been.")
    if keep_remote and preview.left:
        lines.append("The server keeps what it got, because you said so.")
    return lines


def _state(deletion: Deletion) -> str:
    """How far a request is, in words."""
    if deletion.state == "done":
        unknown = f", {count(deletion.unknown, 'name')} not known there" if deletion.unknown else ""
        return f"deleted {count(deletion.deleted, 'record')}, signed {when(deletion.done_ms)}{unknown}"
    if deletion.state == "gone":
        return f"deleted with this whole device, signed {when(deletion.done_ms)}"
    if deletion.state == "stranded":
        return "this device left that server before it could remember where it is; ask its operator to delete it"
    tried = f"asked {count(deletion.tries, 'time')}: {deletion.problem}" if deletion.tries else "not asked yet"
    return f"waiting, {tried}"


def _facts(
    done: Done, deletions: Sequence[Deletion], *, unfinished: list[str], cannot_be_undone: list[str]
) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(done)
    del facts["requests"]
    return {
        **facts,
        "deletions": [_told(deletion) for deletion in deletions],
        "unfinished": unfinished,
        "cannot_be_undone": cannot_be_undone,
    }


def _told(deletion: Deletion) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(deletion)
    return facts | {"server": deletion.server.url}
