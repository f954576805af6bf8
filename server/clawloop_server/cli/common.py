"""What every command needs: the home, the open server, and two ways to print facts (a table, or JSON)."""

from __future__ import annotations

import datetime
import http.client
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import msgspec
import typer

from clawloop_server import home as homes
from clawloop_server.home import Home
from clawloop_shared.errors import ConfigError

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help=f"The server's folder; also {homes.VARIABLE}.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


Told = TypeVar("Told")
_ANSWER_S = 5.0
_PIPE_WIDTH = 240
"""of a table that no terminal shows, so that ids stay whole"""


def group(summary: str) -> typer.Typer:
    """A group of commands that shows its help when none is named."""
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def folder_of(home: Path | None) -> Path:
    """The folder that a command named, or that was named before the command, or the default one."""
    context = click.get_current_context(silent=True)
    named = home or (context.find_object(Path) if context else None)
    return named.expanduser() if named is not None else homes.default_folder()


def home_of(home: Path | None) -> Home:
    """The initialised home that was named, or the default one.

    Raises:
        HomeError: there is none.
    """
    return homes.open_home(folder_of(home))


@dataclass(frozen=True)
class OpenServer:
    """A server's parts, as a command uses them beside a server that may be running."""

    home: Home
    vault: Any
    registry: Any
    devices: Any
    config: Any


@contextmanager
def open_server(home: Path | None) -> Iterator[OpenServer]:
    """Open the database of a server, and close it.

    Raises:
        HomeError, KeyMissing, ConfigError, StorageError: it cannot be opened.
    """
    from clawloop_server.config import load_config
    from clawloop_server.hub.devices import Devices
    from clawloop_server.release.keys import load_master_key
    from clawloop_server.release.registry import Registry
    from clawloop_server.vault.store import Vault

    found = home_of(home)
    config = load_config(found.config)
    vault = Vault.open(found, load_master_key(found), settings=config.reward)
    try:
        registry = Registry(vault.database, found.adapters)
        yield OpenServer(found, vault, registry, Devices(vault.database), config)
    finally:
        vault.close()


def ask_server(home: Home, path: str, kind: type[Told]) -> Told | None:
    """What the server that runs on this home answers; None if none is there: one that was killed leaves its note.

    Raises:
        FleetError: one is there, and does not answer in time.
        HomeError: its note or its token cannot be read.
    """
    from clawloop_server.errors import FleetError
    from clawloop_server.hub.status import read_running

    running = read_running(home)
    if running is None:
        return None
    port = running.admin_port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    token = homes.read_secret(home.admin_token).decode().strip()
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        response = connection.getresponse()
        body = response.read()
    except TimeoutError as error:
        raise FleetError(f"a server is on port {port} but did not answer in {_ANSWER_S:.0f} s; try again") from error
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return msgspec.json.decode(body, type=kind) if response.status == http.HTTPStatus.OK else None


def print_line(value: object) -> None:
    """`value` as one line on stdout, at once: text as it is, else JSON."""
    text = value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_json(value: object) -> None:
    """`value` as JSON on stdout. Bytes are left out by the caller: this prints facts for people and programs."""
    packed = msgspec.json.encode(value, enc_hook=str)
    typer.echo(msgspec.json.format(packed, indent=2).decode())


def table_width() -> int:
    """The columns that a table may have."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else _PIPE_WIDTH


def print_table(title: str, columns: Sequence[str], *, rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; numbers to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_edge=False, show_header=any(columns))
    shown = [list(row) for row in rows]
    for number, name in enumerate(columns):
        numeric = bool(shown) and all(isinstance(row[number], int | float) for row in shown)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=number == 0)
    for row in shown:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(width=table_width()).print(table)
    if not shown:
        typer.echo("(none)")


def print_facts(title: str, facts: dict[str, object]) -> None:
    """A table of two columns on stdout."""
    print_table(title, ("", ""), rows=facts.items())


def when(time_ms: int | None) -> str:
    """A time for people, in local time; empty for never."""
    if not time_ms:
        return ""
    return datetime.datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")


def confirm(question: str, *, yes: bool) -> None:
    """Return if the person agrees; else the command ends with exit 1. It asks on stderr: stdout holds facts alone.

    Raises:
        ConfigError: there is no terminal to ask at.
    """
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort as error:
        if sys.stdin.isatty():
            raise
        typer.echo(err=True)
        raise ConfigError("there is no terminal to ask at; give --yes") from error
    if not agreed:
        typer.echo("nothing was changed", err=True)
        raise typer.Exit(1)


def counted(number: int, what: str) -> str:
    """So many things in words: `1 device`, `2 trajectories`."""
    many = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else many}"


def parse_duration_s(text: str) -> float:
    """Seconds of `90s`, `30m`, `24h` or `7d`. Raises typer.BadParameter for anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isascii() or not number.isdigit():
        raise typer.BadParameter(f"{text!r} is no time such as 90s, 30m, 24h or 7d")
    return int(number) * units[unit]
