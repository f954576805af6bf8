"""What the trainer does, as the hub hears it: the events that the child prints (`trainer/observing.py`), and what
follows from them about the round under way. Kept in memory alone; the database and `metrics.jsonl` have the rest.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clawloop_server.trainer.observing import Event, event_of, latest_events

Numbers = dict[str, float | None]
KEPT_EVENTS = 512

_log = logging.getLogger("clawloop.rounds")


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """The round under way. `updates` is how many it will have, as far as is known; `left_s` how long those that are not
    made will take, None before the first; `metrics` are those of the latest update."""

    round_id: str
    base_version: int
    trajectories: int
    updates: int
    done: int = 0
    learned: int = 0
    """trajectories that were learned from"""
    deltas: int = 0
    """of devices, that waited to join it when it began"""
    began_ms: int = 0
    elapsed_s: float = 0.0
    left_s: float | None = None
    metrics: Numbers = {}

    @property
    def deltas_alone(self) -> bool:
        """Whether it makes no update of its own, and joins what devices learned."""
        return not self.updates and not self.trajectories and self.deltas > 0

    @property
    def judging(self) -> bool:
        """Whether every update was made, so that what is left is the gate."""
        return 0 < self.updates <= self.done

    @property
    def summary(self) -> str:
        """The round in one line."""
        if self.deltas_alone:
            return f"{self.round_id}: joins {self.deltas} deltas, the gate judges"
        if self.judging:
            return f"{self.round_id}: {counted_updates(self.updates)} made, the gate judges"
        left = "" if self.left_s is None else f", about {duration(self.left_s)} left"
        speed = self.metrics.get("tokens_per_s")
        rate = "" if speed is None else f", {speed:,.0f} tokens/s"
        return f"{self.round_id}: update {self.done} of {self.updates}{rate}{left}"


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """Events after a number, and the number of the last. `training` is None while no round runs; `ready` says whether
    the trainer has loaded its model."""

    last: int
    events: list[Event]
    training: Training | None
    ready: bool = True


class TrainerEar:
    """Hears what the trainer says. Used on one thread (that of the event loop)."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = deque[Event](maxlen=KEPT_EVENTS)
        self._count = 0
        self._training: Training | None = None
        self._began_s = self._update_s = 0.0
        self._heard = 0
        self._ready = False
        self.update: Numbers = {}
        """the metrics of the latest update, of this round or the one before"""
        self.round: Numbers = {}
        """the numbers of the latest round that ended"""

    def remember(self, folder: Path) -> None:
        """Take from the trainer's folder what the latest update and round were before this server started."""
        latest = latest_events(folder)
        self.update, self.round = (numbers_of(latest.get(kind, {})) for kind in ("update", "round"))

    def hear(self, line: bytes) -> None:
        """Take one line of the trainer's output; what is no event is passed over."""
        event = event_of(line)
        if event is None:
            return
        self._events.append(event)
        self._count += 1
        self._ready = True
        if event["event"] == "began":
            self._begin(event)
        elif event["event"] == "update":
            self._update(event)
        elif event["event"] == "round":
            self._training, self.round = None, numbers_of(event)
            _log.info("%s", round_line(event))

    def lost(self) -> None:
        """The trainer died: no round is under way."""
        self._training, self._ready = None, False

    @property
    def training(self) -> Training | None:
        """The round under way, as of now."""
        found = self._training
        if found is None:
            return None
        now_s = self._clock()
        left_s = None
        if self._heard:
            each_s = (self._update_s - self._began_s) / self._heard
            left_s = max(0.0, each_s * (found.updates - found.done) - (now_s - self._update_s))
        return msgspec.structs.replace(found, elapsed_s=now_s - self._began_s, left_s=left_s)

    def after(self, number: int) -> Heard:
        """What was heard after the event of that number (0: all that is kept)."""
        new = min(len(self._events), max(0, self._count - number))
        events = list(self._events)[len(self._events) - new :]
        return Heard(last=self._count, events=events, training=self.training, ready=self._ready)

    def _begin(self, event: Event) -> None:
        self._began_s = self._update_s = self._clock()
        self._heard = 0
        self._training = Training(
            round_id=event["round_id"],
            base_version=_whole(event, "base_version"),
            trajectories=_whole(event, "trajectories"),
            updates=_whole(event, "updates"),
            done=_whole(event, "done"),
            learned=_whole(event, "learned"),
            deltas=_whole(event, "deltas"),
            began_ms=_whole(event, "at_ms"),
        )
        found = self._training
        deltas = f", {found.deltas} deltas" if found.deltas else ""
        _log.info("round %s begins with %d trajectories%s", found.round_id, found.trajectories, deltas)

    def _update(self, event: Event) -> None:
        self.update = numbers_of(event)
        if self._training is None or self._training.round_id != event["round_id"]:
            return
        self._heard += 1
        self._update_s = self._clock()
        before = self._training
        self._training = msgspec.structs.replace(
            before,
            done=_whole(event, "round_update", before.done + 1),
            updates=_whole(event, "round_updates", before.updates),
            learned=before.learned + _whole(event, "trajectories"),
            metrics=self.update,
        )


def numbers_of(event: Event) -> Numbers:
    """The numbers in an event, whichever there are; None for one that was not finite."""
    told = {name: value for name, value in event.items() if name not in ("event", "round_id", "at_ms")}
    return {name: value for name, value in told.items() if value is None or isinstance(value, int | float)}


def round_line(event: Event) -> str:
    """A round that ended, in one line."""
    learned, updates = _whole(event, "trajectories"), _whole(event, "updates")
    parts = [f"{learned} trajectories in {counted_updates(updates)}", duration(_number(event, "seconds"))]
    if event.get("reward") is not None:
        parts.append(f"reward {_number(event, 'reward'):+.3f}")
    if event.get("deltas"):
        parts.append(f"{event['deltas']} deltas joined")
    if event.get("set_aside"):
        parts.append(f"{event['set_aside']} set aside")
    if event.get("version"):
        parts.append(f"adapter {event['version']}")
    reason = f"; {event['reason']}" if event.get("reason") else ""
    return f"round {event['round_id']} {event.get('state', 'ended')}: {', '.join(parts)}{reason}"


def counted_updates(number: int) -> str:
    """`1 update`, `5 updates`."""
    return f"{number} update{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(event: Event, name: str) -> float:
    value: Any = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _whole(event: Event, name: str, otherwise: int = 0) -> int:
    value: Any = event.get(name, otherwise)
    return int(value) if isinstance(value, int | float) else otherwise
