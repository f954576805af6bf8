"""Changing the key: nothing is lost, whoever has the pool open goes on, and no earlier copy opens any more."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from clawloop_edge.errors import PoolError
from clawloop_edge.pool import rotate as rotating
from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.keys import FileKeyStore, KeyBundle
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.rotate import rotate
from clawloop_edge.pool.store import Pool
from clawloop_shared.database import open_database
from clawloop_shared.errors import StorageError

MakeKept = Callable[..., KeptStep]


@pytest.fixture
def store(tmp_path: Path) -> FileKeyStore:
    """The key file of a home in `tmp_path`."""
    return FileKeyStore(tmp_path / "pool.key")


def versions(pool: Pool) -> tuple[int, set[int]]:
    """The version in force, and those that wrap a data key."""
    with pool.read() as database:
        in_force = database.execute("SELECT kek FROM pool").fetchone()[0]
        return in_force, {row[0] for row in database.execute("SELECT kek FROM keys")}


def test_after_a_rotation_everything_opens_and_one_new_key_is_left(
    tmp_path: Path, store: FileKeyStore, make_kept: MakeKept
) -> None:
    kept = [make_kept(session=f"session-{number}") for number in range(5)]
    with Pool.open(tmp_path, store) as pool:
        before = store.load()
        for each in kept:
            pool.keep_step(each).result()
        assert rotate(pool) == rotating.Rotated(version=2, keys=7)
        assert versions(pool) == (2, {2})
        assert rotate(pool).version == 3
        kept.append(make_kept(session="later"))
        pool.keep_step(kept[-1]).result()
        assert pool.verify().problems == []
    after = store.load()
    assert (after.file_key, list(after.keks)) == (before.file_key, [3])
    assert before.keks[1] not in after.keks.values()
    with Pool.open(tmp_path, store) as pool:
        assert [pool.get_step(each.step.step_id) for each in kept] == kept
        assert versions(pool) == (3, {3})


def test_thousands_of_keys_are_wrapped_anew(tmp_path: Path, store: FileKeyStore) -> None:
    with Pool.open(tmp_path, store) as pool:
        scopes = [f"session/{number}" for number in range(2500)]

        def keys() -> list[bytes]:
            with pool.read() as database:
                return [pool.keyring.find(database, scope).key for scope in scopes]

        pool.submit(lambda db: [pool.keyring.ensure(db, scope) for scope in scopes]).result()
        before = keys()
        assert rotate(pool).keys == 2502
        assert keys() == before
        assert versions(pool) == (2, {2})


def test_an_edge_that_serves_takes_up_the_key_that_a_command_made(
    tmp_path: Path, store: FileKeyStore, make_kept: MakeKept
) -> None:
    with Pool.open(tmp_path, store, writer=True) as serving:
        kept = [make_kept(session="before")]
        serving.keep_step(kept[0]).result()
        turn, problems = threading.Semaphore(0), list[Exception]()

        def serve() -> None:
            for _ in range(20):
                kept.append(make_kept(session=f"session-{len(kept)}"))
                try:
                    serving.keep_step(kept[-1]).result()
                    assert serving.get_step(kept[-1].step.step_id) == kept[-1]
                except Exception as error:  # noqa: BLE001  # shown by the assertion below
                    problems.append(error)
                turn.release()

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(5):
            assert turn.acquire(timeout=20)
            with Pool.open(tmp_path, FileKeyStore(store.path)) as command:
                rotate(command)
        thread.join()
        assert problems == []
        assert [serving.get_step(each.step.step_id) for each in kept] == kept
        assert versions(serving) == (6, {6})
        assert serving.verify().problems == []


def test_a_long_read_from_before_a_rotation_goes_on(tmp_path: Path, store: FileKeyStore, make_kept: MakeKept) -> None:
    kept = [make_kept(), make_kept(session="other")]
    with Pool.open(tmp_path, store) as pool:
        for each in kept:
            pool.keep_step(each).result()
        with pool.reading() as reading:
            assert reading.kept(kept[0].step.step_id) == kept[0]
            rotate(pool)
            pool.get_step(kept[0].step.step_id)
            assert reading.kept(kept[1].step.step_id) == kept[1]


def test_an_earlier_copy_and_todays_key_open_nothing(
    tmp_path: Path, store: FileKeyStore, make_kept: MakeKept, caplog: pytest.LogCaptureFixture
) -> None:
    home, copy = tmp_path, tmp_path / "copy"
    with Pool.open(home, store) as pool:
        pool.keep_step(make_kept()).result()
    copy.mkdir(mode=0o700)
    shutil.copy(home / "pool.db", copy)
    with Pool.open(home, store) as pool:
        rotate(pool)
    for path in (store.path, store.path.with_name(f"{store.path.name}.anchor")):
        shutil.copy(path, copy)
    before = (copy / "pool.db").read_bytes()
    with pytest.raises(PoolError, match=r"needs version 1 of its key, and there is version 2; .*from before"):
        Pool.open(copy, FileKeyStore(copy / "pool.key"))
    assert (copy / "pool.db").read_bytes() == before
    keys = store.load()
    database = open_database(copy / "pool.db", keys.file_key)
    for scope, _, wrapped in database.execute("SELECT scope, kek, wrapped FROM keys").fetchall():
        with pytest.raises(StorageError, match="wrong master key"):
            Keyring("", {1: keys.keks[2]}).unwrap(scope, wrapped, version=1)
    database.close()
    assert caplog.text == ""


def test_a_key_file_from_before_a_rotation_says_so(tmp_path: Path, store: FileKeyStore) -> None:
    with Pool.open(tmp_path, store) as pool:
        before = store.path.read_bytes()
        rotate(pool)
    store.path.write_bytes(before)
    database = (tmp_path / "pool.db").read_bytes()
    with pytest.raises(PoolError, match="the key is an older copy: bring back the newer"):
        Pool.open(tmp_path, store)
    assert store.path.read_bytes() == before
    assert (tmp_path / "pool.db").read_bytes() == database


class Stopped(Exception):
    """Where a process dies, as a test has it."""


@pytest.mark.parametrize("dies_at", ["first replace", "rewrap", "second replace"])
def test_a_rotation_that_stops_is_finished_by_the_next_opening(
    tmp_path: Path, store: FileKeyStore, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    kept = make_kept()
    calls = iter(["first replace", "second replace"])
    replace = FileKeyStore.replace

    def stopping_replace(self: FileKeyStore, bundle: KeyBundle) -> None:
        if next(calls) == dies_at:
            raise Stopped
        replace(self, bundle)

    def stopping_rewrap(*_: object, **__: object) -> None:
        raise Stopped

    with Pool.open(tmp_path, store) as pool:
        pool.keep_step(kept).result()
        with monkeypatch.context() as patched:
            patched.setattr(FileKeyStore, "replace", stopping_replace)
            if dies_at == "rewrap":
                patched.setattr(rotating, "rewrap", stopping_rewrap)
            with pytest.raises(Stopped):
                rotate(pool)
        assert pool.get_step(kept.step.step_id) == kept
    expected = 1 if dies_at == "first replace" else 2
    with Pool.open(tmp_path, store) as pool:
        assert versions(pool) == (expected, {expected})
        assert pool.get_step(kept.step.step_id) == kept
        assert list(store.load().keks) == [expected]
        assert rotate(pool).version == expected + 1


def test_a_rotation_waits_for_another_and_both_are_done(tmp_path: Path, store: FileKeyStore) -> None:
    with Pool.open(tmp_path, store) as pool:
        threads = [threading.Thread(target=rotate, args=(pool,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert versions(pool) == (5, {5})
        assert list(store.load().keks) == [5]
