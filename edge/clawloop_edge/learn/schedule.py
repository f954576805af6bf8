"""When this device learns: a task, enough that is new, nobody calling, power, room, and its owner's word. One thread.

A call of the agent interrupts a run, which goes on later from where it was; so does a crash. What the run comes to is
an item of the outbox, or a reason. Knows the learner by its Protocol.
"""

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

import msgspec

from clawloop_edge.errors import ConsentError, LearnFailed, NotLearnable
from clawloop_edge.learn.choosing import Chooser
from clawloop_edge.learn.desk import fitting_levels, learning_levels, lowered
from clawloop_edge.learn.going import Place, Quiet, RunGoing
from clawloop_edge.learn.job import MASKED, Interrupted, Job, Learned, Learner
from clawloop_edge.learn.power import Power
from clawloop_edge.learn.release import Releaser, alpha_of
from clawloop_edge.learn.runs import Outcome, Run, Runs
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_shared.deltas import LearnTask
from clawloop_shared.errors import ClawloopError
from clawloop_shared.levels import Level
from clawloop_shared.records import Policy

_log = logging.getLogger(__name__)

OFF, NO_TASK, WAITING, LEARNING = "off", "no task", "waiting", "learning"
_JITTER = 0.2
_ASKED_EVERY_S = 0.5
"""how often it is looked whether its owner asked to learn at once"""
_BACK_OFF_S, _BACK_OFF_MOST_S = 600, 86_400
"""after a task that came to nothing, until another is begun: twice as long after each one more"""
_INTERRUPTED = "it was interrupted, and goes on when nobody calls"
_MAX_BITES = 100
_MAX_FAILURES = 3
"""of a run, or in a row of a kind that nobody foresaw; then the run is given up"""


class LearnStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How learning at home stands: `state`, and what is missing, in words. `trajectories` wait, of `wanted`."""

    state: str = OFF
    missing: list[str] = []
    task_id: str = ""
    base_version: int = 0
    method: str = ""
    level: str = ""
    trajectories: int = 0
    wanted: int = 0
    power: str = ""
    updates: int = 0
    problem: str = ""


class Schedule:
    """One thread that learns when it may. `done` is called when a delta is in the outbox."""

    def __init__(
        self,
        runs: Runs,
        consent: ConsentLog,
        chooser: Chooser,
        releaser: Releaser,
        learner: Learner,
        *,
        place: Place,
        settings: LearnSettings,
        done: Callable[[], None] = lambda: None,
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._runs, self._consent, self._chooser, self._releaser = runs, consent, chooser, releaser
        self._learner, self._place, self._settings, self._done, self._clock = learner, place, settings, done, clock
        self._stopping, self._poked = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._status = LearnStatus(wanted=settings.min_trajectories)
        self._failures, self._tries = 0, dict[str, int]()
        self._tidied_for: Policy | None = None

    @property
    def status(self) -> LearnStatus:
        """How it stands now."""
        return self._status

    def start(self) -> None:
        """Begin; returns at once."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="clawloop-learn", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Break a run off, which goes on at the next start, and end the thread; False if it still runs."""
        self._stopping.set()
        self._poked.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def poke(self) -> None:
        """Look at once."""
        self._poked.set()

    def tick(self) -> LearnStatus:
        """Look once, and learn if all is well. Blocking: for a thread."""
        self._catch_up()
        self._take_back()
        run = self._current_run()
        task = run.task if run else self._runs.task()
        if not self._settings.enabled or not (levels := learning_levels(self._consent)):
            return self._tell(state=OFF, missing=[self._why_off()])
        if task is None:
            return self._tell(state=NO_TASK, missing=["the server has asked for nothing"])
        level, ready = self._level(task, levels) if run is None else (run.level, len(run.sources))
        missing = self._missing(task, level, ready, begun=run is not None)
        self._tell(
            state=WAITING,
            missing=missing,
            task_id=task.task_id,
            base_version=task.base_version,
            method=str(task.method),
            level=str(level or ""),
            trajectories=ready,
        )
        if missing or level is None:
            return self._status
        if (run := run or self._begin(task, level)) is not None:
            self._learn(run)
        return self._status

    # Whether to learn

    def _catch_up(self) -> None:
        """Follow what is new, a bite at a time, and only as long as nobody is being answered."""
        for _ in range(_MAX_BITES):
            if self._stopping.is_set() or not self._place.idle_s() or not self._chooser.catch_up():
                return

    def _take_back(self) -> None:
        """What waits for a sum of an adapter that is long gone comes back, with its release and its trajectories."""
        served = self._place.served()
        if served != self._tidied_for:
            if count := self._releaser.take_back_stale(served):
                _log.info("%d deltas waited for a secure sum that never came, and were taken back", count)
            self._tidied_for = served

    def _current_run(self) -> Run | None:
        """The run under way; one that may not go on is given up."""
        run = self._runs.run()
        if run is None:
            self._runs.clear_files()
            return None
        if self._consent.state().paused_until_ms:
            return run  # it waits on, as the outbox does
        if not _is_served(run.task, self._place.served()):
            self._end(run, "another adapter is served now", done=True)
        elif not self._releaser.may_go_on(run):
            self._end(run, "what it learned from may not leave any more", done=False)
        else:
            return run
        return None

    def _level(self, task: LearnTask, levels: set[Level]) -> tuple[Level | None, int]:
        """The level at which to learn, and how many trajectories wait there: one with enough, else that with more."""
        ready, fitting = self._chooser.ready(), fitting_levels(task, levels)
        enough = (level for level in fitting if ready[level] >= self._settings.min_trajectories)
        level = next(enough, None) or max(fitting, key=lambda each: ready[each], default=None)
        return level, ready[level] if level else 0

    def _missing(self, task: LearnTask, level: Level | None, ready: int, *, begun: bool) -> list[str]:
        """What stands in the way of learning now, in words; nothing: let it begin."""
        state, place, settings = self._consent.state(), self._place, self._settings
        idle_s, source, asked = place.idle_s(), place.power(), bool(self._runs.asked_ms())
        self._status = msgspec.structs.replace(self._status, power=str(source))
        least, (failed, after_ms) = settings.min_trajectories, self._backs_off()
        rules = {
            f"everything is paused: {state.reason}": not state.paused_until_ms,
            f"at the levels here nothing can be learned by {task.method}": level is not None,
            f"the task begins from adapter {task.base_version}, and {place.served().version} is served": (
                _is_served(task, place.served())
            ),
            f"{ready} of {least} judged trajectories that were not learned from before": begun or ready >= least,
            f"idle: the last call was {idle_s:.0f} s ago, of {settings.idle_s:.0f} s": (
                idle_s > 0 and (asked or idle_s >= settings.idle_s)
            ),
            f"power: {source}": asked or not settings.on_power or source is not Power.BATTERY,
            f"tasks in a row that came to nothing: {failed}; the next begins {_at(after_ms)}": (
                begun or asked or self._clock() >= after_ms
            ),
            f"room: {place.free_bytes() >> 20} MiB of disk are left": place.free_bytes() > place.floor_bytes,
        }
        missing = [words for words, holds in rules.items() if not holds]
        if level is Level.PRIVATE_DELTAS and not begun:
            try:
                self._releaser.check_budget(task)
            except ConsentError as error:
                missing.append(f"budget: {error}")
        return missing

    def _backs_off(self) -> tuple[int, int]:
        """How many tasks in a row came to nothing, and until when no other is begun."""
        history = self._runs.history()
        failed = len([*takewhile(lambda each: each.failed, reversed(history))])
        if not failed:
            return 0, 0
        wait_ms = min(_BACK_OFF_S * 2 ** (failed - 1), _BACK_OFF_MOST_S) * 1000
        return failed, min(history[-1].at_ms, self._clock()) + wait_ms

    def _why_off(self) -> str:
        if not self._settings.enabled:
            return "[learn] enabled is false"
        return f"at level {self._consent.level()} no delta leaves"

    # Learning

    def _begin(self, task: LearnTask, level: Level) -> Run | None:
        task, rank = lowered(task, self._settings)
        least = self._settings.min_trajectories
        at_most = max(least, task.updates * task.batch_trajectories)
        try:
            chosen = self._chooser.choose(
                level, at_most=at_most, at_least=least, go_on=Quiet(self._place, self._stopping)
            )
        except Interrupted:
            self._tell(state=WAITING, missing=[_INTERRUPTED])
            return None
        self._chooser.pass_by(chosen.useless)
        try:
            return self._releaser.begin(task, chosen, rank=rank)
        except ConsentError as error:
            refused = "".join(f"; {count} trajectories: {why}" for why, count in chosen.refused.items())
            self._tell(missing=[f"{error}{refused}"])
            return None

    def _learn(self, run: Run) -> None:
        self._runs.asked_done()
        self._runs.clear_files()
        self._tell(state=LEARNING, missing=[], updates=0)
        _log.info("learning at home: task %s, %d trajectories", run.task.task_id, len(run.sources))
        try:
            learned = self._learned(run)
            if learned is None:
                self._tell(state=WAITING, missing=[_INTERRUPTED])
                return
            outcome = self._released(run, learned)
        except Interrupted:
            self._tell(state=WAITING, missing=[_INTERRUPTED])
        except _Unreadable:
            self._end(run, "what it learns from cannot be read any more, and is chosen anew", done=False)
        except LearnFailed as error:
            self._came_to_nothing(run, error)
        else:
            if outcome is not None:
                _log.info("what was learned is in the outbox as item %s", outcome.item_id)
                self._tell(state=NO_TASK)
                self._runs.clear_files()
                self._done()

    def _learned(self, run: Run) -> Learned | None:
        going = RunGoing(
            run,
            self._runs,
            self._releaser,
            consent=self._consent,
            place=self._place,
            on_power=self._settings.on_power,
            stopping=self._stopping,
        )
        kept = self._runs.read_state(run, go_on=going.on)
        learned = self._learner.learn(
            self._job(run, going), go_on=going.on, kept=kept, keep=going.keep, told=self._told
        )
        return None if going.broken else learned

    def _told(self, updates: int) -> None:
        self._status = msgspec.structs.replace(self._status, updates=updates)

    def _job(self, run: Run, going: RunGoing) -> Job:
        """Made where it is handed on, so that nothing here holds all of its trajectories while it is done."""
        trajectories = self._runs.read_trajectories(run, go_on=going.on)
        if trajectories is None:
            raise _Unreadable
        settings = self._settings
        return Job(
            task=msgspec.structs.replace(run.task, rank=run.rank, alpha=alpha_of(run.task, run.rank)),
            rank=run.rank,
            model=self._place.model,
            adapter=self._place.adapter(self._place.served()) if run.task.base_version else {},
            trajectories=trajectories,
            rules=self._chooser.rules,
            max_updates=settings.max_updates,
            max_sample_tokens=settings.max_sample_tokens,
            max_memory_bytes=settings.max_memory_bytes,
            min_trajectories=settings.min_trajectories,
        )

    def _released(self, run: Run, learned: Learned) -> Outcome | None:
        try:
            return self._releaser.release(run, learned)
        except ConsentError as error:
            few = len(learned.trajectory_ids) < self._settings.min_trajectories
            self._end(run, str(error), done=few, failed=few)
            if few:
                aside = (name for name, why in learned.set_aside.items() if why != MASKED and name in run.sources)
                gone = (run.sources[name] for name in aside)
                self._chooser.pass_by(gone)
            return None

    def _came_to_nothing(self, run: Run, error: LearnFailed) -> None:
        """Try again from where it was, a few times: a process may be ended by whoever needs its memory more."""
        reason = str(error)
        self._tries[run.run_id] = self._tries.get(run.run_id, 0) + 1
        if isinstance(error, NotLearnable) or self._tries[run.run_id] >= _MAX_FAILURES:
            self._end(run, reason, done=True, failed=True)
            return
        _log.warning("learning at home: %s; trying again", reason)
        self._tell(state=WAITING, missing=[f"it failed: {reason}"], problem=reason)

    def _end(self, run: Run, reason: str, *, done: bool, failed: bool = False) -> None:
        _log.warning("nothing was learned of task %s: %s", run.task.task_id, reason)
        now_ms = self._clock()
        outcome = Outcome(
            task_id=run.task.task_id,
            line_id=run.task.line_id,
            base_version=run.task.base_version,
            at_ms=now_ms,
            took_s=(now_ms - run.started_ms) / 1000,
            level=run.level,
            trajectories=len(run.sources),
            reason=reason,
            done=done,
            failed=failed,
        )
        self._tries.pop(run.run_id, None)
        self._runs.end(run, outcome)
        self._tell(state=WAITING, missing=[reason], problem=reason)

    # The thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._poked.clear()
            try:
                self.tick()
                self._failures = 0
            except ClawloopError as error:
                _log.warning("learning at home: %s; trying again", error)
                self._failed(str(error))
            except Exception as error:  # noqa: BLE001 - whatever a library does, the agent is served and this tries again
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {where.filename}:{where.lineno}"
                _log.error("learning at home: %s; trying again", kind)
                self._failed(kind)
            self._wait()

    def _failed(self, problem: str) -> None:
        self._failures += 1
        self._tell(state=WAITING, missing=[f"it failed: {problem}"], problem=problem)
        if self._failures < _MAX_FAILURES:
            return
        self._failures = 0
        try:
            if (run := self._runs.run()) is not None:
                self._end(run, problem, done=True, failed=True)
        except ClawloopError as error:
            _log.warning("learning at home: %s", error)

    def _wait(self) -> None:
        """Until the next look, a poke, or its owner's word."""
        wait_s = self._settings.check_every_s * random.uniform(1 - _JITTER, 1 + _JITTER)
        until_s, asked_ms = time.monotonic() + wait_s, self._asked_ms()
        while not self._stopping.is_set() and (left_s := until_s - time.monotonic()) > 0:
            if self._poked.wait(min(left_s, _ASKED_EVERY_S)) or self._asked_ms() not in (0, asked_ms):
                return

    def _asked_ms(self) -> int:
        try:
            return self._runs.asked_ms()
        except ClawloopError:
            return 0

    def _tell(self, **changes: Any) -> LearnStatus:
        problem = changes.pop("problem", self._status.problem)
        self._status = msgspec.structs.replace(self._status, problem=problem, **changes)
        return self._status


class _Unreadable(Exception):
    """What a run learns from is not to be read any more."""


def _at(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _is_served(task: LearnTask, served: Policy) -> bool:
    """Whether the adapter that a task begins from is the one that answers calls."""
    wanted = (task.line_id, task.base_version, task.weights_sha256)
    return wanted == (served.line, served.version, served.adapter_sha256)
