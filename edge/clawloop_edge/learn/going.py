"""Whether what was begun may go on: asked again and again while something is chosen, read, learned or kept.

Knows of the device what `Place` says; no learner and no schedule.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from clawloop_edge.learn.power import Power
from clawloop_edge.learn.release import Releaser
from clawloop_edge.learn.runs import Run, Runs
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_shared.errors import ClawloopError
from clawloop_shared.records import Policy

_log = logging.getLogger(__name__)

_ASKED_EVERY_S = 0.5
"""how often it is looked whether what is learned from may still be"""
_POWER_EVERY_S = 5.0


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What the schedule knows of this device, each asked when it is needed: how long nobody has called (0: a call is in
    flight), where power comes from, the room on the disk and how much of it must stay, which policy serves, the files
    of its adapter, and the folder of its model."""

    idle_s: Callable[[], float]
    power: Callable[[], Power]
    free_bytes: Callable[[], int]
    served: Callable[[], Policy]
    adapter: Callable[[Policy], dict[str, bytes]]
    model: Path
    floor_bytes: int = 0


class Quiet:
    """Whether nobody has called since this was made, and the edge does not stop."""

    def __init__(self, place: Place, stopping: threading.Event) -> None:
        self._place, self._stopping, self._began_s = place, stopping, time.monotonic()

    def __call__(self) -> bool:
        """Whether it is so now."""
        return not self._stopping.is_set() and self._place.idle_s() >= time.monotonic() - self._began_s


class RunGoing:
    """Whether a run goes on, and keeping where it is."""

    def __init__(
        self,
        run: Run,
        runs: Runs,
        releaser: Releaser,
        *,
        consent: ConsentLog,
        place: Place,
        on_power: bool,
        stopping: threading.Event,
    ) -> None:
        self._run, self._runs, self._releaser, self._consent = run, runs, releaser, consent
        self._place, self._on_power, self._quiet = place, on_power, Quiet(place, stopping)
        self._asked_s = self._power_s = time.monotonic()
        self._on_battery = place.power() is Power.BATTERY
        self.broken = False

    def on(self) -> bool:
        """No: somebody calls, the plug was pulled, the owner lowered something, or the edge stops."""
        now_s = time.monotonic()
        if self.broken or not self._quiet():
            return False
        if now_s - self._power_s >= _POWER_EVERY_S:
            self._power_s = now_s
            if self._on_power and not self._on_battery and self._place.power() is Power.BATTERY:
                return False
        if now_s - self._asked_s >= _ASKED_EVERY_S:
            self._asked_s = now_s
            if self._consent.state().paused_until_ms or not self._releaser.may_go_on(self._run):
                self.broken = True
        return not self.broken

    def keep(self, state: bytes) -> None:
        """Keep the learner's state. Where that fails the run goes on; after a crash it would begin anew."""
        room = self._place.free_bytes() - self._place.floor_bytes
        if room < len(state):
            _log.warning("learning at home: %d bytes are not kept, with room for %d; free some disk", len(state), room)
            return
        try:
            self._runs.keep_state(self._run, state)
        except ClawloopError as error:
            _log.warning("learning at home: %s", error)
