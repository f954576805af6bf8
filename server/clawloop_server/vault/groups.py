"""When a group of trajectories goes to a round, and which groups a round takes. Pure: no clock, no database.

A trajectory outside any group is a group of one. What has no signal blocks nothing: a group whose rest never gets one
goes without it in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from clawloop_server.vault.settings import RewardSettings

_ALWAYS_MS = 1 << 62


class TrajectoryState(StrEnum):
    """How far a trajectory is."""

    OPEN = "open"
    """no signal judges it yet"""
    JUDGED = "judged"
    """a signal does; it goes to a round as soon as its group does"""
    LEFT_OUT = "left out"
    """its owner does not want any of its steps to be learned from"""
    CONSUMED = "consumed"
    """one round learned from it, or looked at it and left it"""
    SHREDDED = "shredded"
    """a round learned from it, and it was forgotten since, or its device deleted"""


PENDING = (TrajectoryState.OPEN, TrajectoryState.JUDGED, TrajectoryState.LEFT_OUT)
"""states that what comes in can still change"""


class Stage(StrEnum):
    """How far a group is, apart from time."""

    WAITING = "waiting"
    """none of it is judged"""
    PARTIAL = "partial"
    """a part is judged: that goes without the rest after `group_timeout_s` without news"""
    QUIET = "quiet"
    """as many as it was to have are judged, or all that came: it goes after `settle_s` without news"""


def stage_of(size: int, members: dict[TrajectoryState, int]) -> Stage:
    """The stage of a group that is to have `size` trajectories (0: unknown), with so many members of each state.

    What a round took before, and what its owner left out, is not waited for.
    """
    judged = members.get(TrajectoryState.JUDGED, 0)
    if not judged:
        return Stage.WAITING
    awaited = members.get(TrajectoryState.OPEN, 0)
    is_whole = sum(members.values()) - awaited >= size if size else not awaited
    return Stage.QUIET if is_whole else Stage.PARTIAL


def deadlines(now_ms: int, settings: RewardSettings) -> dict[Stage, int]:
    """For each stage that may go: the latest last arrival (ms) with which a group goes now."""
    waits_s = {Stage.QUIET: settings.settle_s, Stage.PARTIAL: settings.group_timeout_s}
    # What waits for nothing does not depend on a clock that may have been set back since.
    return {stage: now_ms - round(wait_s * 1000) if wait_s else _ALWAYS_MS for stage, wait_s in waits_s.items()}


class ReadyGroup(msgspec.Struct, frozen=True):
    """A group that goes, and how many of its trajectories are judged."""

    group_id: str
    judged: int


def whole_groups(ready: Iterable[ReadyGroup], limit: int) -> list[str]:
    """The groups that a round of at most `limit` trajectories takes, in the order in which they come. None is split.

    The first goes even if it is larger than the limit, or it would never go. One that does not fit any more is passed
    by, and is first in a later round.
    """
    taken, room = list[str](), limit
    for group in ready:
        if group.judged <= room or (limit > 0 and not taken):
            taken.append(group.group_id)
            room -= group.judged
    return taken
