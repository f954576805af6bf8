"""Which sessions have something that has yet to leave, so that retention takes them last."""

from typing import TYPE_CHECKING

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.schema import WAITING, read_cursor
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from sqlite_utils import Database


def waiting_sessions(database: "Database", *, pool: Pool, consent: ConsentLog) -> set[str]:
    """The sessions that the outbox has not looked at, or whose items the server does not have; none at a level at which
    nothing leaves, or if the consent cannot be checked. A pause changes nothing: what waits, waits on."""
    try:
        leaves = consent.state_in(database).ladder.latest.sends_steps
    except ClawloopError:
        leaves = False
    if not leaves:
        return set()
    query = (
        "SELECT session_id FROM changes WHERE seq > ? AND session_id != ''"  # noqa: S608  # a clause of ours
        f" UNION SELECT session_id FROM outbox WHERE session_id != '' AND {WAITING}"
    )
    rows = database.conn.execute(query, (read_cursor(database, pool.keyring),))
    return {row[0] for row in rows}
