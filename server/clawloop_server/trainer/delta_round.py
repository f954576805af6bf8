"""A round of deltas alone: nothing is pinned, no update is made, and after a crash it is made anew of what waits then.

It has the face of a `RunningRound`. One that ends the process hard three times refuses the largest delta, as a round of
trajectories sets its largest aside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from clawloop_server.release.registry import Registry
from clawloop_server.trainer.joining import Waiting
from clawloop_server.trainer.loop import Plan, Progress, Report, RoundResult, TrainState
from clawloop_server.trainer.running import MAX_DEATHS, NothingLeft
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import StorageError
from clawloop_shared.ids import new_id

_log = logging.getLogger("clawloop.trainer")

DEADLY_DELTA = "the trainer ended hard three times while it joined this one, the largest"
_JOINING = 0
"""stands for an update while the deltas are joined and judged"""


class DeltaRound:
    """The round of a line that runs, of deltas alone."""

    given_up = ""
    may_join = True

    def __init__(
        self,
        *,
        vault: Vault,
        registry: Registry,
        line_id: str,
        state: TrainState,
        waiting: Sequence[Waiting],
        cohort: str = "",
    ) -> None:
        """`state`: that of the adapter that it begins with; `waiting`: what it may join; `cohort`: whose adapter it is.

        Raises:
            NothingLeft: the largest of these was refused, for it ended the process again and again, and was the last.
        """
        self._vault, self._registry, self._line_id, self._cohort = vault, registry, line_id, cohort
        self.progress, self.plan = Progress(state=state), Plan(batches=[])
        self.round_id = self._begin(state)
        self.waiting = self._count_attempt(waiting)
        if not self.waiting:
            raise NothingLeft(self.round_id)

    def _begin(self, state: TrainState) -> str:
        """Note that it runs, unless it does already; its id."""
        found = self._registry.under_way(self._line_id)
        of_this = (0, state.version, self._cohort)
        if found and (found.trajectories, found.base_version, found.cohort) == of_this:
            return found.round_id
        round_id = found.round_id if found else new_id()
        with self._vault.database.write():
            self._vault.pins.release(round_id)
            self._registry.start_round(
                self._line_id,
                base_version=state.version,
                trajectories=0,
                steps=0,
                round_id=round_id,
                cohort=self._cohort,
            )
        return round_id

    def _count_attempt(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Count this attempt, and whether the last one ended hard; what is left to be joined."""
        under_way = self._registry.under_way(self._line_id)
        if under_way is None:
            raise StorageError(f"round {self.round_id} was noted and is not there; see the disk, and start again")
        deaths = under_way.deaths.get(_JOINING, 0) + (under_way.at_update is not None)
        with self._vault.database.write():
            if deaths >= MAX_DEATHS and waiting:
                largest = max(waiting, key=lambda one: (one.facts.size_bytes, one.facts.delta_id))
                _log.error("round %s: delta %s is refused: %s", self.round_id, largest.facts.delta_id, DEADLY_DELTA)
                self._vault.deltas.refuse(largest.facts.delta_id, DEADLY_DELTA)
                waiting, deaths = [one for one in waiting if one is not largest], 0
            self.under_way = msgspec.structs.replace(
                under_way, attempts=under_way.attempts + 1, at_update=_JOINING, deaths={_JOINING: deaths}
            )
            self._registry.keep(self.under_way)
        return list(waiting)

    def run(self, report: Report) -> RoundResult:
        """Make no update; the round counts all the same."""
        state = msgspec.structs.replace(self.progress.state, rounds=self.progress.state.rounds + 1)
        return RoundResult(
            state=state,
            updates=[],
            trajectory_ids=[],
            steps=0,
            reward=float("nan"),
            set_aside={},
            rejected_steps={},
        )

    def rest(self) -> None:
        """Note that nothing is being worked on: what ends the process now has nothing to do with its deltas."""
        self.under_way = msgspec.structs.replace(self.under_way, at_update=None)
        self._registry.keep(self.under_way)

    def begin_again(self) -> None:
        """Note that it is made anew."""
        self.rest()

    def check(self) -> None:
        """There is no trajectory that could be lost."""

    def consume(self) -> None:
        """There is no trajectory to consume."""

    def release(self) -> None:
        """There is no trajectory to let go of."""

    def ended(self) -> None:
        """There is no checkpoint within it."""
