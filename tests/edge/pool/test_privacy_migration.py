"""A pool from before items knew their session: everything in it stays, and whatever is unclear is taken as private."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.state import write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import schema
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

BODY = b"an item of any sessions"


def make_old(database: object, pool: Pool) -> None:
    """One queued item, one received item and one audit entry, as the first tables held them."""
    run = database.conn.execute  # type: ignore[attr-defined]
    scope = pool.keyring.find(database, POOL_SCOPE)  # type: ignore[arg-type]
    for item_id, state in (("01OLD1", "queued"), ("01OLD2", "received")):
        facts = msgspec.msgpack.encode((sha256(BODY), 3, 1, 5))
        own = pool.keyring.ensure(database, f"outbox/{item_id}")  # type: ignore[arg-type]
        run(
            "INSERT INTO outbox (item_id, state, kind, receipt_id, release_ms, size, facts, body)"
            " VALUES (?, ?, 'steps.v1', 'r', 9, ?, ?, ?)",
            (
                item_id,
                state,
                len(BODY),
                scope.seal("outbox", item_id, column="facts", plain=facts),
                own.seal("outbox", item_id, column="body", plain=BODY),
            ),
        )
    run("INSERT INTO outbox_records VALUES ('step-1', '01OLD1')")
    entry = {
        "seq": 1,
        "at_ms": 4,
        "kind": "sent",
        "size_bytes": 23,
        "sha256": sha256(BODY),
        "receipt_id": "r",
        "item_id": "01OLD2",
        "previous_sha256": "",
    }
    body = scope.seal("audit", "1", column="body", plain=msgspec.msgpack.encode(entry))
    run("INSERT INTO audit (seq, body) VALUES (1, ?)", (body,))
    head = (1, sha256(msgspec.json.encode(entry, order="sorted")))
    write_state(database, pool.keyring, name="audit.head", value=msgspec.msgpack.encode(head))  # type: ignore[arg-type]


@pytest.fixture
def reopened(tmp_path: Path, key: bytes) -> Callable[[], Pool]:
    """Opens a pool whose room of privacy is as it was at first."""
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        pool.adopt("privacy", (schema.first_tables,))
        pool.submit(lambda database: make_old(database, pool)).result()
    return lambda: Pool.open(tmp_path, KnownKey.of(key))


def test_items_and_entries_stay_as_they_were_and_join_the_chain(reopened: Callable[[], Pool]) -> None:
    with reopened() as pool:
        outbox = Outbox(pool)
        queued, received = outbox.list()
        assert (queued.session_id, queued.level, queued.state) == ("", Level.FULL, ItemState.QUEUED)
        assert (received.state, received.received_ms, received.steps) == (ItemState.RECEIVED, 9, 3)
        assert outbox.get("01OLD1").body == BODY
        assert Outbox.items_with(pool, "step-1") == [queued]
        assert AuditLog(pool).verify().entries == 1
        report = pool.verify()
        assert report.ok, report.problems


def test_any_limit_takes_back_an_item_that_may_be_of_any_session(reopened: Callable[[], Pool]) -> None:
    with reopened() as pool:
        consent = ConsentLog(pool)
        pool.submit(lambda database: database.execute("UPDATE outbox SET state = 'sent' WHERE seq = 1")).result()
        consent.set_level(Level.FULL)
        assert not Outbox(pool).list()[0].has_bytes, "no consent was in force before"
    with reopened() as pool:
        assert ConsentLog(pool).level() is Level.FULL


def test_a_limit_of_one_session_concerns_it(tmp_path: Path, key: bytes) -> None:
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        consent = ConsentLog(pool)
        consent.set_level(Level.FULL)
        with pool.read() as database:
            assert consent.within(database).level("", app="") is Level.FULL
        consent.set_limit(Subject.SESSION, "any", level=Level.METRICS)
        with pool.read() as database:
            assert consent.within(database).level("", app="") is Level.METRICS
            assert consent.within(database).level("other", app="agent") is Level.FULL
