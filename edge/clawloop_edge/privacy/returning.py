"""What the rooms of the edge do with a pool that comes back from a backup: nothing of it may leave by itself."""

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.heads import current
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.deletions import Deletions
from clawloop_edge.privacy.going import take_over_left
from clawloop_edge.privacy.ladder import EVERYTHING, Ladder
from clawloop_edge.privacy.ledger import Ledger
from clawloop_edge.privacy.limits import Limit, Limits, Subject
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database


def adopt(pool: Pool) -> None:
    """Have the tables of all of this room in `pool`, so that they are verified, and forgotten from, with the rest."""
    ConsentLog(pool)
    Deletions(pool)
    Ledger(pool)


def come_back(pool: Pool, present: Pool | None) -> None:
    """Set the level to `off`: it may have been lowered since the backup, and what waited in it may have been dropped.

    What `present`, the pool that was there, has asked servers to delete is asked on, and the privacy that it has spent
    stays spent. The lower levels that it has for apps and sessions hold, and what had left it is known to have left:
    else nobody could be asked to delete it.
    """
    consent = ConsentLog(pool)
    if consent.state().chosen is not Level.OFF:
        consent.set_level(Level.OFF)
    if present is not None:
        Deletions(pool).take_over(Deletions(present))
        Ledger(pool).take_over(Ledger(present))
        ConsentLog(present)
        with present.read() as database:
            limits = [limit for limit in Limits(present).all(database) if limit.subject is not Subject.PAUSE]
        pool.submit(
            partial(_limit_alike, pool=pool, limits=limits, one_chain=pool.chain_key == present.chain_key)
        ).result()
        take_over_left(pool, present)


def _limit_alike(database: "Database", *, pool: Pool, limits: list[Limit], one_chain: bool) -> None:
    """Have these limits, of another pool, hold beside those that are here. Needs a write transaction.

    Up to where this chain ends the two are one, or else changes of the other mean nothing here: then a limit holds
    as low as it ever was.
    """
    here, end = Limits(pool), current(database).seq
    for limit in limits:
        lowest = min((rung.level for rung in limit.ladder.rungs), key=lambda level: level.rank)
        ladder = limit.ladder if one_chain else Ladder.flat(lowest)
        found = here.find(database, limit.subject, name=limit.name)
        ladder = ladder.followed_by(ladder.latest, after_seq=end) if end else Ladder.flat(ladder.latest)
        ladder = ladder.least(found.ladder if found else EVERYTHING)
        here.put(database, msgspec.structs.replace(limit, ladder=ladder))
