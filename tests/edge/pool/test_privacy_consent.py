"""Consent: off unless a valid receipt says otherwise, and every decision is signed and chained."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import policy
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.consent import ConsentLog, Recipient, SignedReceipt, device_key
from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid, StorageError
from clawloop_shared.levels import Level

MakeKept = Callable[..., KeptStep]


def test_nothing_may_leave_until_someone_says_so(pool: Pool) -> None:
    consent = ConsentLog(pool)
    assert consent.level() is Level.OFF
    assert consent.receipts() == []


def test_receipts_are_signed_by_the_device_and_name_level_server_and_expiry(pool: Pool, make_kept: MakeKept) -> None:
    pool.keep_step(make_kept()).result()
    consent = ConsentLog(pool, clock=lambda: 5_000)
    consent.set_recipient(Recipient(url="https://box:8443", key=b"server key"))
    receipt = consent.set_level(Level.FULL)
    assert consent.level() is Level.FULL
    assert receipt.device_key == signing.public_key(device_key(pool))
    assert receipt.recipient.key == b"server key"
    assert receipt.expires_ms == 5_000 + 365 * 86_400_000
    assert receipt.after_seq == 1
    lowered = consent.set_level(Level.METRICS)
    assert consent.receipts() == [receipt, lowered]
    assert not receipt.previous_sha256
    assert lowered.previous_sha256


@pytest.mark.parametrize("level", [Level.PRIVATE_DELTAS, Level.DELTAS, Level.REDACTED])
def test_a_level_that_is_not_built_is_refused_and_changes_nothing(pool: Pool, level: Level) -> None:
    consent = ConsentLog(pool)
    consent.set_level(Level.METRICS)
    with pytest.raises(ConsentError, match="not built yet; choose one of off, metrics, full"):
        consent.set_level(level)
    assert consent.level() is Level.METRICS


def test_a_level_set_by_another_process_holds_at_once(tmp_path: Path, key: bytes) -> None:
    with Pool.open(tmp_path, key, writer=True) as serving, Pool.open(tmp_path, key) as command:
        level = ConsentLog(serving).level
        for wanted in (Level.FULL, Level.OFF, Level.METRICS):
            ConsentLog(command).set_level(wanted)
            assert level() is wanted


def test_a_consent_runs_out_after_a_year(pool: Pool) -> None:
    receipt = ConsentLog(pool, clock=lambda: 1_000).set_level(Level.FULL)
    assert ConsentLog(pool, clock=lambda: receipt.expires_ms - 1).level() is Level.FULL
    late = ConsentLog(pool, clock=lambda: receipt.expires_ms).state()
    assert (late.level, late.chosen) == (Level.OFF, Level.FULL)
    assert "over a year old" in late.reason


def test_another_server_needs_another_consent(pool: Pool) -> None:
    consent = ConsentLog(pool)
    consent.set_recipient(Recipient(url="https://one", key=b"one"))
    consent.set_level(Level.FULL)
    consent.set_recipient(Recipient(url="https://two", key=b"two"))
    assert consent.level() is Level.OFF
    assert "another server" in consent.state().reason
    consent.set_level(Level.FULL)
    assert consent.level() is Level.FULL


def test_a_changed_meaning_needs_another_consent(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    consent = ConsentLog(pool)
    consent.set_level(Level.FULL)
    monkeypatch.setitem(policy.TEXTS, Level.FULL, "Everything leaves, and your photos too.")
    assert consent.level() is Level.OFF
    assert "has changed" in consent.state().reason


def test_a_receipt_signed_by_another_key_opens_nothing(pool: Pool) -> None:
    consent = ConsentLog(pool)
    receipt = consent.set_level(Level.FULL)
    payload = msgspec.json.encode(receipt, order="sorted")
    forged = SignedReceipt(payload, signing.sign(signing.new_key(), "consent-receipt", payload=payload))
    with pool.read() as database:
        scope = pool.keyring.find(database, POOL_SCOPE)
    body = scope.seal("receipts", receipt.receipt_id, column="body", plain=msgspec.msgpack.encode(forged))
    pool.submit(lambda database: database.execute("UPDATE receipts SET body = ?", (body,))).result()
    with pytest.raises(SignatureInvalid):
        consent.level()


def test_a_receipt_that_was_taken_out_is_missed(pool: Pool) -> None:
    consent = ConsentLog(pool)
    for level in (Level.FULL, Level.OFF, Level.FULL):
        consent.set_level(level)
    pool.submit(lambda database: database.execute("DELETE FROM receipts WHERE seq = 2")).result()
    with pytest.raises(ConsentError, match="missing or changed"):
        consent.receipts()


def test_the_audit_log_is_a_chain_without_content(pool: Pool) -> None:
    audit = AuditLog(pool, clock=lambda: 7)
    entries = [audit.append("adapter", number, sha256=f"{number:064}") for number in range(3)]
    assert audit.entries() == entries
    assert audit.verify() == 3


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_an_audit_entry_that_was_taken_out_is_missed(pool: Pool, seq: int) -> None:
    audit = AuditLog(pool)
    for number in range(3):
        audit.append("adapter", number, sha256="0" * 64)
    pool.submit(lambda database: database.execute("DELETE FROM audit WHERE seq = ?", (seq,))).result()
    with pytest.raises(PoolError, match="audit log is broken"):
        audit.verify()


def test_an_audit_entry_that_was_changed_is_noticed(pool: Pool) -> None:
    audit = AuditLog(pool)
    for number in range(2):
        audit.append("adapter", number, sha256="0" * 64)
    copy = "UPDATE audit SET body = (SELECT body FROM audit WHERE seq = 1) WHERE seq = 2"
    pool.submit(lambda database: database.execute(copy)).result()
    with pytest.raises(StorageError):
        audit.verify()
