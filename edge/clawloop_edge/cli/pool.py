"""`pool`: the encrypted database itself, its key, and copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from clawloop_edge.cli.context import (
    Json,
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
    when,
)
from clawloop_edge.config import PoolConfig
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.pool.keys import KeyStore
    from clawloop_edge.pool.moving import Spot
    from clawloop_edge.pool.verify import Progress

group = typer.Typer(help="The encrypted pool.", no_args_is_help=True)


class Where(StrEnum):
    """Where the pool's keys may be."""

    KEYCHAIN = "keychain"
    """the login Keychain"""
    FILE = "file"
    """a file of the owner's alone"""
    PASSPHRASE = "passphrase"
    """such a file, sealed by a passphrase"""


To = Annotated[Where, typer.Option("--to", help="The login Keychain, a 0600 file, or such a file under a passphrase.")]
NewPassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File whose first line is the new passphrase.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File whose first line is the passphrase of the backup's keys.")
]


@group.command("stats")
def show_stats(context: typer.Context, as_json: Json = False) -> None:
    """Counts and sizes, what encrypts it, where its key is, and how far its chain and its anchor are."""
    from clawloop_edge.pool.crypt import kek_version

    with opened_pool(context) as pool:
        stats, points = pool.stats(), pool.anchoring.read()
        with pool.read() as database:
            version = kek_version(database)
    key = {"place": pool.store.name, "version": version}
    anchor = {"seq": points[-1].seq, "at_ms": points[-1].at_ms} if points else None
    if as_json:
        print_json({**msgspec.to_builtins(stats), "key": key, "anchor": anchor})
        return
    rows = [
        ("steps", f"{stats.steps} in {count(stats.sessions, 'session')}, {stats.trainable} trainable"),
        ("signals", stats.signals),
        ("content", size(stats.payload_bytes)),
        ("on the disk", size(stats.file_bytes)),
        ("encryption", stats.encryption),
        ("key", f"version {version}, {pool.store.name}"),
        ("chain", count(stats.last_seq, "change")),
        ("anchor", f"change {points[-1].seq}, {when(points[-1].at_ms)}" if points else "none yet"),
    ]
    print_table(("what", "is"), rows, empty="")


@group.command("verify")
def verify(context: typer.Context, as_json: Json = False) -> None:
    """Open every sealed row, check the database and its chain of changes; exit 1 if anything is wrong."""
    from clawloop_edge.opening import prepare_rooms

    with opened_pool(context) as pool, _progress(as_json=as_json) as progress:
        prepare_rooms(pool)
        report = pool.verify(progress=progress)
    if as_json:
        print_json(report)
    else:
        counts = (
            f"{count(report.steps, 'step')} in {count(report.sessions, 'session')}, {count(report.signals, 'signal')}"
        )
        console.print(f"{counts}; all is as it was kept" if report.ok else counts)
        for problem in report.problems:
            console.print("[red]wrong:[/red]", shown(problem))
    if not report.ok:
        raise typer.Exit(1)


@group.command("ids")
def list_ids(context: typer.Context, as_json: Json = False) -> None:
    """The ids of every kept step, oldest first."""
    with opened_pool(context) as pool:
        found = pool.step_ids()
    if as_json:
        print_json(found)
        return
    for step_id in found:
        console.print(shown(step_id))


@group.command("rotate-key")
def rotate_key(context: typer.Context, as_json: Json = False) -> None:
    """Change the pool's key, also while the edge serves. Earlier copies of the pool open with nothing any more,
    except backups that had their keys sealed into them."""
    from clawloop_edge.pool.rotate import rotate

    with opened_pool(context) as pool:
        done = rotate(pool)
    if as_json:
        print_json(done)
    else:
        console.print(f"version {done.version} of the key is in force, and wraps {count(done.keys, 'key')}")
        console.print("backups from before open no more, unless their keys were sealed into them; make a new one:")
        typer.echo(command(home_of(context), "pool backup FILE"))


