"""Keeping the states of trajectories and the stages of groups in line with the records, after each change of these.

Costs what the touched trajectories and their groups cost, never more. Part of the transaction that is open. Which state
and stage follows from what is in `groups`; formats: docs/formats/vault.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.groups import PENDING, ReadyGroup, Stage, TrajectoryState, stage_of, whole_groups

_RESTATE = (
    "UPDATE trajectories SET state = CASE"
    " WHEN NOT EXISTS (SELECT 1 FROM steps WHERE trajectory_id = ? AND NOT left_out) THEN 'left out'"
    " WHEN EXISTS (SELECT 1 FROM steps s JOIN signals g"
    " ON g.target_key IN (s.step_key, s.run_key, s.session_key, s.named_key) AND +g.device_id = s.device_id"
    " WHERE s.trajectory_id = ? AND g.counts) THEN 'judged'"
    " ELSE 'open' END WHERE trajectory_id = ? AND state IN ('open', 'judged', 'left out') RETURNING group_id"
)
_READY = (
    " FROM trajectory_groups WHERE line_id = ? AND channel = ? AND stage = ? AND arrived_ms <= ?"
    " AND device_id IN (SELECT device_id FROM devices WHERE cohort = ?)"
)


def enter(database: ServerDatabase, trajectory_id: str, *, size: int) -> None:
    """Note the group of a trajectory that a step came for, and how many it is to have: the largest number told."""
    database.run(
        "INSERT INTO trajectory_groups SELECT group_id, device_id, line_id, channel, ?, 'waiting', 0, created_ms, 0"
        " FROM trajectories WHERE trajectory_id = ? AND state IN ('open', 'judged', 'left out')"
        " ON CONFLICT (group_id) DO UPDATE SET size = max(size, excluded.size)",
        [size, trajectory_id],
    )


def update(database: ServerDatabase, trajectory_ids: Iterable[str], *, arrived_ms: int | None = None) -> None:
    """Bring these trajectories and their groups in line; `arrived_ms`: something came for them then."""
    groups = dict.fromkeys(
        group_id for trajectory_id in trajectory_ids for (group_id,) in database.rows(_RESTATE, [trajectory_id] * 3)
    )
    update_groups(database, groups, arrived_ms=arrived_ms)


def update_groups(database: ServerDatabase, group_ids: Iterable[str], *, arrived_ms: int | None = None) -> None:
    """Bring these groups in line with the states of their trajectories; one without any that waits has no row."""
    arrival = database.count("SELECT max(arrival) FROM trajectory_groups")
    for group_id in group_ids:
        sql = "SELECT state, count(*) FROM trajectories WHERE group_id = ? GROUP BY state"
        members = {TrajectoryState(state): number for state, number in database.rows(sql, [group_id])}
        if not any(state in members for state in PENDING):
            database.run("DELETE FROM trajectory_groups WHERE group_id = ?", [group_id])
            continue
        size = database.count("SELECT size FROM trajectory_groups WHERE group_id = ?", [group_id])
        database.run(
            "UPDATE trajectory_groups SET stage = ?, judged = ? WHERE group_id = ?",
            [stage_of(size, members), members.get(TrajectoryState.JUDGED, 0), group_id],
        )
        if arrived_ms is not None:
            arrival += 1
            sql = "UPDATE trajectory_groups SET arrived_ms = ?, arrival = ? WHERE group_id = ?"
            database.run(sql, [arrived_ms, arrival, group_id])


def ready_groups(
    database: ServerDatabase,
    line_id: str,
    channel: str,
    *,
    deadlines: dict[Stage, int],
    limit: int,
    cohort: str = "",
) -> list[ReadyGroup]:
    """Up to `limit` groups of a cohort's devices that go, the longest waiting first."""
    part = "SELECT group_id, judged, arrived_ms, arrival" + _READY
    sql = " UNION ALL ".join([part] * len(deadlines)) + " ORDER BY arrived_ms, arrival LIMIT ?"
    values = [value for stage, at_ms in deadlines.items() for value in (line_id, channel, stage, at_ms, cohort)]
    return [ReadyGroup(row[0], row[1]) for row in database.rows(sql, [*values, limit])]


def chosen(
    database: ServerDatabase,
    line_id: str,
    channel: str,
    *,
    deadlines: dict[Stage, int],
    limit: int,
    cohort: str = "",
) -> list[tuple[str, str]]:
    """The trajectories that a round of up to `limit` takes for a cohort, with their devices: whole groups, the longest
    waiting first."""
    found = ready_groups(database, line_id, channel, deadlines=deadlines, limit=limit, cohort=cohort)
    sql = (
        "SELECT trajectory_id, device_id FROM trajectories WHERE group_id = ? AND state = ?"
        " ORDER BY created_ms, trajectory_id"
    )
    return [
        (trajectory_id, device_id)
        for group_id in whole_groups(found, limit)
        for trajectory_id, device_id in database.rows(sql, [group_id, TrajectoryState.JUDGED])
    ]


def count_ready(
    database: ServerDatabase, line_id: str, channel: str, *, deadlines: dict[Stage, int], cohort: str = ""
) -> int:
    """How many trajectories are in the groups of a cohort's devices that go."""
    sql = "SELECT sum(judged)" + _READY
    return sum(database.count(sql, [line_id, channel, stage, at_ms, cohort]) for stage, at_ms in deadlines.items())
