"""What the rooms of the edge do with a pool that comes back from a backup: nothing of it may leave by itself."""

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.learn.runs import drop_run
from clawloop_edge.pool import curation
from clawloop_edge.pool.backup import Manifest
from clawloop_edge.pool.heads import current
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import device_keys
from clawloop_edge.privacy.audit import RESTORED, ROLLED_BACK, AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.deletions import Deletions
from clawloop_edge.privacy.going import take_over_left
from clawloop_edge.privacy.ladder import EVERYTHING, Ladder
from clawloop_edge.privacy.ledger import Ledger
from clawloop_edge.privacy.limits import Limit, Limits, Subject
from clawloop_edge.privacy.receipts import ReceiptChain
from clawloop_shared.errors import ClawloopError
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database


def adopt(pool: Pool) -> None:
    """Have the tables of all of this room in `pool`, so that they are verified, and forgotten from, with the rest."""
    ConsentLog(pool)
    Deletions(pool)
    Ledger(pool)


def come_back(pool: Pool, present: Pool | None, manifest: Manifest) -> None:
    """Set the level to `off`: it may have been lowered since the backup, and what waited in it may have been dropped.

    What `present`, the pool that was there, has asked servers to delete is asked on, and the privacy that it has spent
    stays spent. The lower levels that it has for apps and sessions hold, and so do its owner's words on steps; what had
    left it is known to have left: else nobody could be asked to delete it. Its receipts and its audit log go on, if
    they are those of the backup, and the log says that a backup was restored.
    """
    consent, audit, gone_on = ConsentLog(pool), AuditLog(pool), False
    Ledger(pool).count_all()
    pool.submit(partial(drop_run, pool=pool, spare=False)).result()
    if present is not None:
        adopt(present)
        gone_on = ReceiptChain(pool).take_over(ReceiptChain(present))
        gone_on = audit.take_over(AuditLog(present)) and gone_on
    _set_off(consent)
    if present is not None:
        Deletions(pool).take_over(Deletions(present))
        device_keys.take_over(pool, present)
        Ledger(pool).take_over(Ledger(present))
        with present.read() as database:
            limits = [limit for limit in Limits(present).all(database) if limit.subject is not Subject.PAUSE]
        pool.submit(
            partial(_limit_alike, pool=pool, limits=limits, one_chain=pool.chain_key == present.chain_key)
        ).result()
        take_over_left(pool, present)
        curation.take_over(pool, present)
    _write_down(pool, manifest, kind=RESTORED if gone_on else ROLLED_BACK)


def _set_off(consent: ConsentLog) -> None:
    """A consent that cannot be checked must not keep a pool from coming back: it allows nothing either way."""
    try:
        chosen = consent.state().chosen
    except ClawloopError:
        return
    if chosen is not Level.OFF:
        consent.set_level(Level.OFF)


def _write_down(pool: Pool, manifest: Manifest, *, kind: str) -> None:
    """Have the audit log tell which backup was restored."""

    def operation(database: "Database") -> None:
        AuditLog(pool).append_in(
            database,
            kind,
            size_bytes=manifest.size_bytes,
            sha256=manifest.sha256,
            receipt_id="",
            item_id="",
            since_ms=manifest.end.at_ms,
        )

    pool.submit(operation).result()


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
