"""What scorers are told of trajectories: what their callers said of them, and which are over. Reads one snapshot."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.codec import from_json
from clawloop_edge.pool.crypt import Keyring, session_scope
from clawloop_edge.pool.records import Json

if TYPE_CHECKING:
    from sqlite_utils import Database

_COMPLETED = (
    "SELECT trajectory_id, (SELECT count(*) FROM steps AS s WHERE s.trajectory_id = t.trajectory_id) >= next_index"
    " FROM trajectories AS t WHERE completed AND trajectory_id IN (SELECT value FROM json_each(?))"
)


def read_metadata(database: "Database", keyring: Keyring, *, trajectory_id: str) -> Json:
    """What a caller said of a trajectory; empty if nothing."""
    query = "SELECT metadata FROM trajectories WHERE trajectory_id = ? AND metadata IS NOT NULL"
    row = database.conn.execute(query, (trajectory_id,)).fetchone()
    if row is None:
        return {}
    scope = keyring.find(database, session_scope(trajectory_id))
    found: Json = from_json(scope.unseal("trajectories", trajectory_id, column="metadata", sealed=row[0]))
    return found


def read_completed(database: "Database", trajectory_ids: Iterable[str]) -> dict[str, bool]:
    """Those that were completed, and whether all of their steps are on disk, as far as their numbers tell: a call that
    still runs, and one that failed, has a number and no step."""
    wanted = msgspec.json.encode(list(trajectory_ids)).decode()
    return {name: bool(whole) for name, whole in database.conn.execute(_COMPLETED, (wanted,)).fetchall()}
