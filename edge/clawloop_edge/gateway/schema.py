"""The tables of trajectories and draws in the pool's database, and how they go with what is forgotten.

Each migration runs once; never change one that was released: add another. Formats: docs/claw-r1.md.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from clawloop_edge.pool.forgetting import LOOSE_SCOPES, GoesWith, Going
from clawloop_edge.pool.heads import Chained
from clawloop_edge.pool.verify import SealedColumn

if TYPE_CHECKING:
    from sqlite_utils import Database

DRAW_SCOPE = f"{LOOSE_SCOPES}draws"
"""draws belong to no session: one key for all of them, which goes with any forgetting"""
_TRAJECTORIES = (
    """CREATE TABLE trajectories (
        tag BLOB PRIMARY KEY, trajectory_id TEXT NOT NULL, minted INTEGER NOT NULL, created_ms INTEGER NOT NULL,
        next_index INTEGER NOT NULL, last_ms INTEGER NOT NULL, completed INTEGER NOT NULL, facts BLOB, metadata BLOB
    ) STRICT""",
    "CREATE INDEX trajectories_unused ON trajectories (created_ms) WHERE next_index = 0",
)
_DRAWS = (
    "CREATE TABLE draws (draw_id TEXT PRIMARY KEY, tag BLOB NOT NULL, created_ms INTEGER NOT NULL,"
    " body BLOB NOT NULL) STRICT",
    "CREATE INDEX draws_tag ON draws (tag, created_ms)",
    "CREATE INDEX draws_created ON draws (created_ms)",
)
_TRAJECTORY_SCOPE = "'session/' || trajectory_id"


class Adopts(Protocol):
    """A pool that takes another room's tables in."""

    def adopt(
        self,
        name: str,
        migrations: Sequence[Callable[["Database"], None]],
        *,
        sealed: Sequence[SealedColumn] = (),
        chained: Sequence[Chained] = (),
        goes_with: GoesWith | None = None,
    ) -> None: ...


def trajectory_tables(database: "Database") -> None:
    """Trajectories that callers name in URLs."""
    for statement in _TRAJECTORIES:
        database.execute(statement)


def trajectory_names(database: "Database") -> None:
    """Trajectories are found by the name of their session too, when that is forgotten."""
    database.execute("CREATE INDEX trajectories_name ON trajectories (trajectory_id)")


def draw_tables(database: "Database") -> None:
    """What was sampled and not yet submitted."""
    for statement in _DRAWS:
        database.execute(statement)


def draws_under_own_key(database: "Database") -> None:
    """Draws are sealed in `DRAW_SCOPE`; those of before, at most a day old, are let go."""
    database.execute("DELETE FROM draws")


def prepare_trajectories(pool: Adopts) -> None:
    """Have the trajectories' table in `pool`."""
    pool.adopt(
        "trajectories",
        (trajectory_tables, trajectory_names),
        sealed=(
            SealedColumn("trajectories", "facts", "trajectory_id", _TRAJECTORY_SCOPE),
            SealedColumn("trajectories", "metadata", "trajectory_id", _TRAJECTORY_SCOPE),
        ),
        goes_with=forget_trajectories,
    )


def prepare_draws(pool: Adopts) -> None:
    """Have the draws' table in `pool`."""
    sealed = SealedColumn("draws", "body", "draw_id", f"'{DRAW_SCOPE}'")
    pool.adopt("draws", (draw_tables, draws_under_own_key), sealed=(sealed,), goes_with=forget_draws)


def forget_trajectories(database: "Database", going: Going) -> None:
    """Delete the trajectories of sessions that go."""
    if going.everything:
        database.conn.execute("DELETE FROM trajectories")
        return
    delete = "DELETE FROM trajectories WHERE trajectory_id IN (SELECT value FROM json_each(?))"
    database.conn.execute(delete, (msgspec.json.encode(going.session_ids).decode(),))


def forget_draws(database: "Database", going: Going) -> None:
    """Delete all draws if something is forgotten for good, because their key goes."""
    if going.for_good:
        database.conn.execute("DELETE FROM draws")
