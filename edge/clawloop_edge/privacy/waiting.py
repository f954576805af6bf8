"""Which sessions have something that has yet to leave, so that retention takes them last."""

from typing import TYPE_CHECKING

from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.schema import WAITING, read_cursor
from clawloop_shared.errors import ClawloopError
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database


def waiting_sessions(database: "Database", *, pool: Pool, consent: ConsentLog) -> set[str]:
    """The sessions that the outbox has not looked at, those whose items the server does not have, and those that may
    yet be learned from; none at a level at which
    nothing leaves, or if the consent cannot be checked. A pause changes nothing: what waits, waits on."""
    try:
        leaves = consent.state_in(database).ladder.latest
    except ClawloopError:
        leaves = Level.OFF
    if not leaves.sends_items:
        return set()
    query = (
        f"SELECT session_id FROM outbox WHERE session_id != '' AND {WAITING}"  # noqa: S608  # a clause of ours
        f" UNION SELECT o.session_id FROM outbox_sessions AS o JOIN outbox USING (item_id) WHERE {WAITING}"
        " UNION SELECT session_id FROM learnable WHERE session_id != '' AND (state = 'new' OR state GLOB 'ready *')"
    )
    if leaves.sends_steps:
        query += " UNION SELECT session_id FROM changes WHERE seq > ? AND session_id != ''"
        rows = database.conn.execute(query, (read_cursor(database, pool.keyring),))
    else:
        rows = database.conn.execute(query)
    return {row[0] for row in rows}
