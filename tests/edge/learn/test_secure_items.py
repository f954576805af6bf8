"""A delta that leaves in a secure sum: what goes out is an item of the outbox, once, and no other bytes of it ever."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.errors import ConsentError
from clawloop_edge.learn.masked import MaskedItems, PoolMembers
from clawloop_edge.learn.sums import SumMember, SumRules
from clawloop_edge.pool.crypt import Scope
from clawloop_edge.privacy.audit import SENT, AuditLog
from clawloop_edge.privacy.items import OutboxItem
from clawloop_edge.privacy.schema import ItemState
from clawloop_server.aggregate.secure import SecureSum, Status
from clawloop_server.aggregate.secure_delivery import terms_of
from clawloop_shared import secure, signing, wire
from clawloop_shared.deltas import DELTA_KIND, LearnTask
from clawloop_shared.files import sha256
from clawloop_shared.flat import flatten
from clawloop_shared.levels import Level
from clawloop_shared.messages import SecureRequest
from clawloop_shared.secure import MASKED_KIND, Phase

from .learning_device import SHAPE, LearningDevice, learn_task


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LearningDevice]:
    found = LearningDevice(tmp_path)
    found.set_level(Level.PRIVATE_DELTAS)
    found.keep_many(3)
    yield found
    found.close()


@pytest.fixture
def task(device: LearningDevice) -> LearnTask:
    device.desk._sums = True
    return device.learn(learn_task(secure=True, task_id="task"))


def the_item(device: LearningDevice) -> OutboxItem:
    (item,) = device.outbox.list()
    return item


def masked_items(device: LearningDevice) -> MaskedItems:
    return MaskedItems(device.pool, device.consent, clock=device.clock)


def released(device: LearningDevice) -> list[str]:
    with device.pool.read() as database:
        return [row[0] for row in database.conn.execute("SELECT state FROM ledger ORDER BY seq")]


def test_a_whole_sum_of_three_devices_from_their_outboxes(tmp_path: Path) -> None:
    devices: dict[str, LearningDevice] = {}
    keys, members, plain = {}, {}, []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        device = devices[name] = LearningDevice(tmp_path / name, secure_min_members=3)
        device.desk._sums = True
        device.set_level(Level.PRIVATE_DELTAS)
        device.keep_many(3)
        task = device.learn(learn_task(secure=True, task_id="task"))
        keys[name] = signing.new_key()
        items = masked_items(device)
        summand = items.summand("task")
        assert summand is not None
        plain.append(flatten(summand.delta.weights))
        rules = SumRules(min_members=device.settings.secure_min_members, max_new=device.settings.secure_new_members)
        members[name] = SumMember(items, PoolMembers(device.pool), device_key=partial(bytes, keys[name]), rules=rules)
    terms = terms_of(task, SHAPE, sum_id="sum", min_members=3)
    public = {name: signing.public_key(key) for name, key in keys.items()}
    done = SecureSum.begin(terms, public, now_ms=0, phase_ms=1000, patience_ms=1000)
    sent: dict[str, bytes] = {}
    for _ in Phase:
        for name, member in members.items():
            request = done.due(name, now_ms=0)
            if request is not None:
                reply = member.asked(request)
                sent |= {name: reply.body} if reply.phase == Phase.MASKED else {}
                assert bool(reply.item_id) is (reply.phase == Phase.MASKED)
                done.answered(name, reply, now_ms=0)
    assert done.state.status is Status.DONE, done.state.reason
    assert done.result is not None
    assert abs(done.result.values - sum(plain)).max() < 1e-5
    for name, device in devices.items():
        item = the_item(device)
        assert (item.kind, item.state, item.level) == (MASKED_KIND, ItemState.RECEIVED, Level.PRIVATE_DELTAS)
        assert device.outbox.get(item.item_id).body == sent[name], "what left is what the outbox shows"
        assert wire.decode(sent[name], secure.Masked).item_id == item.item_id
        (entry,) = AuditLog(device.pool).entries(item_id=item.item_id)
        assert (entry.kind, entry.sha256, entry.size_bytes) == (SENT, sha256(sent[name]), len(sent[name]))
        AuditLog(device.pool).verify()
        assert released(device) == ["released"]
        assert device.outbox.next_items(1 << 20) == ([], False)
        assert device.outbox.waiting() == 0
        assert PoolMembers(device.pool).known() == set(public.values()) - {public[name]}
        device.close()


def test_it_waits_for_its_owner_and_leaves_no_other_way(device: LearningDevice, task: LearnTask) -> None:
    items, item = masked_items(device), the_item(device)
    assert item.kind == DELTA_KIND
    device.now_ms -= 1
    assert items.summand("task") is None, "it is held"
    assert items.summand("another") is None, "nothing was learned for that"
    device.outbox.approve(item.item_id)
    summand = items.summand("task")
    assert summand is not None
    assert device.outbox.next_items(1 << 20)[0] == []
    with pytest.raises(ConsentError):
        device.outbox.mark_sent([item.item_id])
    items.leaving(summand.item_id, b"masked")
    assert device.outbox.get(item.item_id).body == b"masked"
    with pytest.raises(ConsentError):
        items.leaving(summand.item_id, b"again")
    with pytest.raises(ConsentError):
        items.summand("task")


def test_what_was_dropped_or_lowered_is_in_no_sum(device: LearningDevice, task: LearnTask) -> None:
    items = masked_items(device)
    summand = items.summand("task")
    assert summand is not None
    device.set_level(Level.METRICS)
    with pytest.raises(ConsentError):
        items.leaving(summand.item_id, b"masked")
    with pytest.raises(ConsentError):
        items.summand("task")
    assert released(device) == ["returned"], "nothing left, so nothing is counted"


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_large_is_sealed_before_the_transaction_that_keeps_it(
    device: LearningDevice, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that an agent says can be kept while one lasts."""
    threads = dict[str, int]()
    plain = Scope.seal

    def seal(self: Scope, table: str, record: str, *, column: str, **rest: Any) -> bytes:
        threads[f"{table}.{column}"] = threading.get_ident()
        return plain(self, table, record, column=column, **rest)

    device.desk._sums = True
    if masked:
        device.learn(learn_task(secure=True, task_id="task"))
        items = masked_items(device)
        summand = items.summand("task")
        assert summand is not None
        monkeypatch.setattr(Scope, "seal", seal)
        items.leaving(summand.item_id, b"masked")
    else:
        monkeypatch.setattr(Scope, "seal", seal)
        device.learn(learn_task(secure=True, task_id="task"))
    assert threads["outbox.body"] == threading.get_ident()
    assert threads["outbox.facts"] != threading.get_ident(), "the writer's thread"
    assert device.outbox.get(the_item(device).item_id).body


def test_forgetting_a_session_reaches_the_server_by_the_items_name(device: LearningDevice, task: LearnTask) -> None:
    items = masked_items(device)
    summand = items.summand("task")
    assert summand is not None
    items.leaving(summand.item_id, b"masked")
    with device.pool.read() as database:
        query = "SELECT DISTINCT sent_as FROM outbox_records WHERE item_id = ?"
        names = [row[0] for row in database.conn.execute(query, (summand.item_id,))]
    assert names == [summand.item_id]


def test_a_restart_in_mid_sum_is_a_drop_out(device: LearningDevice, task: LearnTask) -> None:
    """Secrets are gone, so what was sent can be unmasked by the others alone; this device answers nothing more."""
    items = masked_items(device)
    summand = items.summand("task")
    assert summand is not None
    items.leaving(summand.item_id, b"masked")
    with pytest.raises(ConsentError):
        masked_items(device).summand("task")
    member = SumMember(masked_items(device), PoolMembers(device.pool), device_key=signing.new_key, rules=SumRules())
    assert "started anew" in member.asked(SecureRequest("sum", Phase.CONFIRM, b"")).refused
    assert not the_item(device).has_bytes
    assert device.outbox.waiting() == 0
