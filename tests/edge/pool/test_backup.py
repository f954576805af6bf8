"""A backup is whole and verified, and comes back whole or not at all."""

import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest

from clawloop_edge.errors import PoolError
from clawloop_edge.pool import restore as restoring
from clawloop_edge.pool.backup import Backup, Manifest, back_up, read_backup
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.passphrase import Cost, seal_keys
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.restore import Restored, Rooms, restore
from clawloop_edge.pool.rotate import rotate
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import in_silence
from clawloop_shared.database import engine
from clawloop_shared.errors import ClawloopError, KeyMissing, StorageError

from .homes import contents, copy_home, outcome, store_of

MakeKept = Callable[..., KeptStep]
WORDS = "correct horse battery staple"
NO_ROOMS = Rooms(adopt=lambda _: None, mend=lambda *_: None)


@pytest.fixture
def home(tmp_path: Path, make_kept: MakeKept) -> Path:
    """A home with three sessions of two steps."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    keep(folder, make_kept, "one", "one", "two", "two", "three", "three")
    return folder


def keep(home: Path, make_kept: MakeKept, *sessions: str) -> list[KeptStep]:
    """Serve for one step a name of a session."""
    kept = [make_kept(session=session, words=f"in {session} {number}") for number, session in enumerate(sessions)]
    with Pool.open(home, store_of(home), writer=True) as pool:
        for each in kept:
            pool.keep_step(each).result()
    return kept


def take(home: Path, file: Path, *, passphrase: str = "") -> Backup:
    """Back a home up; with its keys if there is a passphrase."""
    seal = partial(seal_keys, passphrase=passphrase, cost=Cost(64, 1, 1)) if passphrase else None
    with Pool.open(home, store_of(home)) as pool:
        return back_up(pool, file, seal=seal, progress=in_silence)


def put(file: Path, home: Path, *, replace: bool = False, rooms: Rooms = NO_ROOMS) -> Restored:
    """Restore into a home."""
    return restore(
        home,
        file,
        store=store_of(home),
        passphrase=lambda: WORDS,
        replace=replace,
        rooms=rooms,
        progress=in_silence,
    )


def kept_in(home: Path) -> list[KeptStep | None]:
    """All steps of a home, in their order, after a look that everything is well."""
    assert outcome(home) == ""
    with Pool.open(home, store_of(home), writer=True) as pool:
        return [pool.get_step(step_id) for step_id in pool.step_ids()]


def test_a_backup_is_one_private_file_that_tells_what_it_is_and_nothing_of_what_was_said(
    home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pool.backup"
    found = take(home, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_backup(file) == found
    assert (found.manifest.steps, found.manifest.sessions, found.keys) == (6, 3, None)
    with tarfile.open(file) as archive:
        assert archive.getnames() == ["backup.json", "pool.db"]
    assert b"in one" not in file.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []
    with pytest.raises(PoolError, match="exists already; name another"):
        take(home, file)


def test_a_backup_of_an_edge_that_serves_is_one_moment_of_it(home: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    turn, stop = threading.Semaphore(0), threading.Event()
    with Pool.open(home, store_of(home), writer=True) as serving:

        def serve() -> None:
            while not stop.is_set():
                serving.keep_step(make_kept(session="serving", words=os.urandom(4000).hex())).result()
                turn.release()

        thread = threading.Thread(target=serve)
        thread.start()
        for number in range(3):
            assert turn.acquire(timeout=20)
            take(home, tmp_path / f"{number}.backup", passphrase=WORDS)
        stop.set()
        thread.join()
        ids = serving.step_ids()
    sizes = []
    for number in range(3):
        into = tmp_path / f"home-{number}"
        put(tmp_path / f"{number}.backup", into)
        found = [each.step.step_id for each in kept_in(into) if each]
        assert found == ids[: len(found)]
        sizes.append(len(found))
    assert 6 < sizes[0] < sizes[1] < sizes[2] <= len(ids)


def test_a_backup_with_its_keys_makes_a_lost_home_anew(home: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    before = kept_in(home)
    keys = store_of(home).load()
    take(home, tmp_path / "b", passphrase=WORDS)
    anew = tmp_path / "anew"
    assert put(tmp_path / "b", anew) == Restored(sessions=3, steps=6, forgotten_again=0, unread="")
    assert kept_in(anew) == before
    assert sorted(contents(anew)) == ["pool.db", "pool.key", "pool.key.anchor"]
    now = store_of(anew).load()
    assert now.file_key != keys.file_key
    assert not set(now.keks.values()) & set(keys.keks.values())
    keep(anew, make_kept, "later")
    assert len(kept_in(anew)) == 7


def test_the_wrong_passphrase_puts_nothing_anywhere(home: Path, tmp_path: Path) -> None:
    take(home, tmp_path / "b", passphrase="another passphrase")
    anew = tmp_path / "anew"
    with pytest.raises(PoolError, match="passphrase does not open"):
        put(tmp_path / "b", anew)
    assert sorted(contents(anew)) == []


def test_a_backup_without_keys_opens_with_this_homes_key_until_that_is_rotated(
    home: Path, tmp_path: Path, make_kept: MakeKept
) -> None:
    before, file = kept_in(home), tmp_path / "b"
    manifest = take(home, file).manifest
    keep(home, make_kept, "later")
    put(file, home, replace=True)
    assert kept_in(home) == before
    after = contents(home)
    with pytest.raises(KeyMissing, match=rf"opens with key {manifest.key}, version 1, alone, and .* version 2; "):
        put(file, home, replace=True)
    with pytest.raises(KeyMissing, match=r"alone, and this home has none; "):
        put(file, tmp_path / "anew")
    assert contents(home) == after


def test_something_kept_is_replaced_only_where_that_was_said(home: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    before, file = kept_in(home), tmp_path / "b"
    take(home, file, passphrase=WORDS)
    keep(home, make_kept, "later")
    with pytest.raises(PoolError, match=r"has 7 steps of 4 sessions; .*give --replace"):
        put(file, home)
    assert len(kept_in(home)) == 7
    put(file, home, replace=True)
    assert kept_in(home) == before
    assert sorted(contents(home)) == ["pool.db", "pool.key", "pool.key.anchor"]
    empty = tmp_path / "empty"
    Pool.open(empty, store_of(empty), writer=True).close()
    put(file, empty)
    assert kept_in(empty) == before


def test_a_home_in_use_is_left_alone(home: Path, tmp_path: Path) -> None:
    take(home, tmp_path / "b")
    with Pool.open(home, store_of(home), writer=True), pytest.raises(PoolError, match="already runs on"):
        put(tmp_path / "b", home, replace=True)
    before = kept_in(home)
    with Pool.open(home, store_of(home)) as command:
        database = command._database
        database.execute("PRAGMA busy_timeout = 1")
        with pytest.raises(PoolError, match=r"another command has .* open"):
            put(tmp_path / "b", home, replace=True)
        assert [command.get_step(step_id) for step_id in command.step_ids()] == before
    assert kept_in(home) == before
    assert not (home / "restoring").exists()


def test_what_was_forgotten_since_the_backup_is_forgotten_again(
    home: Path, tmp_path: Path, make_kept: MakeKept
) -> None:
    one = next(each for each in kept_in(home) if each)
    take(home, tmp_path / "b", passphrase=WORDS)
    with Pool.open(home, store_of(home), writer=True) as pool:
        pool.submit(lambda database: pool.forgetting.forget(database, ["one"])).result()
    assert put(tmp_path / "b", home, replace=True).forgotten_again == 1
    assert [each.step.session_id for each in kept_in(home) if each] == ["two", "two", "three", "three"]
    with Pool.open(home, store_of(home), writer=True) as pool:
        pool.keep_step(one).result()
        assert pool.get_step(one.step.step_id) is None


@pytest.mark.parametrize("what", ["forget", "rotate", "rotate late"])
def test_what_another_command_does_meanwhile_is_not_undone_and_its_key_not_lost(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    take(home, tmp_path / "b")
    sessions = ["two", "two", "three", "three"] if what == "forget" else ["one", "one", "two", "two", "three", "three"]

    def meanwhile(*_: object) -> None:
        with Pool.open(home, store_of(home)) as pool:
            if what == "forget":
                pool.submit(lambda database: pool.forgetting.forget(database, ["one"])).result()
            else:
                rotate(pool)

    take_keys: Callable[..., object] = restoring._take_keys

    def late(*args: object, **keywords: object) -> object:
        done = take_keys(*args, **keywords)
        meanwhile()
        return done

    with monkeypatch.context() as patched:
        if what == "rotate late":
            patched.setattr(restoring, "_take_keys", late)
        rooms = NO_ROOMS if what == "rotate late" else Rooms(adopt=lambda _: None, mend=meanwhile)
        if what == "rotate":  # a key that was changed before keys were looked at is known
            put(tmp_path / "b", home, replace=True, rooms=rooms)
        else:
            with pytest.raises(PoolError, match="another command forgot something or changed the key meanwhile"):
                put(tmp_path / "b", home, replace=True, rooms=rooms)
    assert [each.step.session_id for each in kept_in(home) if each] == sessions


def test_a_log_that_cannot_be_emptied_is_not_lost(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(home, tmp_path / "b")
    before = contents(home)
    log = b"what was acknowledged"

    def full(*_: object, **__: object) -> None:
        (home / "pool.db-wal").write_bytes(log)
        raise engine().OperationalError("database or disk is full")

    real: Callable[..., None] = restoring._clear_log

    def clear(*args: object, **keywords: object) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(restoring, "open_database", full)
            real(*args, **keywords)

    monkeypatch.setattr(restoring, "_clear_log", clear)
    with pytest.raises(StorageError, match="cannot be emptied: database or disk is full"):
        put(tmp_path / "b", home, replace=True)
    assert contents(home) == before | {"pool.db-wal": log}


def test_a_pool_too_damaged_to_open_is_replaced_by_the_backup(home: Path, tmp_path: Path) -> None:
    before = kept_in(home)
    take(home, tmp_path / "b")
    damaged = bytearray((home / "pool.db").read_bytes())
    damaged[100:4000] = os.urandom(3900)
    (home / "pool.db").write_bytes(damaged)
    (home / "pool.db-wal").write_bytes(b"a log of somebody else")
    with pytest.raises(PoolError, match="give --replace"):
        put(tmp_path / "b", home)
    assert (home / "pool.db").read_bytes() == damaged
    done = put(tmp_path / "b", home, replace=True)
    assert "does not open with this key, or its first page is damaged" in done.unread
    assert kept_in(home) == before


def test_a_pool_whose_key_is_lost_is_replaced_once_it_was_moved_away(home: Path, tmp_path: Path) -> None:
    before = kept_in(home)
    take(home, tmp_path / "b", passphrase=WORDS)
    (home / "pool.key").unlink()
    with pytest.raises(KeyMissing, match=r"its key is not .* move .*pool.db out of the home, then restore"):
        put(tmp_path / "b", home, replace=True)
    assert sorted(contents(home)) == ["pool.db", "pool.key.anchor"]
    (home / "pool.db").rename(tmp_path / "aside")
    put(tmp_path / "b", home)
    assert kept_in(home) == before


def test_rooms_see_the_pool_before_it_counts_and_can_refuse_it(home: Path, tmp_path: Path) -> None:
    take(home, tmp_path / "b")
    before, seen = contents(home), list[str]()

    def adopt(pool: Pool) -> None:
        seen.append(f"adopt {pool.stats().steps}")

    def mend(pool: Pool, present: Pool | None, _: Manifest) -> None:
        assert present is not None
        assert present.folder == home
        pool.set_state("mended", b"1").result()
        seen.append(f"mend {pool.folder.name}")

    def refuse(*_: object) -> None:
        raise PoolError("not this one")

    with pytest.raises(PoolError, match="not this one"):
        put(tmp_path / "b", home, replace=True, rooms=Rooms(adopt=adopt, mend=refuse))
    assert contents(home) == before
    put(tmp_path / "b", home, replace=True, rooms=Rooms(adopt=adopt, mend=mend))
    assert seen == ["adopt 6", "adopt 6", "mend restoring"]
    with Pool.open(home, store_of(home)) as pool:
        assert pool.get_state("mended") == b"1"


def damage(file: Path, to: Path, *, name: str, change: Callable[[bytes], bytes]) -> None:
    """A copy of a backup in which one member is changed."""
    with tarfile.open(file) as old, tarfile.open(to, "w") as new:
        for entry in old.getmembers():
            stream = old.extractfile(entry)
            assert stream is not None
            data = stream.read()
            data = change(data) if entry.name == name else data
            entry.size = len(data)
            new.addfile(entry, BytesIO(data))


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGES: Sequence[tuple[str, Callable[[bytes], bytes]]] = [
    ("pool.db", flip),
    ("pool.db", lambda data: data[:-4096]),
    ("backup.json", flip),
    ("backup.json", lambda data: data.replace(b'"kek": 1', b'"kek": 9')),
    ("backup.json", lambda data: b" " * 100_000),
    ("keys.json", flip),
]


@pytest.mark.parametrize(("name", "change"), DAMAGES)
def test_a_damaged_backup_changes_nothing(
    home: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    take(home, tmp_path / "b", passphrase=WORDS)
    damage(tmp_path / "b", tmp_path / "damaged", name=name, change=change)
    before, anew = contents(home), tmp_path / "anew"
    for into in (home, anew):
        if into == home and name == "keys.json":
            continue  # this home's own keys open it
        with pytest.raises(ClawloopError) as refused:
            put(tmp_path / "damaged", into, replace=True)
        assert "\n" not in str(refused.value)
    assert contents(home) == before
    assert not anew.exists() or sorted(contents(anew)) == []


@pytest.mark.parametrize("content", [b"", b"no archive", b"\0" * 20_000])
def test_what_is_no_backup_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PoolError, match="is no backup of a pool"):
        read_backup(tmp_path / "x")
    with pytest.raises(StorageError, match="there is no file"):
        read_backup(tmp_path / "nothing")


def test_a_copy_that_does_not_verify_is_no_backup(home: Path, tmp_path: Path) -> None:
    with Pool.open(home, store_of(home)) as pool:
        pool.submit(lambda database: database.execute("UPDATE steps SET talk = x'00' WHERE seq = 1")).result()
        with pytest.raises(PoolError, match="the copy does not verify: "):
            back_up(pool, tmp_path / "b", seal=None, progress=in_silence)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_folder_that_is_not_there_is_one_line(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*No such file"):
        take(home, tmp_path / "nowhere" / "b")


class Stopped(BaseException):
    """Where the process dies, as a test has it."""


PLACES = ["unpack", "_take_keys", "_clear_log", "os.link", "os.replace", "sync_folder", "Pool._open"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_restore_that_dies_leaves_the_one_pool_or_the_other(
    home: Path, tmp_path: Path, make_kept: MakeKept, monkeypatch: pytest.MonkeyPatch, place: str, when: str
) -> None:
    old = kept_in(home)
    take(home, tmp_path / "b")
    new = [*old, *keep(home, make_kept, "later")]
    owner, _, name = place.rpartition(".")
    target = {"": restoring, "os": os, "Pool": Pool}[owner]
    real = getattr(target, name)
    died = copy_home(home, tmp_path / "died")

    def dying(*args: object, **keywords: object) -> object:
        if when == "after":
            real(*args, **keywords)
        copy_home(home, died)  # as it lies on the disk at this moment; what follows is not what a dead process does
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(target, name, dying)
        with pytest.raises(Stopped):
            put(tmp_path / "b", home, replace=True)
    assert kept_in(died) in (old, new)
    assert [name for name in sorted(contents(died)) if name[0] != "."] == ["pool.db", "pool.key", "pool.key.anchor"]
    with Pool.open(died, store_of(died)) as pool:
        rotate(pool)
    assert sorted(contents(died)) == ["pool.db", "pool.key", "pool.key.anchor"], "no draft of a key is left either"


def test_a_backup_taken_where_the_keys_are_at_hand_is_as_any(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    with Pool.open(tmp_path / "home", KnownKey.of(key), writer=True) as pool:
        pool.keep_step(make_kept()).result()
        rotate(pool)
        back_up(pool, tmp_path / "b", seal=partial(seal_keys, passphrase=WORDS), progress=in_silence)
    put(tmp_path / "b", tmp_path / "anew")
    assert len(kept_in(tmp_path / "anew")) == 1