@group.command("passphrase")
def change_passphrase(context: typer.Context, passphrase_file: NewPassphraseFile = None) -> None:
    """Change the passphrase that opens the pool's keys; the edge must not run.

    The new one is asked for twice, or is the first line of --passphrase-file. The environment gives only the old one.
    """
    from clawloop_edge.opening import ask_passphrase, key_store
    from clawloop_edge.pool.keys import key_lock
    from clawloop_edge.pool.lock import FileLock
    from clawloop_edge.pool.passphrase import PassphraseKeyStore
    from clawloop_edge.pool.store import LOCK_NAME

    home = home_of(context).require()
    store = key_store(home, home.load_config().pool)
    if not isinstance(store, PassphraseKeyStore):
        there = command(home, "pool move-keys --to passphrase")
        raise ConfigError(f"no passphrase opens {store.name}; to have one: {there}")
    with FileLock.acquire(home.folder / LOCK_NAME), key_lock(home.folder):
        store.load()
        given = _first_line(passphrase_file) if passphrase_file else ""
        store.change(ask_passphrase(new=True, otherwise="--passphrase-file", environment=given))
    console.print("another passphrase opens", shown(store.name))
    console.print("earlier copies of that file still open with the old one; so that they open no pool of today:")
    typer.echo(command(home, "pool rotate-key"))


@group.command("move-keys")
def move_keys(context: typer.Context, to: To, as_json: Json = False) -> None:
    """Keep the pool's keys in another place from now on; the edge must not run.

    The new place is written and the pool opened with it before the configuration says so, and only then the old one is
    emptied. After a crash, do it again: what was left in the middle is removed. Of the configuration one line changes.
    """
    from clawloop_edge.opening import key_store
    from clawloop_edge.pool.moving import Spot
    from clawloop_edge.pool.moving import move_keys as move
    from clawloop_shared import config

    home = home_of(context).require()
    settings = home.load_config().pool
    source = Spot(settings.key, settings.key_file)
    target = _spot(home, source, to=to)
    stores: dict[Spot, KeyStore] = {}

    def store_at(spot: Spot) -> KeyStore:
        if spot not in stores:  # so that a passphrase is asked for once
            stores[spot] = key_store(home, PoolConfig(key=spot.key, key_file=spot.key_file))
        return stores[spot]

    def switch(spot: Spot) -> None:
        values = {"key": spot.key} | ({"key_file": spot.key_file} if spot.key_file != source.key_file else {})
        config.change(home.config_file, "pool", values=values)

    move(home.folder, source, target=target, store_at=store_at, switch=switch)
    if as_json:
        print_json({"key": target.key, "place": store_at(target).name})
        return
    moved = "is there already:" if source == target else "moved: the pool's keys are now the"
    console.print(moved, shown(store_at(target).name))


def _spot(home: EdgeHome, source: Spot, *, to: Where) -> Spot:
    """Where keys of a kind go: to the file that is named already, or beside it, if the present ones are in that."""
    from clawloop_edge.pool.moving import Spot

    if to == source.key or to is Where.KEYCHAIN or source.key == Where.KEYCHAIN:
        return Spot(to, source.key_file)
    own = home.key_file
    present = Path(source.key_file) if source.key_file else own
    return Spot(to, "" if present != own else str(own.with_name(f"{own.stem}.{to}{own.suffix}")))


