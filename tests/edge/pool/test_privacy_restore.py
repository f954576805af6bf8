"""What a pool that comes back from a backup knows of what came since: what left, and what was forbidden."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.node.deleting import ask_due
from clawloop_edge.pool.anchor import Point
from clawloop_edge.pool.backup import Manifest
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.forget import Forgetter, Wanted
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.returning import come_back
from clawloop_shared.levels import Level

from .conftest import MakeKept
from .devices import Device
from .hub import Hub, serving


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A server that deletes what it is asked to."""
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def device(pool: Pool, hub: Hub, make_kept: MakeKept) -> Device:
    """A device that lets everything leave."""
    return Device(pool, hub, make_kept=make_kept)


MANIFEST = Manifest(
    end=Point(pool_id="p", seq=1, head=b"", at_ms=900_000),
    key="",
    kek=1,
    sqlcipher=True,
    sessions=1,
    steps=1,
    size_bytes=4096,
    sha256="5" * 64,
)


@pytest.fixture
def earlier(tmp_path: Path, device: Device) -> Iterator[Pool]:
    """The pool of `device` as a backup from before has it: its only step is kept, and has not left."""
    (folder := tmp_path / "earlier").mkdir(mode=0o700)
    kept = device.keep("s1")
    with device.pool.read() as database:
        (copy,) = [folder / "pool.db"]
        database.conn.execute("ROLLBACK")
        database.conn.execute("PRAGMA query_only = OFF")
        database.conn.execute("VACUUM INTO ?", (str(copy),))
        database.conn.execute("BEGIN")
    with Pool.open(folder, device.pool.store) as pool:
        assert pool.get_step(kept.step.step_id) == kept
        yield pool


def test_what_left_after_a_backup_can_be_asked_back_once_it_was_restored(
    device: Device, hub: Hub, earlier: Pool
) -> None:
    device.send()
    (item,) = device.outbox.list()
    come_back(earlier, device.pool, MANIFEST)
    (known,) = Outbox(earlier).list()
    assert known == msgspec.structs.replace(item, has_bytes=False)
    forgetter = Forgetter(earlier, [hub.server], clock=device.clock)
    done = forgetter.forget(forgetter.preview(Wanted(session_ids=["s1"])))
    assert len(done.requests) == 1
    assert ask_due(forgetter.deletions) == 1
    assert item.item_id in hub.asked[0].record_ids
    assert earlier.verify().problems == []


def test_receipts_and_audit_log_go_on_through_a_restore_and_say_that_it_was(device: Device, earlier: Pool) -> None:
    device.send()
    device.consent.set_level(Level.METRICS)
    known = device.consent.receipts()
    come_back(earlier, device.pool, MANIFEST)
    audit = AuditLog(earlier)
    assert [entry.kind for entry in audit.entries()] == ["sent", "restored"]
    entry = list(audit.entries())[-1]
    assert (entry.since_ms, entry.size_bytes, entry.sha256) == (900_000, 4096, "5" * 64)
    report = audit.verify()
    assert (report.entries, report.restored, report.rolled_back) == (2, 1, 0)
    receipts = ConsentLog(earlier).receipts()
    assert receipts[:-1] == known
    assert receipts[-1].level is Level.OFF
    assert earlier.verify().problems == []


def test_a_restore_over_another_pool_says_that_what_came_after_the_backup_is_not_known(
    device: Device, earlier: Pool
) -> None:
    device.send()
    come_back(earlier, None, MANIFEST)
    assert [entry.kind for entry in AuditLog(earlier).entries()] == ["rolled-back"]
    assert AuditLog(earlier).verify().rolled_back == 1


def test_limits_that_were_set_after_a_backup_hold_once_it_was_restored(device: Device, earlier: Pool) -> None:
    device.consent.set_limit(Subject.APP, "agent", level=Level.OFF)
    device.consent.set_limit(Subject.SESSION, "lifted", level=Level.OFF)
    device.keep("later")
    device.consent.lift_limit(Subject.SESSION, "lifted")
    come_back(earlier, device.pool, MANIFEST)
    consent = ConsentLog(earlier)
    assert [(limit.subject, limit.name, limit.level) for limit in consent.limits()] == [("app", "agent", Level.OFF)]
    consent.set_level(Level.FULL, past_after=0)
    outbox = Outbox(earlier, consent, hold_s=0)
    for session, app in (("anew", "agent"), ("lifted", "other")):
        earlier.keep_step(device.make_kept(session=session, app=app)).result()
    outbox.fill()
    assert [item.session_id for item in outbox.list() if item.has_bytes] == ["lifted"]
