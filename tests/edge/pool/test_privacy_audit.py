"""The audit log: a chain without content, and the server's signed word beside what it received."""

import msgspec
import pytest

from clawloop_edge.errors import PoolError, ReceiptInvalid
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import audit as audit_module
from clawloop_edge.privacy.audit import AuditLog, AuditReport
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid, StorageError
from clawloop_shared.levels import Level

from .conftest import Acknowledging, MakeKept

SECRET = "the words of a private talk"


@pytest.fixture
def outbox(pool: Pool, make_kept: MakeKept) -> Outbox:
    """An outbox with one item on its way."""
    ConsentLog(pool).set_level(Level.FULL)
    pool.keep_step(make_kept(words=SECRET)).result()
    outbox = Outbox(pool, hold_s=0)
    outbox.fill()
    outbox.mark_sent([outbox.list()[0].item_id])
    return outbox


def test_it_is_a_chain(pool: Pool) -> None:
    audit = AuditLog(pool, clock=lambda: 7)
    entries = [audit.append("adapter", number, sha256=f"{number:064}") for number in range(3)]
    assert list(audit.entries()) == entries
    assert audit.verify() == AuditReport(entries=3, signed_by_server=0)
    assert pool.verify().ok


def test_it_is_read_a_page_at_a_time(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_PAGE", 2)
    now = [0]
    audit = AuditLog(pool, clock=lambda: now[0])
    for number in range(7):
        now[0] = number
        audit.append("adapter", number, sha256="0" * 64, item_id=f"item-{number % 2}")
    assert [entry.size_bytes for entry in audit.entries()] == list(range(7))
    assert [entry.size_bytes for entry in audit.entries(since_ms=3, item_id="item-1")] == [3, 5]
    assert [entry.seq for entry in audit.page(after_seq=2, limit=3)] == [3, 4, 5]
    assert audit.verify().entries == 7


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_an_entry_that_was_taken_out_is_missed(pool: Pool, seq: int) -> None:
    audit = AuditLog(pool)
    for number in range(3):
        audit.append("adapter", number, sha256="0" * 64)
    pool.submit(lambda database: database.execute("DELETE FROM audit WHERE seq = ?", (seq,))).result()
    with pytest.raises(PoolError, match="audit log is broken"):
        audit.verify()
    assert not pool.verify().ok


def test_an_entry_that_was_changed_is_noticed(pool: Pool) -> None:
    audit = AuditLog(pool)
    for number in range(2):
        audit.append("adapter", number, sha256="0" * 64)
    copy = "UPDATE audit SET body = (SELECT body FROM audit WHERE seq = 1) WHERE seq = 2"
    pool.submit(lambda database: database.execute(copy)).result()
    with pytest.raises(StorageError):
        audit.verify()


def test_an_older_state_of_the_whole_log_does_not_fit_the_pools_chain(pool: Pool) -> None:
    audit = AuditLog(pool)
    audit.append("adapter", 1, sha256="0" * 64)
    with pool.read() as database:
        head = database.conn.execute("SELECT body FROM state WHERE name = 'audit.head'").fetchone()
    audit.append("adapter", 2, sha256="0" * 64)

    def go_back(database: object) -> None:
        run = database.conn.execute  # type: ignore[attr-defined]
        run("DELETE FROM audit WHERE seq = 2")
        run("UPDATE state SET body = ? WHERE name = 'audit.head'", head)

    pool.submit(go_back).result()
    assert audit.verify().entries == 1, "the log by itself cannot know"
    assert not pool.verify().ok


def test_the_servers_receipt_is_kept_with_what_it_received(pool: Pool, outbox: Outbox, server: Acknowledging) -> None:
    (item,) = outbox.list()
    server.acknowledge(outbox, [item.item_id])
    sent, received = AuditLog(pool).entries()
    assert (sent.kind, sent.proof, sent.level) == ("sent", None, Level.FULL)
    assert received.proof is not None
    assert received.proof.key == server.release_key
    assert AuditLog(pool).verify() == AuditReport(entries=2, signed_by_server=1)
    assert outbox.find(item.item_id).state is ItemState.RECEIVED


def test_a_receipt_that_the_server_did_not_sign_is_not_believed(outbox: Outbox, server: Acknowledging) -> None:
    (item,) = outbox.list()
    receipts = server.receipts([(item.item_id, item.sha256)])
    stranger = signing.public_key(signing.new_key())
    with pytest.raises(SignatureInvalid):
        outbox.accept(receipts, device_id=server.device_id, release_key=stranger)
    assert outbox.list() == [item]


def test_a_receipt_for_another_device_or_other_bytes_is_not_believed(outbox: Outbox, server: Acknowledging) -> None:
    (item,) = outbox.list()
    foreign = server.receipts([(item.item_id, item.sha256)], device_id="another")
    with pytest.raises(ReceiptInvalid, match="is for device another"):
        outbox.accept(foreign, device_id=server.device_id, release_key=server.release_key)
    other_bytes = server.receipts([(item.item_id, "0" * 64)])
    with pytest.raises(ReceiptInvalid, match="for other bytes than were sent"):
        outbox.accept(other_bytes, device_id=server.device_id, release_key=server.release_key)
    assert outbox.list() == [item]


def test_verify_finds_a_receipt_that_was_put_to_another_entry(
    pool: Pool, outbox: Outbox, server: Acknowledging
) -> None:
    (item,) = outbox.list()
    (receipt,) = server.receipts([("another-item", item.sha256)])
    proof = audit_module.Proof(receipt.payload, receipt.signature, server.release_key)
    log = AuditLog(pool)
    pool.submit(
        lambda database: log.append_in(
            database, "received", size_bytes=1, sha256=item.sha256, receipt_id="", item_id=item.item_id, proof=proof
        )
    ).result()
    with pytest.raises(PoolError, match="entry 2 of the audit log has the server's receipt for something else"):
        log.verify()


def test_it_has_no_content(pool: Pool, outbox: Outbox, server: Acknowledging) -> None:
    server.acknowledge(outbox, [outbox.list()[0].item_id])
    told = b"".join(msgspec.json.encode(entry) for entry in AuditLog(pool).entries())
    assert SECRET.encode() not in told
    assert b"session-1" not in told


def test_what_was_broken_off_is_written_down(pool: Pool, outbox: Outbox) -> None:
    (item,) = outbox.list()
    outbox.mark_stopped([item.item_id, "forgotten meanwhile"])
    assert [(entry.kind, entry.item_id) for entry in AuditLog(pool).entries()] == [
        ("sent", item.item_id),
        ("stopped", item.item_id),
    ]
