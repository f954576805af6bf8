"""The devices' keys lie outside the database: an older copy of it opens nothing of what was deleted since."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.deltas import Deltas
from clawloop_server.vault.seal import DeviceSeal
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import SumDeltas
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta, Method
from clawloop_shared.errors import StorageError
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.messages import ForgetRequest, UploadItem
from clawloop_shared.records import Signal, Step, StepBatch, Target

Make = Callable[..., Any]
CANARY = "canary-of-the-tests"


def send(vault: Vault, device: str, step: Step) -> None:
    judged = Signal(
        signal_id=new_id(), target=Target.RUN, target_id=step.run_id, source="f", value=1.0, created_ms=step.created_ms
    )
    body = wire.encode(StepBatch(steps=[step], signals=[judged]))
    vault.receive(device, [UploadItem(item_id=new_id(), receipt_id=new_id(), kind="steps", body=body)])


def copy_of(home: Home, folder: Path) -> Home:
    """An earlier copy of the database, with its log."""
    folder.mkdir()
    for path in home.folder.glob("server.db*"):
        shutil.copy2(path, folder)
    return Home(folder)


def opens(copy: Home, home: Home, master: bytes, device: str) -> list[str]:
    """The runs of a device that the copy opens with the keys that are left."""
    shutil.copytree(home.keys, copy.keys, dirs_exist_ok=True)
    vault = Vault.open(copy, master, settings=RewardSettings(settle_s=0))
    try:
        seal = vault._seals.open(device)
        rows = vault.database.rows("SELECT step_key, sealed FROM steps WHERE device_id = ?", [device])
        assert rows, "the copy has its rows"
        return [seal.unseal("steps", key, sealed=sealed).decode("latin-1") for key, sealed in rows]
    finally:
        vault.close()


def test_an_earlier_copy_opens_nothing_of_a_device_that_was_deleted_and_everything_of_the_others(
    vault: Vault, home: Home, keys: ServerKeys, tmp_path: Path, add_device: Make, make_step: Make
) -> None:
    gone, stays = add_device(), add_device()
    for device in (gone, stays):
        send(vault, device, make_step(run_id=CANARY))
    before, after = copy_of(home, tmp_path / "before"), copy_of(home, tmp_path / "after")
    assert CANARY in opens(before, home, keys.master, gone)[0], "with the keys of its time"

    Devices(vault.database).bury(gone)
    vault.delete_device(gone)

    with pytest.raises(StorageError, match=f"is gone, and with it what {gone} had sent.*devices delete {gone}"):
        opens(after, home, keys.master, gone)
    assert CANARY in opens(after, home, keys.master, stays)[0]
    restored = Vault.open(after, keys.master, settings=RewardSettings(settle_s=0))
    assert restored.delete_device(gone).steps == 1, "what cannot be opened can be deleted"
    restored.obey_settings()
    assert [t.steps[0].run_id for t in restored.ready(make_step().policy.line, 9)] == [CANARY]
    restored.close()


def test_no_wrapped_key_is_in_the_database(vault: Vault, home: Home, device: str, make_step: Make) -> None:
    send(vault, device, make_step())
    key = home.device_keys / device
    assert (key.stat().st_mode & 0o777, home.device_keys.stat().st_mode & 0o777) == (0o600, 0o700)
    wrapped, cells = key.read_bytes(), set[object]()
    for (table,) in vault.database.rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
        cells |= {cell for row in vault.database.rows(" ".join(("SELECT * FROM", table))) for cell in row}
    assert not [cell for cell in cells if isinstance(cell, bytes) and wrapped[-24:] in cell]


def test_an_earlier_copy_opens_nothing_of_a_device_that_had_everything_forgotten(
    vault: Vault, home: Home, keys: ServerKeys, tmp_path: Path, add_device: Make, make_step: Make
) -> None:
    gone, stays = add_device(), add_device()
    for device in (gone, stays):
        send(vault, device, make_step(run_id=CANARY))
    one, two = (copy_of(home, tmp_path / name) for name in ("one", "two"))
    vault.forget(ForgetRequest(request_id="all", device_id=gone, at_ms=50, record_ids=[], everything=True))
    with pytest.raises(StorageError, match="is gone"):
        opens(one, home, keys.master, gone)
    assert CANARY in opens(one, home, keys.master, stays)[0]
    new = make_step(created_ms=51)
    send(vault, gone, new)  # it stays joined, with a key that replaces the old one
    with pytest.raises(StorageError, match="is gone"):
        opens(two, home, keys.master, gone)
    assert new.run_id in opens(copy_of(home, tmp_path / "now"), home, keys.master, gone)[0]


_KILLED = """
import os, signal, sys
from pathlib import Path
from clawloop_server.home import open_home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from clawloop_shared.messages import ForgetRequest
folder, how, device = sys.argv[1:]
home = open_home(Path(folder))
vault = Vault.open(home, load_master_key(home))
DeviceSeals.bury = lambda self: os.kill(os.getpid(), signal.SIGKILL)
if how == "delete":
    vault.delete_device(device)
