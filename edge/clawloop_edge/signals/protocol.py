"""What a scorer is given, what it gives back, and when it is asked. Values and one Protocol; no storage, no clock."""

from enum import StrEnum
from typing import Protocol

import msgspec

from clawloop_edge.pool.records import Json, KeptStep
from clawloop_shared.records import Hint, Target


class Moment(StrEnum):
    """When a case is looked at."""

    CONTINUED = "continued"
    """the run goes on: the results of a step's tool calls are there"""
    FOLLOWED = "followed"
    """the user's next turn is there: the run before it is over"""
    ENDED = "ended"
    """nothing will follow: the trajectory was completed, or the run was left alone for long"""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged, and what came after it.

    `steps` are in the order in which they were made (at `CONTINUED` the one whose results came, else the main steps of
    the run or trajectory); the last holds the answer. `following` are the messages that came after it, as the agent
    sent them; `following_step_id` is the step whose prompt showed them. `earlier` are the user's turns before this run
    in the same session, oldest first. `metadata` is what the caller said of the trajectory.
    """

    moment: Moment
    target: Target
    target_id: str
    steps: list[KeptStep]
    following: list[Json] = []
    following_step_id: str = ""
    earlier: list[str] = []
    metadata: Json = {}

    @property
    def answer(self) -> KeptStep:
        """The step that gave the answer."""
        return self.steps[-1]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One judgement of a case, or (with `target_id`) of a part of it.

    `evidence` is short, made by the scorer, and quotes nobody; `comment` may hold words of a person or a model.
    """

    value: float
    weight: float = 1.0
    evidence: str = ""
    comment: str = ""
    target: Target | None = None
    target_id: str = ""
    hint: Hint | None = None


class Scorer(Protocol):
    """Judges cases. One that cannot judge gives no verdict; one that fails raises, and is asked again or given up."""

    @property
    def name(self) -> str:
        """The source of its signals."""

    @property
    def moments(self) -> frozenset[Moment]:
        """When it wants to be asked."""

    async def score(self, case: Case) -> list[Verdict]:
        """Judge one case.

        Raises:
            ScorerFailed: no judgement could be made this time.
        """

    async def close(self) -> None:
        """End what it has open."""
