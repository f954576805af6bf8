"""How many steps there are of each kind and app, and why nothing may be learned from some: counted as they are kept.

So that the answer costs the same however many steps there are. What is counted is sealed; the numbers are plain.
"""

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.crypt import POOL_SCOPE, Keyring, blind
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import KeptStep, StepCount

if TYPE_CHECKING:
    from sqlite_utils import Database

Label = tuple[str, str, str]
"""kind, app, and why nothing may be learned from it (empty: it may)"""


def label_of(kept: KeptStep) -> Label:
    """What a step is counted as."""
    return kept.kind, kept.app, kept.step.untrainable


def count_step(database: "Database", keyring: Keyring, *, index_key: bytes, label: Label, steps: int = 1) -> None:
    """Count steps. Needs a write transaction, that in which they are kept."""
    plain = msgspec.msgpack.encode(label)
    tally_id = blind(index_key, "tally", value=plain)[:16].hex()
    run = database.conn.execute
    if run("UPDATE tallies SET steps = steps + ? WHERE tally_id = ?", (steps, tally_id)).rowcount:
        return
    sealed = keyring.ensure(database, POOL_SCOPE).seal("tallies", tally_id, column="label", plain=plain)
    run("INSERT INTO tallies (tally_id, steps, label) VALUES (?, ?, ?)", (tally_id, steps, sealed))


def count_all(database: "Database", keyring: Keyring, *, index_key: bytes) -> None:
    """Count anew whatever is kept. Opens every step; needs a write transaction."""
    database.conn.execute("DELETE FROM tallies")
    for label, steps in recount(database, keyring).items():
        count_step(database, keyring, index_key=index_key, label=label, steps=steps)


def recount(database: "Database", keyring: Keyring) -> Counter[Label]:
    """What the counts should be, from the steps themselves."""
    found: Counter[Label] = Counter()
    for (session_id,) in database.conn.execute("SELECT session_id FROM sessions").fetchall():
        found.update(Reading(database, keyring).labels(session_id))
    return found


def read_counts(database: "Database", keyring: Keyring) -> list[StepCount]:
    """The counts, largest first."""
    scope = None
    found = []
    for tally_id, steps, sealed in database.conn.execute("SELECT tally_id, steps, label FROM tallies"):
        scope = scope or keyring.find(database, POOL_SCOPE)
        plain = scope.unseal("tallies", tally_id, column="label", sealed=sealed)
        kind, app, untrainable = msgspec.msgpack.decode(plain, type=Label)
        found.append(StepCount(kind=kind, app=app, untrainable=untrainable, steps=steps))
    return sorted(found, key=lambda count: (-count.steps, count.kind, count.app, count.untrainable))