else:
    vault.forget(ForgetRequest(request_id="all", device_id=device, at_ms=50, record_ids=[], everything=True))
"""


@pytest.mark.parametrize("how", ["delete", "forget"])
@pytest.mark.parametrize("again", ["start", "send"])
def test_kill_9_between_the_rows_and_the_key_ends_without_the_key(
    vault: Vault, home: Home, keys: ServerKeys, tmp_path: Path, device: str, make_step: Make, how: str, again: str
) -> None:
    send(vault, device, make_step())
    earlier, old = copy_of(home, tmp_path / "earlier"), (home.device_keys / device).read_bytes()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(home.folder), how, device], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert vault.stats().steps == 0
    assert (home.device_keys / device).read_bytes() == old, "it was killed before"
    assert vault._seals.get(device) is None, "and yet nothing is sealed with it any more"
    if again == "start":
        vault.obey_settings()
        assert not (home.device_keys / device).exists()
    else:
        send(vault, device, make_step(created_ms=51))
        vault.obey_settings()
        assert vault.stats().steps == 1
        assert (home.device_keys / device).read_bytes() != old
    with pytest.raises(StorageError, match="is gone"):
        opens(earlier, home, keys.master, device)


def test_a_deletion_that_was_only_noted_is_ended_where_a_server_starts(
    vault: Vault, home: Home, add_device: Make, make_step: Make
) -> None:
    gone, stays = add_device(), add_device()
    for device in (gone, stays):
        send(vault, device, make_step())
    Devices(vault.database).bury(gone)
    vault.obey_settings()
    assert [path.name for path in home.device_keys.iterdir()] == [stays]
    assert vault.stats().steps == 1


def test_where_a_server_starts_files_of_nobody_go_and_files_of_others_stay(
    vault: Vault, home: Home, device: str, make_step: Make
) -> None:
    send(vault, device, make_step())
    unknown, draft, other = new_id(), f".{device}.0123abcd", ".DS_Store"
    for name in (unknown, draft, other):
        (home.device_keys / name).write_bytes(b"x")
    vault.obey_settings()
    assert sorted(os.listdir(home.device_keys)) == sorted([device, other])


def test_a_transaction_that_fails_leaves_a_device_without_a_key_that_counts(
    vault: Vault, home: Home, device: str, make_step: Make
) -> None:
    def fails() -> None:
        with vault.database.write():
            vault._seals.ensure(device)
            assert (home.device_keys / device).exists(), "the file is there before the row is"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert vault._seals.get(device) is None
    send(vault, device, make_step())
    assert vault.stats().steps == 1


_ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.mark.parametrize("name", ["../../master.key", "", "d", f"{_ULID}\n", f"{_ULID[:-1]}U", f"{_ULID}0"])
def test_no_path_is_made_of_what_is_no_id(vault: Vault, name: str) -> None:
    with vault.database.write() as database:
        with pytest.raises(StorageError, match="no id that this server made"):
            vault._seals.make_for_sum(name)
        database.run("INSERT INTO vault_keys VALUES (?, x'00')", [name])
        with pytest.raises(StorageError, match="no id that this server made"):
            vault._seals.get(name)


def test_a_key_that_others_can_read_is_told_of(vault: Vault, home: Home, device: str, make_step: Make) -> None:
    send(vault, device, make_step())
    (home.device_keys / device).chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        vault._seals.open(device)


def sum_of(vault: Vault, members: list[str], base: Base) -> str:
    """A sum of these that waits; its id."""
    sum_id = new_id()
    delta = LoraDelta(
        task_id=new_id(),
        line_id=base.line_id,
        base_version=0,
        method=Method.FFA,
        level=Level.DELTAS,
        rank=1,
        alpha=1.0,
        target_modules=("q_proj",),
        weights=b"not looked at here",
        trajectories=len(members),
    )
    with vault.database.write() as database:
        sql = "INSERT INTO secure_sums VALUES (?, 't', ?, 'done', 'unmask', '', 1, 2, NULL, NULL, NULL)"
        database.run(sql, [sum_id, base.line_id])
        for device in members:
            database.run("INSERT INTO secure_members VALUES (?, ?, x'')", [sum_id, device])
        assert SumDeltas(database, vault._seals)(sum_id, delta, dict.fromkeys(members, "item")) == ""
    return sum_id


@pytest.mark.parametrize("how", ["delete", "everything", "named"])
def test_an_earlier_copy_opens_no_sum_that_a_deleted_member_is_in(
    vault: Vault, home: Home, keys: ServerKeys, tmp_path: Path, base: Base, add_device: Make, how: str
) -> None:
    devices = [add_device() for _ in range(3)]
    of_two, of_others = sum_of(vault, devices[:2], base), sum_of(vault, devices[1:], base)
    earlier = copy_of(home, tmp_path / "earlier")
    if how == "delete":
        vault.delete_device(devices[0])
    else:
        ids = [] if how == "everything" else ["item"]
        vault.forget(
            ForgetRequest(request_id="r", device_id=devices[0], at_ms=1, record_ids=ids, everything=how == "everything")
        )
    assert sorted(os.listdir(home.device_keys)) == sorted(
        {of_others, *devices[1:], *(devices[:1] if how == "named" else [])}
    )
    shutil.copytree(home.keys, earlier.keys)
    copy = Vault.open(earlier, keys.master)
    deltas = Deltas(copy.database, copy._seals)
    found = {delta.device_id: delta.delta_id for delta in deltas.waiting(base.line_id)}
    assert found.keys() == {of_two, of_others}
    assert deltas.read(found[of_others]) is not None
    with pytest.raises(StorageError, match="is gone"):
        deltas.read(found[of_two])
    copy.close()


def test_keys_of_a_database_of_before_move_out_of_it_once(
    vault: Vault, home: Home, keys: ServerKeys, base: Base, add_device: Make, make_step: Make
) -> None:
    devices = [add_device() for _ in range(3)]
    for device in devices:
        send(vault, device, make_step())
    sum_id = sum_of(vault, devices, base)
    owners, database = [*devices, sum_id], vault.database
    wrapped = {owner: (home.device_keys / owner).read_bytes() for owner in owners}
    with database.write():  # as it was then
        database.run_each("INSERT INTO device_secrets VALUES (?, ?)", [[name, wrapped[name]] for name in devices])
        database.run("UPDATE secure_sums SET wrapped = ?", [wrapped[sum_id]])
        database.run("DROP TABLE vault_keys")
        database.run("CREATE TABLE vault_keys (owner_id TEXT PRIMARY KEY, digest BLOB) WITHOUT ROWID")
        database.run("DELETE FROM meta WHERE name = 'device keys'")
    shutil.rmtree(home.device_keys)
    vault.close()

    moved = Vault.open(home, keys.master, settings=RewardSettings(settle_s=0))

    assert {path.name: path.read_bytes() for path in home.device_keys.iterdir()} == wrapped
    assert not moved.database.count("SELECT count(*) FROM device_secrets")
    assert not moved.database.count("SELECT count(*) FROM secure_sums WHERE wrapped NOT NULL")
    assert moved.database.row("SELECT value FROM meta WHERE name = 'device keys'") == ("scrubbed",)
    assert len(moved.ready(base.line_id, 9)) == 3
    (delta,) = moved.deltas.waiting(base.line_id)
    assert moved.deltas.read(delta.delta_id) is not None
    moved.obey_settings()
    moved.delete_device(devices[0])
    assert sorted(os.listdir(home.device_keys)) == sorted(devices[1:])
    moved.close()
    Vault.open(home, keys.master).close()
    assert sorted(os.listdir(home.device_keys)) == sorted(devices[1:])


def test_another_master_key_opens_no_file(vault: Vault, device: str, make_step: Make) -> None:
    send(vault, device, make_step())
    with pytest.raises(StorageError):
        DeviceSeals(vault.database, bytes(32)).open(device)
    assert isinstance(vault._seals.open(device), DeviceSeal)
