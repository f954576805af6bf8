"""Keeping the states of trajectories and the stages of groups in line with the records, after each change of these.

Costs what the touched trajectories and their groups cost, never more. Part of the transaction that is open. Which state
and stage follows from what is in `groups`; formats: docs/formats/vault.md.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator

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
_STAGE = "trajectory_groups WHERE line_id = ?1 AND channel = ?2 AND stage = ?3"
# each device is one look at the index
_DEVICES = (
    f"WITH RECURSIVE waits (name) AS (SELECT min(device_id) FROM {_STAGE} UNION ALL"  # noqa: S608 constant text
    f" SELECT (SELECT min(device_id) FROM {_STAGE} AND device_id > name) FROM waits WHERE name IS NOT NULL)"
    " SELECT name FROM waits CROSS JOIN devices ON device_id = name WHERE cohort = ?4"
)
_SERVED = "SELECT max(round_id) FROM trajectories WHERE device_id = ?1"
_OF_DEVICE = (
    f"SELECT arrived_ms, arrival, group_id, judged FROM {_STAGE} AND device_id = ?4 AND arrived_ms <= ?5"  # noqa: S608
    " AND (arrived_ms, arrival, group_id) > (?6, ?7, ?8) ORDER BY arrived_ms, arrival, group_id LIMIT ?9"
)
_Place = tuple[int, int, str]
"""where a group stands among its device's: its last arrival in ms and in order, its id"""


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
    """Up to `limit` groups of a cohort's devices that go, in turns: the next one is of the device that has the fewest
    trajectories among them so far, its longest waiting one. Of several such devices it is the one that a round learned
    from the longest ago (never: first), then the one that waits the longest.

    So no device has more than its share while others wait, however much it sends and however large its groups are.
    Costs some looks at an index for each device that waits, and twice `limit` groups, however many there are.
    """
    wheres = [(line_id, channel, stage) for stage in deadlines]
    devices = sorted({name for where in wheres for (name,) in database.rows(_DEVICES, [*where, cohort])})
    page = max(1, -(-limit // max(1, len(devices))))
    heads = list[tuple[int, str, _Place, int, str, Iterator[tuple[_Place, int]]]]()

    def queue(before: int, served: str, device_id: str, waiting: Iterator[tuple[_Place, int]]) -> None:
        for place, judged in itertools.islice(waiting, 1):
            heapq.heappush(heads, (before, served, place, judged, device_id, waiting))

    for device_id in devices:
        served = database.row(_SERVED, [device_id])
        waiting = _waiting(database, line_id, channel, device_id, deadlines=deadlines, page=page)
        queue(0, served[0] or "" if served else "", device_id, waiting)
    found = list[ReadyGroup]()
    while heads and len(found) < limit:
        before, last, place, judged, device_id, waiting = heapq.heappop(heads)
        found.append(ReadyGroup(place[-1], judged))
        queue(before + judged, last, device_id, waiting)
    return found


def _waiting(
    database: ServerDatabase, line_id: str, channel: str, device_id: str, *, deadlines: dict[Stage, int], page: int
) -> Iterator[tuple[_Place, int]]:
    """Where the groups of a device that go stand, and how many of each are judged, the longest waiting first; read in
    pages of so many."""
    after: _Place = (-1, -1, "")
    while True:
        rows = [
            ((arrived_ms, arrival, group_id), judged)
            for stage, until_ms in deadlines.items()
            for arrived_ms, arrival, group_id, judged in database.rows(
                _OF_DEVICE, [line_id, channel, stage, device_id, until_ms, *after, page]
            )
        ]
        rows = sorted(rows)[:page]
        yield from rows
        if len(rows) < page:
            return
        after = rows[-1][0]


def chosen(
    database: ServerDatabase,
    line_id: str,
    channel: str,
    *,
    deadlines: dict[Stage, int],
    limit: int,
    cohort: str = "",
) -> list[tuple[str, str]]:
    """The trajectories that a round of up to `limit` takes for a cohort, with their devices: whole groups, in turns by
    device."""
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
