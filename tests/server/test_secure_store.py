"""Secure sums in the hub's database: they begin by themselves, outlive a restart, and become a delta for a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from clawloop_server.aggregate.secure import Status
from clawloop_server.aggregate.secure_store import ATTEMPTS, SecureSums
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base
from clawloop_server.cli.commands import app
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.deltas import Deltas
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas, devices_in
from clawloop_shared.errors import ClawloopError, StorageError
from clawloop_shared.flat import flatten
from clawloop_shared.messages import ForgetReceipt, ForgetRequest, SecureReply
from clawloop_shared.secure import Phase

from .secure_fleet import SHAPE, TASK, Device

PHASE_S = 10.0


class Hub:
    """A hub's sums, and its devices with their ids."""

    def __init__(self, vault: Vault, keys: ServerKeys, add: Callable[..., str], devices: int) -> None:
        self.vault, self.keys, self.now_ms = vault, keys, 1_000_000
        self.seals = DeviceSeals(vault.database, keys.master)
        self.devices: dict[str, Device] = {}
        for number in range(devices):
            device = Device(number)
            self.devices[add(device.key)] = device
        self.silent = set[str]()
        self.start()

    def start(self) -> None:
        """As the hub does, again and again."""
        self.sums = SecureSums(
            self.vault.database,
            settings=FederateSettings(secure_phase_s=PHASE_S),
            shape_of=lambda line_id: SHAPE,
            keep=SumDeltas(self.vault.database, self.seals),
            clock_ms=lambda: self.now_ms,
        )

    def expect(self) -> None:
        for device_id in self.devices:
            self.sums.expect(device_id, TASK)

    def ask_all(self) -> None:
        for device_id in self.devices:
            self.ask(device_id)
        self.now_ms += 1000

    def ask(self, device_id: str) -> None:
        request = self.sums.due(device_id)
        if request is not None and device_id not in self.silent:
            self.sums.answered(device_id, self.devices[device_id].member.asked(request))

    def until(self, phase: Phase) -> None:
        self.sums.tick()
        for _ in range(30):
            if any(found.phase is phase and found.status is Status.RUNNING for found in self.sums.overview()):
                return
            self.ask_all()
        raise AssertionError(f"no sum came to {phase}: {self.sums.overview()}")

    def run(self) -> None:
        for _ in range(80):
            self.ask_all()
            if self.sums.overview() and all(found.status is not Status.RUNNING for found in self.sums.overview()):
                return

    def mean(self, devices: list[str]) -> np.ndarray:
        found = [flatten(self.devices[device_id].delta.weights) for device_id in devices]
        return np.asarray(np.mean(found, axis=0))


@pytest.fixture
def hub(vault: Vault, keys: ServerKeys, add_device: Callable[..., str]) -> Hub:
    return Hub(vault, keys, add_device, 7)


def test_a_sum_begins_when_enough_are_expected_and_becomes_a_delta(hub: Hub) -> None:
    for device_id in list(hub.devices)[:4]:
        hub.sums.expect(device_id, TASK)
    hub.ask_all()
    assert not hub.sums.overview(), "four are too few"
    hub.expect()
    hub.run()
    (done,) = hub.sums.overview()
    assert (done.status, sorted(done.members)) == (Status.DONE, sorted(hub.devices))
    deltas = Deltas(hub.vault.database, hub.seals)
    (waiting,) = deltas.waiting(TASK.line_id)
    delta = deltas.read(waiting.delta_id)
    assert delta is not None
    assert np.abs(flatten(delta.weights) - hub.mean(list(hub.devices))).max() < 1e-6
    assert waiting.device_id == done.sum_id
    assert devices_in(hub.vault.database, done.sum_id) == set(hub.devices)
    assert devices_in(hub.vault.database, "another") == {"another"}
    assert all(hub.sums.due(device_id) is None for device_id in hub.devices), "it is over"
    assert not hub.vault.database.count("SELECT count(*) FROM secure_sums WHERE state NOT NULL OR total NOT NULL")


@pytest.mark.parametrize("phase", list(Phase))
def test_a_hub_that_starts_anew_goes_on_in_mid_phase(hub: Hub, phase: Phase) -> None:
    hub.expect()
    hub.until(phase)
    for device_id in list(hub.devices)[:3]:
        hub.ask(device_id)
        hub.start()
    hub.run()
    (done,) = hub.sums.overview()
    assert (done.status, len(done.members)) == (Status.DONE, 7)
    assert hub.vault.database.count("SELECT count(*) FROM deltas") == 1


