"""Whoever is deleted, or wants everything forgotten, is in no secure sum that comes out afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clawloop_server.aggregate.secure import Status
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.deltas import Deltas
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import ForgetRequest
from clawloop_shared.secure import Phase

from .secure_fleet import TASK
from .test_secure_store import Hub


@pytest.fixture
def hub(vault: Vault, keys: ServerKeys, add_device: Callable[..., str]) -> Hub:
    return Hub(vault, keys, add_device, 7)


def empty(hub: Hub, device_id: str) -> None:
    """All of it is to be forgotten; its own clock is far behind."""
    request = ForgetRequest(request_id="all", device_id=device_id, at_ms=1, record_ids=[], everything=True)
    hub.vault.forget(request, now_ms=hub.now_ms)


def delete(hub: Hub, device_id: str) -> None:
    Devices(hub.vault.database).bury(device_id)
    hub.vault.delete_device(device_id)


def waiting(hub: Hub) -> int:
    return len(Deltas(hub.vault.database, hub.seals).waiting(TASK.line_id))


@pytest.mark.parametrize(("go", "why"), [(empty, "asked to forget everything"), (delete, "was deleted")])
@pytest.mark.parametrize("count", [1, 3])
def test_a_sum_that_has_the_values_of_one_that_is_gone_ends_whoever_else_is(
    hub: Hub, go: Callable[[Hub, str], None], why: str, count: int
) -> None:
    hub.expect()
    hub.until(Phase.UNMASK)
    gone = sorted(hub.devices)[:count]
    for device_id in gone:
        go(hub, device_id)
    hub.sums.tick()
    first = next(found for found in hub.sums.overview() if found.phase is Phase.UNMASK)
    assert first.status is Status.FAILED
    assert any(f"device {device_id} {why}, and its values are in the sum" == first.reason for device_id in gone)
    hub.sums.tick()
    assert waiting(hub) == 0


def test_before_its_values_came_the_others_go_on_without_it(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.MASKED)
    device_id = sorted(hub.devices)[0]
    empty(hub, device_id)
    hub.sums.tick()
    hub.run()
    done = next(found for found in hub.sums.overview() if found.status is Status.DONE)
    assert sorted(done.members) == sorted(set(hub.devices) - {device_id})


@pytest.mark.parametrize(("go", "why"), [(empty, "asked to forget everything"), (delete, "was deleted")])
def test_the_keeper_refuses_a_sum_that_ends_in_the_same_moment(
    hub: Hub, go: Callable[[Hub, str], None], why: str
) -> None:
    """Between two ticks: what is handed on is looked at again in the transaction that would keep it."""
    hub.expect()
    hub.until(Phase.UNMASK)
    device_id = sorted(hub.devices)[0]
    go(hub, device_id)
    for other in sorted(hub.devices)[1:]:
        hub.sums._ticked_ms = hub.now_ms
        hub.ask(other)
    (done,) = hub.sums.overview()
    assert (done.status, done.reason) == (Status.DONE, f"device {device_id} {why}, so the sum was not kept")
    assert waiting(hub) == 0


def test_one_that_asked_before_the_sum_began_is_in_it(hub: Hub) -> None:
    empty(hub, sorted(hub.devices)[0])
    hub.now_ms += 1
    hub.expect()
    hub.run()
    (done,) = hub.sums.overview()
    assert (done.status, len(done.members), done.reason, waiting(hub)) == (Status.DONE, 7, "", 1)
