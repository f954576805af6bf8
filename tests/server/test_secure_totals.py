"""The running total of a secure sum: written once in a while, and a restart loses what is asked again."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clawloop_server.aggregate import secure_store
from clawloop_server.aggregate.secure import Status
from clawloop_server.aggregate.secure_totals import Counted, Totals
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.store import Vault
from clawloop_shared.errors import StorageError
from clawloop_shared.fixed_point import Ring
from clawloop_shared.secure import Phase

from .test_secure_store import Hub


@pytest.fixture
def hub(vault: Vault, keys: ServerKeys, add_device: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(secure_store, "_TOTAL_EVERY", 3)
    return Hub(vault, keys, add_device, 7)


def files(hub: Hub) -> list[Path]:
    return list((hub.vault.database.path.parent / "sums").glob("*"))


def test_the_total_is_written_once_in_a_while_and_when_its_phase_is_over(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = list[int](), Totals.write

    def counted(self: Totals, sum_id: str, who: Counted, total: Ring) -> None:
        written.append(len(who.places))
        write(self, sum_id, who, total)

    monkeypatch.setattr(Totals, "write", counted)
    hub.expect()
    hub.until(Phase.UNMASK)
    assert written == [3, 6, 7]
    (file,) = files(hub)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not hub.vault.database.count("SELECT count(*) FROM secure_sums WHERE total NOT NULL")
    hub.run()
    assert written == [3, 6, 7]
    assert files(hub) == []
    assert hub.sums.overview()[0].status is Status.DONE


def test_after_a_restart_only_those_are_asked_again_whose_values_were_not_kept(hub: Hub) -> None:
    hub.expect()
    hub.until(Phase.MASKED)
    devices = list(hub.devices)
    for device_id in devices[:5]:
        hub.ask(device_id)
    hub.start()
    asked = [device_id for device_id in devices if hub.sums.due(device_id) is not None]
    assert asked == devices[3:]
    hub.run()
    (done,) = hub.sums.overview()
    assert (done.status, len(done.members)) == (Status.DONE, 7)


def test_a_total_that_is_ahead_of_the_database_counts(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.expect()
    hub.until(Phase.MASKED)
    devices = list(hub.devices)
    for device_id in devices[:2]:
        hub.ask(device_id)

    def full(each: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(hub.sums, "_write", full)
    with pytest.raises(StorageError):
        hub.ask(devices[2])
    monkeypatch.undo()
    assert [device_id for device_id in devices if hub.sums.due(device_id) is not None] == devices[3:]
    hub.run()
    assert hub.sums.overview()[0].status is Status.DONE


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\0\0\0\1x")])
def test_without_its_total_a_sum_ends_once_nobody_can_be_asked_again(hub: Hub, harm: Callable[[Path], None]) -> None:
    hub.expect()
    hub.until(Phase.CONFIRM)
    harm(files(hub)[0])
    hub.start()
    hub.sums.tick()
    first = next(found for found in hub.sums.overview() if found.phase is Phase.CONFIRM)
    assert (first.status, first.reason) == (Status.FAILED, "the total of its masked values was lost")
    assert files(hub) == []


def test_what_a_crash_left_of_other_sums_is_removed(hub: Hub) -> None:
    folder = hub.vault.database.path.parent / "sums"
    Totals(folder).write("old", Counted([1], {1: "item"}), np.arange(5, dtype=np.uint32))
    counted, total = Totals(folder).read("old", values=5)
    assert (counted.items, total.tolist()) == ({1: "item"}, [0, 1, 2, 3, 4])
    hub.start()
    assert files(hub) == []
