"""`rounds watch`: the round under way as it goes, on a terminal or line by line. It asks the running server."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import msgspec

from clawloop_server.cli.common import ask_server, print_line
from clawloop_server.errors import FleetError
from clawloop_server.hub.training import Heard, Training, duration, numbers_of, round_line
from clawloop_server.trainer.observing import Event

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from clawloop_server.home import Home

_EVERY_S = 0.5
_WAITING_EVERY_S = 5.0
"""how often the database is counted while no round runs"""
_GUARDS = ("reward", "kept", "ess", "entropy", "k3", "gradient_norm")
_NARROW = 100
"""columns below which an id is cut short"""


def watch(home: Home, *, rounds: int, as_json: bool) -> None:
    """Show rounds as they go until `rounds` of them ended, or until Ctrl-C if 0.

    Raises:
        FleetError: no server runs, or it went away.
    """
    listener = Listener(home)
    live = sys.stdout.isatty() and not as_json
    try:
        if live:
            _draw(listener, rounds=rounds)
        else:
            _stream(listener, rounds=rounds, as_json=as_json)
    except KeyboardInterrupt:
        return


class Listener:
    """Asks a server for what its trainer said since it was asked last."""

    def __init__(self, home: Home) -> None:
        self._home, self._last = home, -1

    def new(self) -> Heard:
        """What is new; the first time, what was said of the round under way.

        Raises:
            FleetError: no server runs, or it went away.
        """
        first = self._last < 0
        heard = ask_server(self._home, f"/v1/training?after={max(0, self._last)}", Heard)
        if heard is None and first:
            raise FleetError(
                f"no server runs on {self._home.folder}; start it with `clawloop-server serve`,"
                " or see `clawloop-server rounds list` for the rounds that were"
            )
        if heard is None:
            raise FleetError("the server went away; `clawloop-server status` says how it is")
        self._last = heard.last
        if not first:
            return heard
        under_way = heard.training.round_id if heard.training else None
        events = [event for event in heard.events if event["round_id"] == under_way]
        return msgspec.structs.replace(heard, events=events)

    def waiting(self, heard: Heard) -> str:
        """What the next round waits for."""
        from clawloop_server.hub.status import ServerStatus

        status = ask_server(self._home, "/v1/status", ServerStatus)
        if status is None:
            return ""
        ready, needed = status.ready_trajectories, status.round_trajectories
        trainer = next((part for part in status.parts if part.name == "trainer"), None)
        if trainer is not None and trainer.summary != "up":
            return f"no round is under way; the trainer is {trainer.summary}"
        if not heard.ready:
            return "no round is under way; the trainer loads the model"
        deltas = f", and deltas: {status.deltas.summary}" if status.deltas.waiting else ""
        return f"no round is under way: {ready:,} of {needed:,} trajectories are ready for the next{deltas}"


def _stream(listener: Listener, *, rounds: int, as_json: bool) -> None:
    ended = 0
    while True:
        for event in listener.new().events:
            print_line(event if as_json else event_line(event))
            ended += event["event"] == "round"
            if rounds and ended >= rounds:
                return
        time.sleep(_EVERY_S)


def _draw(listener: Listener, *, rounds: int) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    ended, asked_s, waiting = 0, 0.0, ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            heard = listener.new()
            for event in heard.events:
                if event["event"] == "round":
                    console.print(round_line(event), highlight=False, soft_wrap=True)
                    ended, asked_s = ended + 1, 0.0
                    if rounds and ended >= rounds:
                        return
            if heard.training is None and time.monotonic() - asked_s > _WAITING_EVERY_S:
                asked_s, waiting = time.monotonic(), listener.waiting(heard)
            live.update(picture(heard.training, console) if heard.training else waiting, refresh=True)
            time.sleep(_EVERY_S)


def picture(training: Training, console: Console) -> RenderableType:
    """The round under way: a bar with its speed and time left, and below it what the guards look at."""
    from rich.console import Group
    from rich.text import Text

    return Group(_bar(training, narrow=console.width < _NARROW), Text(guards_line(training)))


def _bar(training: Training, *, narrow: bool) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn

    speed = training.metrics.get("tokens_per_s")
    told = [
        f"joins {training.deltas} deltas" if training.deltas_alone else f"{training.done}/{training.updates} updates",
        f"{speed:,.0f} tokens/s" if speed is not None else "",
        _left(training),
    ]
    name = f"round …{training.round_id[-6:]}" if narrow else f"round {training.round_id}"
    shown = [TextColumn(name, markup=False), BarColumn(bar_width=12 if narrow else 30)]
    bar = Progress(*shown, TextColumn("  ".join(filter(None, told)), markup=False), expand=False)
    bar.add_task("", total=max(1, training.updates), completed=training.done)
    return bar


def _left(training: Training) -> str:
    if training.judging:
        return "the gate judges"
    return "" if training.left_s is None else f"{duration(training.left_s)} left"


def guards_line(training: Training) -> str:
    """The numbers by which a round is judged, of the latest update, as far as it has them."""
    if training.deltas_alone:
        return f"{duration(training.elapsed_s)}  what devices learned at home is joined and judged"
    if not training.metrics:
        return f"{duration(training.elapsed_s)}  the first update is being made"
    numbers = {name: training.metrics.get(name) for name in _GUARDS}
    told = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items() if value is not None]
    return "  ".join([f"{training.learned} of {training.trajectories} trajectories", *told])


def event_line(event: Event) -> str:
    """An event in one line of text."""
    if event["event"] == "round":
        return round_line(event)
    if event["event"] == "ready":
        return "the trainer has loaded the model"
    numbers = numbers_of(event)
    if event["event"] == "began":
        deltas = f", {event['deltas']} deltas" if event.get("deltas") else ""
        return f"round {event['round_id']} begins with {numbers.get('trajectories') or 0:.0f} trajectories{deltas}"
    place = f"update {numbers.get('round_update') or 0:.0f} of {numbers.get('round_updates') or 0:.0f}"
    names = (*_GUARDS, "tokens_per_s")
    told = [f"{name}={value:.4g}" for name in names if (value := numbers.get(name)) is not None]
    return " ".join([f"round {event['round_id']} {place}", *told])