def test_a_hub_that_was_away_too_long_ends_it_cleanly(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.MASKED)
    hub.ask(next(iter(hub.devices)))
    hub.now_ms += 3_600_000
    hub.start()
    hub.sums.tick()
    (failed,) = [found for found in hub.sums.overview() if found.status is Status.FAILED]
    assert "phase masked: 0 of 7 devices answered" in failed.reason, "a single one was not kept yet"
    assert not hub.vault.database.count("SELECT count(*) FROM deltas")


def test_what_cannot_be_written_is_asked_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.expect()
    hub.until(Phase.UNMASK)

    def full(*args: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(hub.sums, "_keep_sum", full)
    with pytest.raises(StorageError):
        hub.ask_all()
    monkeypatch.undo()
    assert hub.sums.overview()[0].status is Status.RUNNING
    hub.run()
    assert hub.sums.overview()[0].status is Status.DONE
    assert hub.vault.database.count("SELECT count(*) FROM deltas") == 1


def test_a_database_that_is_held_up_holds_up_nobody_else(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def held(now_ms: int) -> None:
        raise StorageError("the database is locked")

    hub.expect()
    monkeypatch.setattr(hub.sums, "_begin", held)
    assert hub.sums.due(next(iter(hub.devices))) is None
    assert "the database is locked" in caplog.text
    monkeypatch.undo()
    hub.now_ms += 2000
    hub.run()
    assert hub.sums.overview()[0].status is Status.DONE


def test_those_whose_values_never_came_are_asked_into_another_sum(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.SHARE)
    hub.silent = set(list(hub.devices)[:3])
    for _ in range(int(PHASE_S) + 2):
        hub.ask_all()
        if hub.sums.overview()[-1].status is Status.FAILED:
            break
    hub.silent = set()
    hub.run()
    newest, first = hub.sums.overview()
    assert (first.status, first.phase) == (Status.FAILED, Phase.SHARE)
    assert (newest.status, len(newest.members)) == (Status.DONE, 7)


def test_after_so_many_failures_nobody_is_expected_any_more(hub: Hub) -> None:
    hub.expect()
    for number in range(ATTEMPTS):
        hub.silent = set()
        hub.until(Phase.SHARE)
        hub.silent = set(hub.devices)
        for _ in range(int(PHASE_S) + 2):
            hub.ask_all()
            if len([found for found in hub.sums.overview() if found.status is Status.FAILED]) > number:
                break
    hub.silent = set()
    hub.ask_all()
    assert [found.status for found in hub.sums.overview()] == [Status.FAILED] * ATTEMPTS
    assert not hub.vault.database.count("SELECT count(*) FROM secure_expected")


def test_a_device_that_joins_late_is_asked_in(hub: Hub) -> None:
    late = list(hub.devices)[-1]
    for device_id in list(hub.devices)[:-1]:
        hub.sums.expect(device_id, TASK)
    hub.ask(next(iter(hub.devices)))
    hub.sums.expect(late, TASK)
    hub.sums.tick()
    hub.run()
    assert late in hub.sums.overview()[0].members


def test_a_revoked_device_drops_out_and_a_deleted_one_ends_the_sum(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.MASKED)
    first, second = list(hub.devices)[:2]
    Devices(hub.vault.database).revoke(first)
    hub.now_ms += 2000
    hub.ask(second)
    Devices(hub.vault.database).bury(second)
    hub.vault.delete_device(second)
    hub.now_ms += 2000
    hub.sums.tick()
    failed = hub.sums.overview()[-1]
    assert failed.status is Status.FAILED
    assert f"device {second} was deleted, and its values are in the sum" in failed.reason


def test_a_member_that_is_revoked_after_its_values_came_is_in_the_sum(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.CONFIRM)
    revoked = next(iter(hub.devices))
    Devices(hub.vault.database).revoke(revoked)
    hub.now_ms += 2000
    hub.run()
    (done,) = hub.sums.overview()
    assert (done.status, done.reason) == (Status.DONE, "")
    assert revoked in done.members


def test_devices_of_other_cohorts_are_in_other_sums(hub: Hub, add_device: Callable[..., str]) -> None:
    for number in range(7, 12):
        device = Device(number)
        hub.devices[add_device(device.key)] = device
    apart = set(list(hub.devices)[7:])
    with hub.vault.database.write() as database:
        for device_id in apart:
            database.run("UPDATE devices SET cohort = 'b' WHERE device_id = ?", [device_id])
    hub.expect()
    hub.run()
    assert {frozenset(found.members) for found in hub.sums.overview()} == {
        frozenset(apart),
        frozenset(hub.devices) - apart,
    }


def test_who_was_in_a_sum_of_a_task_is_not_expected_again(hub: Hub) -> None:
    hub.expect()
    hub.run()
    hub.expect()
    hub.ask_all()
    assert len(hub.sums.overview()) == 1


def key_of_sum(hub: Hub) -> Path:
    (one,) = hub.sums.overview()
    key = hub.vault.database.path.parent / "keys" / "devices" / one.sum_id
    assert key.exists()
    return key


def test_deleting_a_member_shreds_the_sum_that_waits(hub: Hub) -> None:
    hub.expect()
    hub.run()
    device_id, key = next(iter(hub.devices)), key_of_sum(hub)
    hub.vault.delete_device(device_id)
    assert not Deltas(hub.vault.database, hub.seals).waiting(TASK.line_id)
    assert not key.exists()


def forget(hub: Hub, device_id: str) -> ForgetReceipt:
    request = ForgetRequest(request_id="r", device_id=device_id, at_ms=1, record_ids=["item"])
    return hub.vault.forget(request)


def test_a_member_that_has_its_part_forgotten_takes_the_sum_along(hub: Hub) -> None:
    hub.expect()
    hub.run()
    key = key_of_sum(hub)
    receipt = forget(hub, next(iter(hub.devices)))
    assert (receipt.deleted, receipt.unknown) == (1, 0)
    assert not Deltas(hub.vault.database, hub.seals).waiting(TASK.line_id)
    assert not key.exists()


def test_a_part_that_is_forgotten_before_the_sum_is_done_keeps_it_from_being_kept(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.UNMASK)
    device_id = next(iter(hub.devices))
    forget(hub, device_id)
    hub.run()
    (done,) = hub.sums.overview()
    assert f"device {device_id} asked to forget its part" in done.reason
    assert not Deltas(hub.vault.database, hub.seals).waiting(TASK.line_id)


def test_answers_that_are_none_take_their_device_out_for_good(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.SHARE)
    liar, sum_id = next(iter(hub.devices)), hub.sums.overview()[0].sum_id
    with pytest.raises(ClawloopError):
        hub.sums.answered(liar, SecureReply(sum_id, Phase.SHARE, b"garbage"))
    hub.start()
    assert hub.sums.due(liar) is None
    hub.run()
    assert liar not in hub.sums.overview()[0].members
    hub.sums.answered(liar, SecureReply("unknown", Phase.SHARE, b"garbage"))


def test_a_task_without_a_sum_is_not_expected_and_one_that_is_too_large_is_given_up(hub: Hub) -> None:
    for device_id in hub.devices:
        hub.sums.expect(device_id, msgspec.structs.replace(TASK, secure=False))
    assert not hub.vault.database.count("SELECT count(*) FROM secure_expected")
    for device_id in hub.devices:
        hub.sums.expect(device_id, msgspec.structs.replace(TASK, clip=0.0))
    hub.sums.tick()
    assert not hub.sums.overview()
    assert not hub.vault.database.count("SELECT count(*) FROM secure_expected")


def test_the_command_line_tells_of_sums(hub: Hub, home: Home, base: Base) -> None:
    def told(*arguments: str) -> str:
        return CliRunner().invoke(app, ["data", "sums", "--home", str(home.folder), *arguments]).stdout

    assert "(none)" in told()
    hub.expect()
    hub.until(Phase.SHARE)
    assert "phase share" in told()
    hub.silent = set(hub.devices)
    hub.now_ms += 100_000
    hub.sums.tick()
    _, found = msgspec.json.decode(told("--json"))
    assert (found["status"], found["phase"]) == ("failed", "share")
    assert "silent: " in found["reason"]
