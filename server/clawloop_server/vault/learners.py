"""Which devices learn at home, as far as the server knows: what a round of deltas is measured against."""

from __future__ import annotations

from clawloop_server.vault.database import ServerDatabase
from clawloop_shared.levels import Level

_LEVELS = frozenset({Level.PRIVATE_DELTAS.value, Level.DELTAS.value})


def learners(database: ServerDatabase, line_id: str, *, cohort: str | None = None) -> frozenset[str]:
    """The devices of a line (and of a cohort) that may sync and last said that deltas are what they let out.

    One that lets out more sends its trajectories; a round does not wait for a delta of it, but takes it if it comes.
    """
    sql = "SELECT device_id, level FROM devices WHERE state = 'joined' AND line_id = ?1 AND (?2 IS NULL OR cohort = ?2)"
    return frozenset(device_id for device_id, level in database.rows(sql, [line_id, cohort]) if level in _LEVELS)
