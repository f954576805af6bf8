"""Taking on tasks of learning at home, or saying why not. The server asks; this device's own limits decide.

What can be lowered without changing what is asked for (how many updates, the rank of `lora`) is lowered when it is
learned; what cannot is refused here. Knows no learner. Called in the node's thread.
"""

import logging
from collections.abc import Callable, Iterator
from math import prod

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.learn.release import MAX_BODY_BYTES, Releaser
from clawloop_edge.learn.runs import Runs
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.learn.shares import most_share
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_shared.deltas import LearnReply, LearnTask, Method, delta_shapes, task_rules
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.records import Policy
from clawloop_shared.secure import MAX_SIGMA, MAX_VALUES

_log = logging.getLogger(__name__)

_REASON_CHARS = 300
LEAST_BATCH = 8
"""trajectories of an update: of so many, split evenly, none needs more than a quarter"""
FLOAT_BYTES, HEADER_BYTES = 4, 256
"""of a value as it may leave, and about the most that the name of a tensor takes"""


class Desk:
    """The desk of one device.

    `served` gives the policy that answers calls now, `poke` has the schedule look at once; `sums`: whether this device
    takes part in secure sums.
    """

    def __init__(
        self,
        runs: Runs,
        consent: ConsentLog,
        releaser: Releaser,
        *,
        shape: ModelShape,
        settings: LearnSettings,
        served: Callable[[], Policy],
        poke: Callable[[], None] = lambda: None,
        state: Callable[[], str] = lambda: "",
        sums: bool = False,
    ) -> None:
        self._runs, self._consent, self._releaser = runs, consent, releaser
        self._shape, self._settings, self._served = shape, settings, served
        self._poke, self._state, self._sums = poke, state, sums

    def offered(self, task: LearnTask) -> LearnReply:
        """Keep the task for when there is time for it, in the place of the one before, or say why not."""
        earlier = next((each for each in reversed(self._runs.history()) if each.task_id == task.task_id), None)
        if earlier is not None and earlier.item_id:
            return LearnReply(task_id=task.task_id, accepted=True, reason="it was learned already")
        reason = next(self._against(task), "")
        if not reason and earlier is not None and earlier.done:
            reason = "it was tried, and nothing could be learned"
        if reason:
            return LearnReply(task_id=task.task_id, accepted=False, reason=reason[:_REASON_CHARS])
        if self._runs.task() != task:
            self._runs.keep_task(task)
            self._poke()
        return LearnReply(task_id=task.task_id, accepted=True)

    def learning(self) -> str:
        """Where learning stands, in a word or two; empty where the device's level is none at which it is done."""
        return self._state() if self._consent.level().learns_at_home else ""

    def _against(self, task: LearnTask) -> Iterator[str]:
        """Why the task is not taken on, first things first. Names no content."""
        if not self._settings.enabled:
            yield "learning at home is switched off here"
        levels = learning_levels(self._consent)
        if not levels:
            yield "no delta leaves at its level"
        served = self._served()
        if task.line_id != served.line:
            yield "it is for another model line than the one served"
        if (task.base_version, task.weights_sha256) != (served.version, served.adapter_sha256):
            yield f"it begins from adapter {task.base_version}, and another one or other weights are served"
        yield from self._unfit(task)
        yield from self._unfit_for(task, levels)

    def _unfit(self, task: LearnTask) -> Iterator[str]:
        """What of its numbers cannot be lowered, or is wrong."""
        if task.method is not Method.LORA and task.rank > self._settings.max_rank:
            yield f"rank {task.rank} is over this device's {self._settings.max_rank}, and {task.method} has no other"
        yield from (rule for rule, holds in task_rules(task).items() if not holds)
        yield from self._tells_too_much(task)
        yield from self._too_large(task)
        if task.secure and not self._sums:
            yield "this device takes no part in secure sums"

    def _tells_too_much(self, task: LearnTask) -> Iterator[str]:
        """What would let few trajectories be most of an update; the child measures it once more, on what is learned."""
        least = self._settings.min_trajectories
        most = most_share(least)
        if task.loss.max_trajectory_share > most:
            yield f"max_trajectory_share {task.loss.max_trajectory_share} is over this device's {most:g}"
        if task.batch_trajectories < (few := min(least, LEAST_BATCH)):
            yield f"batch_trajectories {task.batch_trajectories} is below this device's {few}"

    def _too_large(self, task: LearnTask) -> Iterator[str]:
        """A delta that could not be put into the outbox, or into one message of a sum."""
        _, rank = lowered(task, self._settings)
        try:
            shapes = delta_shapes(task.target_modules, self._shape, rank=rank, method=task.method)
        except AdapterInvalid as error:
            yield str(error)
            return
        values = sum(prod(shape) for shape in shapes.values())
        if (size := values * FLOAT_BYTES + HEADER_BYTES * len(shapes)) > MAX_BODY_BYTES:
            yield f"its delta has {size} bytes, over this device's {MAX_BODY_BYTES}; lower the rank"
        if not task.secure:
            return
        if values > MAX_VALUES:
            yield f"its delta has {values} values, and one message of a secure sum {MAX_VALUES}"
        if task.method.is_linear and task.clip > 0 and (sigma := self._releaser.noise_of(task)[0]) > MAX_SIGMA:
            yield f"its noise is {sigma:g}, and a secure sum takes {MAX_SIGMA:g}"

    def _unfit_for(self, task: LearnTask, levels: set[Level]) -> Iterator[str]:
        """Why it cannot be learned at the only level that this device has for it."""
        if levels - {Level.PRIVATE_DELTAS}:
            return
        if not task.method.is_linear:
            yield f"at {Level.PRIVATE_DELTAS} noise is added, which makes no sense with method {task.method}"
        if task.clip <= 0:
            yield "it has no clip, so no noise could hide what is learned"
        try:
            self._releaser.check_budget(task)
        except ConsentError as error:  # what was spent, also for other servers, is its owner's to know
            _log.info("task %.64s is not taken on: %s", task.task_id, error)
            yield "no privacy is left to spend on it"


def learning_levels(consent: ConsentLog) -> set[Level]:
    """The levels at which anything that is kept here may be learned from at home: the device's own, that of what was
    kept earlier, or that of an app or a session that may let out less."""
    state = consent.state()
    if not state.ladder.latest.sends_items:
        return set()
    ladders = [state.ladder, *(state.ladder.least(limit.ladder) for limit in consent.limits())]
    return {rung.level for ladder in ladders for rung in ladder.rungs if rung.level.learns_at_home}


def fitting_levels(task: LearnTask, levels: set[Level]) -> list[Level]:
    """Of these levels those that a task can be learned at, the device's more open one first."""
    both: tuple[Level, ...] = (Level.DELTAS, Level.PRIVATE_DELTAS)
    fits = [level for level in both if level in levels]
    if not task.method.is_linear or task.clip <= 0:
        fits = [level for level in fits if level is Level.DELTAS]
    return fits


def lowered(task: LearnTask, settings: LearnSettings) -> tuple[LearnTask, int]:
    """The task within this device's own limits, and the rank that is learned."""
    rank = min(task.rank, settings.max_rank) if task.method is Method.LORA else task.rank
    return msgspec.structs.replace(task, updates=min(task.updates, settings.max_updates)), rank