@group.command("backup")
def back_up(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where to write it; it must not be there yet.")],
    with_keys: Annotated[
        bool, typer.Option("--with-keys", help="Put the keys into it, sealed by a passphrase that is asked for.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Write a verified copy of the pool to one file, also while the edge serves.

    Without its keys it opens only with this home's key as it is now: after the key is rotated, which each forgetting
    does, nothing opens it. With its keys (--with-keys, or --passphrase-file) it opens with the passphrase, for ever.
    """
    from clawloop_edge.opening import prepare_rooms
    from clawloop_edge.pool import backup
    from clawloop_edge.pool.passphrase import seal_keys

    passphrase = _passphrase(passphrase_file, new=True) if with_keys or passphrase_file else ""
    seal = partial(seal_keys, passphrase=passphrase) if passphrase else None
    with opened_pool(context) as pool, _progress(as_json=as_json) as progress:
        prepare_rooms(pool)
        done = backup.back_up(pool, file.expanduser().absolute(), seal=seal, progress=progress).manifest
    if as_json:
        print_json({**msgspec.to_builtins(done), "file": str(file), "with_keys": bool(passphrase)})
        return
    counts = f"{count(done.steps, 'step')} of {count(done.sessions, 'session')}"
    console.print(f"{counts}, {size(done.size_bytes)}:", shown(file))
    if passphrase:
        console.print("opens with its passphrase")
        return
    console.print(f"opens with key {done.key}, version {done.kek}, alone:", shown(pool.store.name))
    console.print("once that key is rotated, as each forgetting does, nothing opens it; --with-keys puts keys into it")


@group.command("restore")
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file of `pool backup`.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of the pool that is there, and all that was kept in it.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Put a backup into this home, whole and verified or not at all; the edge must not run.

    What was forgotten since the backup is forgotten again. The privacy level is `off` afterwards, and nothing that
    waited in the backup's outbox leaves.
    """
    from clawloop_edge.opening import key_store, prepare_rooms
    from clawloop_edge.pool import restore as restoring
    from clawloop_edge.privacy.returning import come_back

    home = home_of(context).require()
    if replace:
        confirm(f"Put {file} in the place of the pool in {home.folder}?", yes=yes)
    rooms = restoring.Rooms(adopt=prepare_rooms, mend=come_back)
    with _progress(as_json=as_json) as progress:
        done = restoring.restore(
            home.folder,
            file.expanduser().absolute(),
            store=key_store(home, home.load_config().pool),
            passphrase=partial(_passphrase, passphrase_file, new=False),
            replace=replace,
            rooms=rooms,
            progress=progress,
        )
    if done.unread:
        problems.print(
            f"the pool before could not be read ({done.unread}): what was forgotten in it is back", style="red"
        )
    if as_json:
        print_json(done)
        return
    console.print(f"restored: {count(done.steps, 'step')} of {count(done.sessions, 'session')}")
    if done.forgotten_again:
        console.print(f"forgotten again, as since the backup: {count(done.forgotten_again, 'session')}")
    console.print("the privacy level is [bold]off[/bold]; choose it anew with")
    typer.echo(command(home, "privacy set LEVEL"))


@group.command("accept")
def accept(context: typer.Context, yes: Yes = False, as_json: Json = False) -> None:
    """Take a pool that is older than its anchor says for the pool from now on, because you put it there yourself."""
    from clawloop_edge.errors import AnchorError
    from clawloop_edge.opening import key_store, open_pool
    from clawloop_edge.pool.store import Pool

    home = home_of(context).require()
    store = key_store(home, home.load_config().pool)
    problem = ""
    try:
        open_pool(home, writer=False, store=store).close()
    except AnchorError as error:
        problem = str(error)
        problems.print(shown(problem))
        confirm("Go on with the pool as it is? What it had after that is lost to it.", yes=yes)
    with Pool.open(home.folder, store, accept=bool(problem)) as pool:
        stats = pool.stats()
    if as_json:
        print_json({"accepted": bool(problem), "steps": stats.steps, "last_seq": stats.last_seq})
    elif problem:
        console.print(f"accepted: {count(stats.steps, 'step')}, {count(stats.last_seq, 'change')}")
    else:
        console.print("the pool is where its anchor says, or further; there is nothing to accept")


def size(size_bytes: int) -> str:
    """A size as a person reads it."""
    from rich.filesize import decimal

    return decimal(size_bytes)


@contextmanager
def _progress(*, as_json: bool) -> Iterator[Progress]:
    """Shows on a terminal's stderr what is being done, and how much of it is done."""
    from rich import progress

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn())
    with progress.Progress(
        *columns, console=problems, transient=True, disable=as_json or not problems.is_terminal
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def _passphrase(file: Path | None, *, new: bool) -> str:
    """Of the backup's keys. Raises ConfigError: the file cannot be read, or nobody is there to ask."""
    from clawloop_edge.opening import ask_passphrase

    if file is None:
        return ask_passphrase(new=new, what="the backup's keys", otherwise="--passphrase-file")
    return _first_line(file)


def _first_line(file: Path) -> str:
    """Raises ConfigError: the file cannot be read, or begins with nothing."""
    try:
        lines = file.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the passphrase file {file}: {error}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"the first line of {file} is empty; it is to be the passphrase")
    return lines[0]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="pool")
