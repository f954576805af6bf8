"""A round that runs: pinned when it begins, gone on with after a crash, begun again without what was forgotten since.

After an update, at most every `checkpoint_every_s`, the whole state is published as one file, `running.safetensors`. It
is gone on from if it is of this round, of the adapter and the settings that this round began with, and if all that it
learned from is still to be learned from. An update in which the process ends hard is tried again as it was; the second
time with rows of half the size; after the third its largest trajectory is set aside. What ends hard on and on is not
killed by the data: the round is given up then, and what it had is let go. Knows no gate.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from clawloop_server.errors import TrainerError
from clawloop_server.release.records import UnderWay
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.checkpoint import read_text
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import Plan, Progress, Report, RoundResult, TrainState, plan_round, run_plan
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import ClawloopError, StorageError
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.records import Trajectory
from clawloop_shared.rows import Limits

_log = logging.getLogger("clawloop.trainer")

RUNNING_FILE = "running.safetensors"
MAX_DEATHS = 3
"""hard ends in one update after which its largest trajectory is set aside"""
DEADLY = "the trainer ended hard three times in its update"
DEADLY_READ = "the trainer ended hard three times while it was screened"
MOST_DEADLY = 2
"""trajectories that are set aside for hard ends in one round, before these are not the data's fault"""
PLANNING = -1
"""stands for an update while the round is planned"""
GIVEN_UP = "it is not the data's fault, which wait for another round; see the trainer's log, free memory and the device"


class LessonsLost(TrainerError):
    """What the round learned from was forgotten, or taken out by its owner, since."""


