"""Forgetting: what waits in the outbox goes, what had left is asked back until the server signs that it is deleted."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from clawloop_edge.node.deleting import ask, ask_due
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import batch
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.deletions import FIRST_WAIT_MS, LONGEST_WAIT_MS, Deletions, DeletionState, Server
from clawloop_edge.privacy.forget import Wanted
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.schema import ItemState
from clawloop_edge.privacy.waiting import waiting_sessions
from clawloop_shared import signing
from clawloop_shared.levels import Level

from .conftest import MakeKept, MakeSignal
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


def test_what_had_left_is_deleted_by_the_server_and_signed_for(
    device: Device, hub: Hub, make_signal: MakeSignal
) -> None:
    kept, other = device.keep("s1"), device.keep("s2")
    judged = make_signal(kept.step.step_id)
    device.pool.keep_signal(judged).result()
    device.outbox.fill()
    device.send()
    items = {item.item_id for item in device.outbox.list() if item.session_id == "s1"}
    hub.adapters = [3]
    done = device.forget("s1")
    assert (done.sessions, done.steps, done.signals) == (1, 1, 1)
    (request_id,) = done.requests
    waiting = device.forgetter.deletions.get(request_id)
    assert (waiting.state, waiting.records, waiting.server.url) == (DeletionState.WAITING, 4, hub.server.url)
    found = ask(device.forgetter.deletions, request_id)
    assert (found.state, found.deleted, found.adapters) == (DeletionState.DONE, 4, [3])
    (asked,) = hub.asked
    assert set(asked.record_ids) == {kept.step.step_id, judged.signal_id, *items}
    assert other.step.step_id not in asked.record_ids
    assert not asked.everything
    entries = list(AuditLog(device.pool).entries())
    assert [entry.kind for entry in entries] == ["sent", "sent", "sent", "forget", "forgotten"]
    assert entries[-2].size_bytes == done.size_bytes
    assert entries[-1].item_id == request_id
    assert AuditLog(device.pool).verify().signed_by_server == 1
    assert device.pool.verify().problems == []


def test_once_a_server_has_answered_nothing_here_names_what_was_deleted(device: Device) -> None:
    kept = device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    message = device.forgetter.deletions.message(request_id)
    assert message is not None
    with device.pool.read() as database:
        keys = "SELECT count(*) FROM keys WHERE scope GLOB 'deletion/*'"
        assert database.conn.execute(keys).fetchone()[0] == 1
    ask(device.forgetter.deletions, request_id)
    assert device.forgetter.deletions.message(request_id) is None
    with device.pool.read() as database:
        assert database.conn.execute(keys).fetchone()[0] == 0
        assert database.conn.execute("SELECT body FROM deletions").fetchall() == [(None,)]
        assert database.conn.execute("SELECT count(*) FROM outbox_records").fetchone()[0] == 0
    (item,) = device.outbox.list()
    assert (item.session_id, item.app, item.has_bytes, item.state) == ("", "", False, ItemState.SENT)
    assert Outbox.items_with(device.pool, kept.step.step_id) == []


def test_what_had_not_left_is_destroyed_and_no_server_is_asked(device: Device) -> None:
    device.keep("s1")
    assert [item.state for item in device.outbox.list()] == [ItemState.QUEUED]
    assert device.forgetter.preview(Wanted(session_ids=["s1"])).left == []
    assert device.forget("s1").requests == []
    assert device.outbox.list() == []
    assert device.outbox.next_items(1 << 20) == ([], False)
    with device.pool.read() as database:
        assert database.conn.execute("SELECT count(*) FROM keys WHERE scope GLOB 'outbox/*'").fetchone()[0] == 0


def test_a_session_is_named_to_the_server_as_it_left(device: Device, hub: Hub) -> None:
    kept = device.keep("s1")
    device.send()
    rename = "UPDATE outbox_records SET sent_as = 'step-pseudonym'"
    device.pool.submit(lambda database: database.conn.execute(rename)).result()
    device.forget("s1")
    assert ask_due(device.forgetter.deletions) == 1
    assert "step-pseudonym" in hub.asked[0].record_ids
    assert kept.step.step_id not in hub.asked[0].record_ids


def test_a_server_that_is_away_is_asked_again_and_again_also_after_a_restart(
    device: Device, hub: Hub, tmp_path: Path
) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    hub.refusals = [(503, 0), (503, 0), (429, 3600), (403, 0)]
    waits = []
    for _ in hub.refusals[:]:
        assert device.forgetter.deletions.due() == [request_id]
        assert ask_due(device.forgetter.deletions) == 0
        found = device.forgetter.deletions.get(request_id)
        waits.append(found.due_ms - device.now_ms)
        assert "not now" in found.problem
        assert device.forgetter.deletions.due() == []
        device.now_ms = found.due_ms
    assert waits == [FIRST_WAIT_MS, 2 * FIRST_WAIT_MS, 3_600_000, 8 * FIRST_WAIT_MS]
    with Pool.open(tmp_path, device.pool.store) as again:
        assert ask_due(Deletions(again, clock=device.clock)) == 1
    assert device.forgetter.deletions.get(request_id).state is DeletionState.DONE
    assert len({request.request_id for request in hub.asked}) == 1


def test_the_longest_wait_is_bounded(device: Device) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    for _ in range(40):
        device.forgetter.deletions.failed(request_id, "away")
    assert device.forgetter.deletions.get(request_id).due_ms - device.now_ms == LONGEST_WAIT_MS


@pytest.mark.parametrize("retry_s", [10**8, 10**12])
def test_no_server_puts_a_request_off_for_good(device: Device, hub: Hub, retry_s: int) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    hub.refusals = [(503, retry_s)]
    assert ask(device.forgetter.deletions, request_id).due_ms - device.now_ms <= LONGEST_WAIT_MS


def test_what_a_server_says_is_one_line_of_a_bounded_length(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    hub.refusals, hub.message = [(403, 0)], "no\n\x1b[2Jand on" + "n" * 10_000
    found = ask(device.forgetter.deletions, request_id)
    assert "no \ufffd[2Jand onnn" in found.problem
    assert len(found.problem) < 400


def test_a_server_that_speaks_slowly_is_not_listened_to_for_longer(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    hub.pause_s = 0.02  # 300 bytes and more: over 6 s
    begun_s = time.monotonic()
    found = ask(device.forgetter.deletions, request_id, timeout_s=0.3)
    assert time.monotonic() - begun_s < 5
    assert found.state is DeletionState.WAITING
    assert "no whole answer within 0.3 s" in found.problem


@pytest.mark.parametrize("lie", ["another key", "another request"])
def test_a_receipt_that_proves_nothing_is_not_believed(device: Device, hub: Hub, lie: str) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    if lie == "another key":
        hub.private = signing.new_key()
    else:
        hub.answers_for = "another"
    found = ask(device.forgetter.deletions, request_id)
    assert (found.state, found.tries) == (DeletionState.WAITING, 1)
    assert "signature" in found.problem or "another" in found.problem
    assert [entry.kind for entry in AuditLog(device.pool).entries()] == ["sent", "forget"]


def test_a_server_of_another_certificate_is_told_nothing(device: Device, hub: Hub, tmp_path: Path) -> None:
    device.keep("s1")
    device.send()
    (other := tmp_path / "other").mkdir()
    with serving(other) as stranger:
        device.servers = [msgspec.structs.replace(hub.server, url=stranger.server.url)]
        (request_id,) = device.forget("s1").requests
        found = ask(device.forgetter.deletions, request_id)
        assert stranger.asked == []
    assert "is not the server of the invitation" in found.problem


def test_a_server_that_has_deleted_the_device_has_nothing_left_to_delete_and_signs_for_that(
    device: Device, hub: Hub
) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    hub.device_deleted = True
    found = ask(device.forgetter.deletions, request_id)
    assert (found.state, found.done_ms) == (DeletionState.GONE, 5000)
    assert device.forgetter.deletions.due() == []
    assert AuditLog(device.pool).verify().signed_by_server == 1


@pytest.mark.parametrize("status", [204, 302, 400, 403, 404, 409, 410, 500])
def test_an_answer_that_nobody_signed_ends_no_request(device: Device, hub: Hub, status: int) -> None:
    device.keep("s1")
    device.send()
    (request_id,) = device.forget("s1").requests
    waits = []
    for _ in range(3):
        hub.refusals = [(status, 0)]
        found = ask(device.forgetter.deletions, request_id)
        assert found.state is DeletionState.WAITING
        assert str(status) in found.problem
        waits.append(found.due_ms - device.now_ms)
    assert waits == [FIRST_WAIT_MS, 2 * FIRST_WAIT_MS, 4 * FIRST_WAIT_MS]
    assert ask(device.forgetter.deletions, request_id).state is DeletionState.DONE


def test_of_a_server_that_is_not_known_any_more_the_owner_is_told(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    device.servers = [Server(url="https://other:1", root_key=b"o" * 32, ca_pem="other")]
    (left,) = device.forgetter.preview(Wanted(session_ids=["s1"])).left
    assert left.server == Server(url=hub.server.url, root_key=hub.root_key)
    (request_id,) = device.forget("s1").requests
    found = ask(device.forgetter.deletions, request_id)
    assert (found.state, found.server.url) == (DeletionState.STRANDED, hub.server.url)
    assert device.forgetter.deletions.due() == []


def test_the_server_may_keep_what_it_got(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    assert device.forget("s1", keep_remote=True).requests == []
    assert device.forgetter.deletions.all() == []
    assert device.pool.sessions() == []


def test_everything_is_one_request_for_everything(device: Device, hub: Hub) -> None:
    for session in ("s1", "s2"):
        device.keep(session)
    device.send()
    device.keep("s3")
    assert device.forget(everything=True).sessions == 3
    assert ask_due(device.forgetter.deletions) == 1
    (asked,) = hub.asked
    assert (asked.everything, asked.record_ids) == (True, [])
    assert device.forget(everything=True).requests == [], "nothing is left that could be asked for twice"


def test_at_level_off_the_request_goes_out_all_the_same(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    device.consent.set_level(Level.OFF)
    device.forget("s1")
    assert ask_due(device.forgetter.deletions) == 1
    assert len(hub.asked) == 1


def test_sessions_are_chosen_by_app_and_by_the_time_in_which_they_were_in_use(device: Device) -> None:
    device.keep("long", at_ms=1000)
    device.keep("long", at_ms=9000)
    device.keep("early", at_ms=2000)
    device.keep("late", at_ms=8000, app="other")

    def chosen(**wanted: object) -> list[str]:
        preview = device.forgetter.preview(msgspec.convert(wanted, Wanted))
        return [session.session_id for session in preview.sessions]

    assert chosen(since_ms=4000, until_ms=5000) == ["long"]
    assert chosen(until_ms=2000) == ["long", "early"]
    assert chosen(since_ms=8000) == ["long", "late"]
    assert chosen(app="other") == ["late"]
    assert chosen(session_ids=["early", "late"], app="agent") == ["early"]
    assert chosen(everything=True) == ["long", "late", "early"]
    found = device.forgetter.preview(Wanted(everything=True))
    assert (found.steps, found.first_ms, found.last_ms) == (4, 1000, 9000)


def test_a_session_that_cannot_be_read_is_shown_and_goes(device: Device) -> None:
    device.keep("s1")
    spoil = "UPDATE sessions SET summary = x'00'"
    device.pool.submit(lambda database: database.conn.execute(spoil)).result()
    (session,) = device.forgetter.preview(Wanted(session_ids=["s1"])).sessions
    assert (session.session_id, session.title, session.steps) == ("s1", "(cannot be read)", 1)
    assert device.forget("s1").sessions == 1


def test_a_broken_consent_does_not_stand_in_the_way(device: Device, hub: Hub) -> None:
    device.keep("s1")
    device.send()
    device.pool.submit(lambda database: database.conn.execute("DELETE FROM state WHERE name = 'device.key'")).result()
    (request_id,) = device.forget("s1").requests
    assert device.forgetter.deletions.get(request_id).server == hub.server


def test_an_item_that_is_being_made_when_its_session_is_forgotten_is_not_put_in(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.pool.keep_step(device.make_kept(session="s1")).result()
    drafts = batch.Maker.drafts

    def slow(maker: batch.Maker, sources: object) -> object:
        device.forget("s1")
        monkeypatch.undo()
        return drafts(maker, sources)  # type: ignore[arg-type]

    monkeypatch.setattr(batch.Maker, "drafts", slow)
    device.outbox.fill()
    assert device.outbox.list() == []


def test_the_limit_of_a_forgotten_session_is_forgotten(device: Device) -> None:
    device.keep("s1")
    device.consent.set_limit(Subject.SESSION, "s1", level=Level.METRICS)
    device.forget("s1")
    assert device.consent.limits() == []


def test_what_is_let_go_because_it_is_old_leaves_nothing_behind_in_the_outbox(device: Device) -> None:
    device.keep("s1")
    device.send()
    device.keep("s1")
    device.pool.submit(lambda database: device.pool.forgetting.let_go(database, ["s1"])).result()
    assert [(item.state, item.has_bytes) for item in device.outbox.list()] == [
        (ItemState.SENT, False),
        (ItemState.DROPPED, False),
    ]
    assert device.pool.verify().problems == []
    left = device.forgetter.preview(Wanted(everything=True)).left
    assert [gone.records for gone in left] == [2], "it can still be asked back"


def test_a_session_is_waited_for_until_the_server_has_it(device: Device, server: object) -> None:
    def waiting() -> set[str]:
        with device.pool.read() as database:
            return waiting_sessions(database, pool=device.pool, consent=device.consent)

    assert waiting() == set()
    device.pool.keep_step(device.make_kept(session="s1")).result()
    assert waiting() == {"s1"}, "the outbox has not looked at it"
    device.outbox.fill()
    assert waiting() == {"s1"}
    device.send()
    assert waiting() == {"s1"}
    acknowledge: Callable[..., None] = server.acknowledge  # type: ignore[attr-defined]
    acknowledge(device.outbox, [item.item_id for item in device.outbox.list()])
    assert waiting() == set()
    device.pool.keep_step(device.make_kept(session="s2")).result()
    device.consent.set_level(Level.METRICS)
    assert waiting() == set(), "nothing leaves at this level"


def test_what_had_left_of_a_session_that_became_old_is_still_asked_back(device: Device, hub: Hub) -> None:
    kept = device.keep("s1", app="old agent")
    device.keep("s2")
    device.send()
    device.pool.submit(lambda database: device.pool.forgetting.let_go(database, ["s1", "s2"])).result()
    assert device.forgetter.left_named("s") == ["s1", "s2"]
    (meant,) = device.forgetter.preview(Wanted(app="old agent")).sessions
    assert (meant.session_id, meant.steps) == ("s1", 0)
    assert device.forgetter.preview(Wanted(until_ms=device.now_ms - 1)).sessions == []
    device.forget("s1")
    assert ask_due(device.forgetter.deletions) == 1
    assert kept.step.step_id in hub.asked[0].record_ids
    assert device.forgetter.left_named("s") == ["s2"]
    device.pool.keep_step(kept).result()
    assert device.pool.sessions() == []
