"""Consent: off unless a valid receipt says otherwise, and every decision is signed and chained."""

from pathlib import Path

import msgspec
import pytest

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import policy
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog, Recipient, device_key
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.receipts import ReceiptChain, SignedReceipt
from clawloop_shared import signing, wire
from clawloop_shared.errors import SignatureInvalid
from clawloop_shared.levels import Level
from clawloop_shared.records import StepBatch

from .conftest import Blotter, MakeKept, MakeSignal


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


@pytest.mark.parametrize("level", list(Level))
def test_every_level_can_be_chosen_and_is_explained(pool: Pool, make_kept: MakeKept, level: Level) -> None:
    consent = ConsentLog(pool)
    receipt = consent.set_level(level)
    assert (consent.level(), receipt.level) == (level, level)
    assert receipt.policy_sha256 == policy.policy_sha256(level)
    assert bool(receipt.purposes) == (level is not Level.OFF)
    pool.keep_step(make_kept()).result()
    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()))
    assert outbox.fill() == int(level.sends_steps)


def test_every_level_has_a_text_of_its_own_and_those_that_learn_at_home_say_what_leaves() -> None:
    assert len({policy.policy_sha256(level) for level in Level}) == len(Level)
    for level in (Level.PRIVATE_DELTAS, Level.DELTAS):
        assert "LoRA factors" in policy.TEXTS[level]
        assert "hash of the adapter" in policy.TEXTS[level]
    assert "can be recovered" in policy.TEXTS[Level.DELTAS]
    assert "mean rewards" in policy.DATA[Level.DELTAS]
    assert "mean rewards" not in policy.DATA[Level.PRIVATE_DELTAS]
    assert "noise teaches nothing" in policy.TEXTS[Level.PRIVATE_DELTAS]


def test_a_level_set_by_another_process_holds_at_once(tmp_path: Path, key: bytes) -> None:
    with (
        Pool.open(tmp_path, KnownKey.of(key), writer=True) as serving,
        Pool.open(tmp_path, KnownKey.of(key)) as command,
    ):
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
    assert pool.verify().ok
    pool.submit(lambda database: database.execute("DELETE FROM receipts WHERE seq = 2")).result()
    with pytest.raises(ConsentError, match="missing or changed"):
        consent.receipts()
    assert "is missing, and was not forgotten" in " ".join(pool.verify().problems)


def test_a_higher_level_does_not_raise_what_was_kept_under_the_lower_one(pool: Pool, make_kept: MakeKept) -> None:
    consent = ConsentLog(pool)

    def keep() -> str:
        kept = make_kept()
        pool.keep_step(kept).result()
        return kept.step.step_id

    keep()
    consent.set_level(Level.REDACTED)
    early = keep()
    consent.set_level(Level.FULL)
    late = keep()
    outbox = Outbox(pool, consent, hold_s=0, redactor=LineRedactor("line", Blotter()))
    outbox.fill()
    found = {Level(item.level): wire.decode(outbox.get(item.item_id).body, StepBatch) for item in outbox.list()}
    assert {level: [step.step_id for step in batch.steps] for level, batch in found.items()} == {
        Level.REDACTED: [early],
        Level.FULL: [late],
    }


def test_the_past_leaves_only_if_it_was_chosen_and_only_as_much_of_it(
    pool: Pool, make_kept: MakeKept, make_signal: MakeSignal
) -> None:
    consent, outbox = ConsentLog(pool), Outbox(pool, hold_s=0)
    kept = [make_kept(session=f"session-{number}") for number in range(4)]
    for each in kept:
        pool.keep_step(each).result()
    consent.set_level(Level.FULL)
    assert outbox.fill() == 0
    consent.set_level(Level.FULL, past_after=1)
    assert outbox.fill() == 3
    assert {item.session_id for item in outbox.list()} == {"session-1", "session-2", "session-3"}
    consent.set_level(Level.FULL, past_after=0)
    assert outbox.fill() == 1, "what was queued before is not queued again"
    consent.set_level(Level.OFF)
    consent.set_level(Level.FULL, past_after=0)
    assert outbox.fill() == 4, "what a lowered level took back may be chosen again"
    outbox.drop(outbox.list()[-1].item_id)
    consent.set_level(Level.FULL, past_after=0)
    assert outbox.fill() == 0, "what its owner dropped never leaves"


def test_a_consent_from_before_the_texts_were_these_holds_no_more(pool: Pool) -> None:
    consent = ConsentLog(pool)
    receipt = consent.set_level(Level.FULL)
    old = msgspec.structs.replace(receipt, receipt_id="old", policy_version=1, policy_sha256="0" * 64)
    chain, private = ReceiptChain(pool), device_key(pool)
    pool.submit(lambda database: chain.append(database, old, private=private)).result()
    assert (consent.level(), consent.state().reason) == (Level.OFF, "what the level means has changed")


@pytest.mark.parametrize("doubt", ["another server", "another text", "a year"])
def test_a_doubt_that_goes_away_lets_nothing_out_that_was_kept_in_it_nor_after_it_unasked(
    pool: Pool, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch, doubt: str
) -> None:
    now_ms = 1_000
    consent = ConsentLog(pool, clock=lambda: now_ms)
    one, two = Recipient(url="https://one", key=b"one"), Recipient(url="https://two", key=b"two")
    consent.set_recipient(one)
    receipt, outbox = consent.set_level(Level.FULL), Outbox(pool, consent, hold_s=0)
    with monkeypatch.context() as otherwise:
        if doubt == "another server":
            consent.set_recipient(two)
        elif doubt == "another text":
            otherwise.setitem(policy.TEXTS, Level.FULL, "Everything leaves, and your photos too.")
        else:
            now_ms = receipt.expires_ms
        pool.keep_step(make_kept(session="in doubt")).result()
        assert outbox.fill() == 0
        reason = consent.state().reason
    consent.set_recipient(one)
    now_ms = 2_000
    pool.keep_step(make_kept(session="after it")).result()
    assert outbox.fill() == 0
    state = consent.state()
    assert (state.level, state.chosen, state.reason) == (Level.OFF, Level.FULL, reason)
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept(session="asked again")).result()
    outbox.fill()
    assert [item.session_id for item in outbox.list()] == ["asked again"]
    assert [each.level for each in consent.receipts()] == [Level.FULL, Level.OFF, Level.FULL]


def test_a_server_of_another_key_gets_nothing_of_what_waited_for_the_first(pool: Pool, make_kept: MakeKept) -> None:
    consent = ConsentLog(pool)
    consent.set_level(Level.FULL)
    pool.keep_step(make_kept()).result()
    outbox = Outbox(pool, consent, hold_s=0)
    assert outbox.fill() == 1
    consent.set_recipient(Recipient(url="https://two", key=b"two"))
    assert [item.has_bytes for item in outbox.list()] == [False]


def test_a_device_whose_key_is_lost_can_be_asked_again(pool: Pool) -> None:
    consent = ConsentLog(pool)
    before = consent.set_level(Level.FULL)
    pool.submit(lambda database: database.execute("DELETE FROM state WHERE name = 'device.key'")).result()
    with pytest.raises(ConsentError, match="set the level again"):
        consent.level()
    after = consent.set_level(Level.METRICS)
    assert consent.level() is Level.METRICS
    assert consent.receipts() == [before, after]
    assert before.device_key != after.device_key == signing.public_key(device_key(pool))