class NothingLeft(TrainerError):
    """All that a round had was forgotten or taken out, and nothing else is ready."""

    def __init__(self, round_id: str) -> None:
        super().__init__(f"all that round {round_id} had was forgotten or taken out by its owners")
        self.round_id = round_id


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a checkpoint within a round: which it is of, and how far it is."""

    round_id: str
    base_version: int
    settings: str
    row_tokens: int
    progress: Progress


class RunningRound:
    """The round of a line that runs. The engine is at the adapter that it begins with when this is made."""

    def __init__(
        self,
        *,
        engine: TrainEngine,
        vault: Vault,
        registry: Registry,
        folder: Path,
        line_id: str,
        state: TrainState,
        limits: Limits,
        cohort: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: where the checkpoint is; `state`: that of the adapter, whose version it names; `cohort`: whose.

        Raises:
            NothingLeft: the round that was cut off has nothing any more.
            TrainerError: nothing is ready.
        """
        self._engine, self._vault, self._registry, self._limits = engine, vault, registry, limits
        self._path, self._line_id, self._start, self._clock = folder / RUNNING_FILE, line_id, state, clock
        self._cohort = cohort
        self._settings = _fingerprint(engine, vault, line_id=line_id)
        self.under_way = self._pinned()
        self.given_up = ""
        """why it must not go on, for a reason that is not the data's fault; empty: it may"""
        self._count_attempt()
        if not self.given_up:
            try:
                self._plan()
            except (ClawloopError, KeyboardInterrupt):
                self.rest()
                raise
        self.plan = self._planned()
        self.progress = (not self.given_up and self._resumed()) or Progress(state=state)
        self._saved_s = clock()

    @property
    def round_id(self) -> str:
        """Its id."""
        return self.under_way.round_id

    @property
    def may_join(self) -> bool:
        """Whether deltas may join it: not if what comes after its updates ended hard twice: it may be their fault."""
        return self.under_way.deaths.get(len(self.plan.batches), 0) < MAX_DEATHS - 1

    def begins(self) -> None:
        """Note that the first update is being worked on, though what looks at its data is not the update itself: a hard
        end in it counts."""
        self._note(at_update=0)

    def run(self, report: Report) -> RoundResult:
        """Make the updates that are left.

        Raises:
            LessonsLost: begin again.
            TrainerError: there is nothing that can be used.
        """
        result = run_plan(
            self._engine,
            self.plan,
            read=self._read,
            progress=self.progress,
            limits=self._limits,
            report=report,
            keep=self._keep,
        )
        self._note(at_update=len(self.plan.batches))
        return result

    def check(self) -> None:
        """See that all that the round learned from may still be learned from.

        Raises:
            LessonsLost: it may not; make the round anew.
        """
        if self._lost(self.progress):
            raise LessonsLost(f"round {self.round_id} learned from what was forgotten since; it begins again without")

    def begin_again(self) -> None:
        """Note that the round is made anew without what it learned from and is lost."""
        self._vault.pins.begin_again(self.round_id, self._lost(self.progress))
        self.rest()

    def consume(self) -> None:
        """Have the round consume what was pinned to it and is not lost. Part of the transaction that is open."""
        pins = self._vault.pins
        ids = [pin.trajectory_id for pin in pins.of(self.round_id) if not pin.lost]
        self._vault.consume(self.round_id, pins.rewards(ids))
        pins.release(self.round_id)

    def release(self) -> None:
        """Let go of what was pinned to the round, for another one. Part of the transaction that is open."""
        self._vault.pins.release(self.round_id)

    def rest(self) -> None:
        """Note that nothing is being worked on: what ends the process now has nothing to do with an update."""
        self._note(at_update=None)

    def ended(self) -> None:
        """Remove what only this round could go on from."""
        self._path.unlink(missing_ok=True)

    # what it learns from

    def _pinned(self) -> UnderWay:
        """The round that was cut off if it can be gone on with, else one of what is ready now."""
        found = self._registry.under_way(self._line_id)
        live = found and any(not pin.lost for pin in self._vault.pins.of(found.round_id))
        of_this = (self._settings, self._start.version, self._cohort)
        if found and live and (found.settings, found.base_version, found.cohort) == of_this:
            return found
        round_id = found.round_id if found else new_id()
        with self._vault.database.write():
            most = self._engine.settings.round_trajectories
            trajectories, steps = self._vault.pin(round_id, self._line_id, most, cohort=self._cohort)
            if trajectories:
                self._registry.start_round(
                    self._line_id,
                    base_version=self._start.version,
                    trajectories=trajectories,
                    steps=steps,
                    round_id=round_id,
                    settings=self._settings,
                    row_tokens=self._engine.row_tokens,
                    cohort=self._cohort,
                )
        under_way = self._registry.under_way(self._line_id)
        if not trajectories and found:
            raise NothingLeft(round_id)
        if not trajectories or under_way is None:
            raise TrainerError("no rewarded trajectory is ready; a round needs signals such as /v1/feedback")
        return under_way

    def _plan(self) -> None:
        """Decide which update learns from what, unless it is decided."""
        if self.under_way.rejected_steps is not None:
            return
        self._note(at_update=PLANNING)
        ids = sorted(pin.trajectory_id for pin in self._vault.pins.of(self.round_id) if not pin.reason)
        unreadable = dict[str, str]()
        read = self._vault.pins.read(ids, unreadable=unreadable)
        plan = plan_round(read, self._engine.settings, rounds=self._start.rounds, limits=self._limits)
        if len(unreadable) == len(ids) > 1:
            self.given_up = f"none of {len(ids)} trajectories can be read ({unreadable[ids[0]]}); see keys and settings"
        _tell_of(unreadable)
        with self._vault.database.write():
            self._vault.pins.plan(self.round_id, plan.batches, set_aside=plan.set_aside | unreadable)
            self._note(rejected_steps=plan.rejected_steps, at_update=None)

    def _planned(self) -> Plan:
        batches, set_aside = list[list[str]](), dict[str, str]()
        for pin in self._vault.pins.of(self.round_id):
            if pin.at_update is not None:
                batches += ([] for _ in range(pin.at_update + 1 - len(batches)))
                batches[pin.at_update] += [] if pin.lost else [pin.trajectory_id]
            elif pin.reason:
                set_aside[pin.trajectory_id] = pin.reason
        return Plan(batches=batches, set_aside=set_aside, rejected_steps=self.under_way.rejected_steps or {})

    def _read(self, number: int, trajectory_ids: Sequence[str]) -> list[Trajectory]:
        self.check()
        self._note(at_update=number)
        unreadable = dict[str, str]()
        found = list(self._vault.pins.read(trajectory_ids, unreadable=unreadable))
        if unreadable:
            _tell_of(unreadable)
            self._vault.pins.set_aside(self.round_id, unreadable)
            self.plan.set_aside.update(unreadable)
        return found

    def _lost(self, progress: Progress) -> set[str]:
        """What was learned from and may not be learned from any more."""
        return set(progress.learned) - {pin.trajectory_id for pin in self._vault.pins.of(self.round_id) if not pin.lost}

    # how often it was tried

    def _note(self, **fields: object) -> None:
        self.under_way = msgspec.structs.replace(self.under_way, **fields)
        self._registry.keep(self.under_way)

    def _count_attempt(self) -> None:
        """Count this attempt, and in which update the last one ended hard, if it did; draw the consequences."""
        died_at, deaths = self.under_way.at_update, dict(self.under_way.deaths)
        row_tokens = self.under_way.row_tokens
        with self._vault.database.write():
            if died_at is not None:
                deaths[died_at] = deaths.get(died_at, 0) + 1
                _log.warning("round %s: ended hard in update %d, time %d", self.round_id, died_at, deaths[died_at])
                if deaths[died_at] == MAX_DEATHS - 1 and died_at != PLANNING:
                    row_tokens = max(1, row_tokens // 2)
                if deaths[died_at] >= MAX_DEATHS:
                    self.given_up = self._set_aside(died_at)
                    deaths[died_at] = 0
            attempts = self.under_way.attempts + 1
            self._note(attempts=attempts, at_update=None, deaths=deaths, row_tokens=row_tokens)

    def _set_aside(self, at_update: int) -> str:
        """Set the largest trajectory of an update aside; or why it is not the data's fault."""
        pins = self._vault.pins.of(self.round_id)
        if sum(pin.reason in (DEADLY, DEADLY_READ) for pin in pins) >= MOST_DEADLY:
            return f"the trainer ended hard again after {MOST_DEADLY} trajectories were set aside for it; {GIVEN_UP}"
        planning, reason = at_update == PLANNING, DEADLY_READ if at_update == PLANNING else DEADLY
        found = self._vault.pins.set_largest_aside(self.round_id, None if planning else at_update, reason=reason)
        if not found:
            last = max((pin.at_update for pin in pins if pin.at_update is not None), default=PLANNING)
            where = "in one update" if planning or at_update <= last else "while this round was judged"
            return f"the trainer ended hard three times {where}; {GIVEN_UP}"
        _log.error("round %s: trajectory %s is set aside: %s", self.round_id, found, reason)
        return ""

    # where it goes on

    def _keep(self, progress: Progress) -> None:
        """Publish the whole state, unless that was done a moment ago."""
        self.progress = progress
        if self._clock() - self._saved_s < self._engine.settings.checkpoint_every_s:
            return
        running = Running(
            round_id=self.round_id,
            base_version=self.under_way.base_version,
            settings=self._settings,
            row_tokens=self._engine.row_tokens,
            progress=progress,
        )
        # JSON as Python writes it: metrics may be infinite or not a number.
        text = json.dumps(msgspec.to_builtins(running, str_keys=True))
        try:
            self._engine.save_state(self._path, text=text)
        except (StorageError, OSError) as error:  # a round does not need it unless it is cut off
            _log.error("%s cannot be saved; after a crash this round goes on from before: %s", self._path.name, error)
        self._saved_s = self._clock()

    def _resumed(self) -> Progress | None:
        """How far the round was when it was cut off, the engine there too; None if it begins at its beginning."""
        running = self._last()
        self._engine.row_tokens = min(self._engine.row_tokens, self.under_way.row_tokens)
        if running is None:
            return None
        self._engine.load_state(self._path)
        self._engine.row_tokens = min(self._engine.row_tokens, running.row_tokens)
        progress, updates = running.progress, len(self.plan.batches)
        _log.info("round %s goes on at update %d of %d", self.round_id, progress.at_update, updates)
        return progress

    def _last(self) -> Running | None:
        """The checkpoint of this round, if it may be gone on from; what may not is removed."""
        if not self._path.exists():
            return None
        try:
            running = msgspec.convert(json.loads(read_text(self._path)), Running, str_keys=True)
        except (StorageError, ValueError, msgspec.ValidationError) as error:
            _log.warning("%s is not gone on from: %s", self._path.name, error)
        else:
            wanted = (self.round_id, self.under_way.base_version, self._settings)
            if (running.round_id, running.base_version, running.settings) == wanted and not self._forgot(running):
                return running
        self._path.unlink()
        return None

    def _forgot(self, running: Running) -> bool:
        lost = self._lost(running.progress)
        if lost:
            self._vault.pins.begin_again(self.round_id, lost)
            self.plan = self._planned()
        return bool(lost)


def _tell_of(unreadable: dict[str, str]) -> None:
    for name, reason in unreadable.items():
        _log.error("trajectory %s is set aside: %s", name, reason)


def _fingerprint(engine: TrainEngine, vault: Vault, *, line_id: str) -> str:
    """A hash of the settings that the numbers of a round depend on."""
    train = msgspec.structs.replace(engine.settings, checkpoint_every_s=0.0)
    return sha256(msgspec.json.encode([line_id, train, vault.rules]))
