"""What a level would let out of what is kept: counts and dates for its owner to see before they decide. Reads one
snapshot; opens next to nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from clawloop_edge.pool.curation import Curations
from clawloop_edge.pool.reading import Reading
from clawloop_edge.privacy.consent import Allowance
from clawloop_edge.privacy.ladder import Ladder

_DISORDER = 256
"""so many steps may have been kept in another order than they began in: calls that ran beside each other"""
_NEVER_QUEUED = (
    "SELECT step_id, seq, session_id, run_id FROM steps AS s WHERE trainable AND seq > ?"
    " AND NOT EXISTS (SELECT 1 FROM outbox_records AS r WHERE r.record_id = s.step_id) ORDER BY seq"
)


class _Names(NamedTuple):
    step_id: str
    run_id: str
    session_id: str


class AppCount(msgspec.Struct, frozen=True):
    """How much of one app."""

    app: str
    sessions: int
    steps: int


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """Trainable steps that would go into the outbox, and when the first and the last of them were made (0: none).

    Those that their owner does not want learned from would not.
    """

    steps: int
    sessions: int
    apps: list[AppCount]
    first_ms: int
    last_ms: int


def preview(reading: Reading, allowance: Allowance, *, after_seq: int) -> Preview:
    """What `allowance` would let out of what was kept after a change and never was in the outbox."""
    ladders: dict[str, Ladder] = {}
    apps: dict[str, str] = {}
    steps: dict[str, int] = {}
    first = last = ""
    curations = Curations(reading.database, reading.keyring)
    for step_id, seq, session_id, run_id in reading.database.conn.execute(_NEVER_QUEUED, (after_seq,)):
        if session_id not in ladders:
            known = reading.session(session_id)
            apps[session_id] = known.app if known else ""
            ladders[session_id] = allowance.ladder(session_id, app=apps[session_id])
        if ladders[session_id].at(seq).sends_steps and not curations.off(_Names(step_id, run_id, session_id)):
            steps[session_id] = steps.get(session_id, 0) + 1
            first, last = first or step_id, step_id
    return Preview(
        steps=sum(steps.values()),
        sessions=len(steps),
        apps=list(_by_app(apps, steps)),
        first_ms=_made_ms(reading, first),
        last_ms=_made_ms(reading, last),
    )


def change_before(reading: Reading, time_ms: int) -> int:
    """The last change that was kept of what was made before a time; 0 if there is none."""
    end = reading.database.conn.execute("SELECT coalesce(max(seq), 0) FROM steps").fetchone()[0]
    low, high = 0, end  # what was kept up to `low` is before the time, what was kept after `high` is not
    while low < high:
        middle = (low + high) // 2
        found = _next_step(reading, middle)
        if found is None or found[0] > high or _made_ms(reading, found[1]) >= time_ms:
            high = middle
        else:
            low = found[0]
    query = "SELECT seq, step_id FROM steps WHERE seq > ? ORDER BY seq LIMIT ?"
    for seq, step_id in reading.database.conn.execute(query, (low, _DISORDER)).fetchall():
        if _made_ms(reading, step_id) < time_ms:
            low = seq
    return low


def _by_app(apps: dict[str, str], steps: dict[str, int]) -> Iterator[AppCount]:
    for app in sorted(set(apps[session_id] for session_id in steps)):
        mine = [count for session_id, count in steps.items() if apps[session_id] == app]
        yield AppCount(app, len(mine), sum(mine))


def _next_step(reading: Reading, after_seq: int) -> tuple[int, str] | None:
    query = "SELECT seq, step_id FROM steps WHERE seq > ? ORDER BY seq LIMIT 1"
    row: tuple[int, str] | None = reading.database.conn.execute(query, (after_seq,)).fetchone()
    return row


def _made_ms(reading: Reading, step_id: str) -> int:
    step = reading.step(step_id) if step_id else None
    return step.created_ms if step else 0
