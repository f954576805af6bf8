"""Where SQLCipher's module is missing: the rows are sealed all the same, it is said, and the two kinds never mix."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.restore import Rooms, restore
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import in_silence
from clawloop_shared.database import engine
from clawloop_shared.errors import KeyMissing, StorageError

from .homes import contents, copy_home, outcome, store_of

MakeKept = Callable[..., KeptStep]

WITHOUT = """
import sys
sys.modules["sqlcipher3"] = None  # what Python's import system takes as "there is none"
from functools import partial
from pathlib import Path
from pool_torture import make_step, store_of
from clawloop_edge.pool import backup, finishing, restore
from clawloop_edge.pool.keys import KeyBundle, KnownKey
from clawloop_edge.pool.passphrase import seal_keys
from clawloop_edge.pool.rotate import rotate
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.verify import in_silence
from clawloop_shared.errors import ClawloopError

home = Path(sys.argv[1])
"""


def without(home: Path, script: str) -> list[str]:
    """What a process prints, line by line, that has no SQLCipher; it has `home`, and what is imported above."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", WITHOUT + script, str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


SERVE = """
with Pool.open(home, store_of(home), writer=True) as pool:
    parent = None
    for number in range(40):
        parent = make_step("session-%d" % (number % 4), parent=None if number < 4 else parent)
        pool.keep_step(parent, index={"reply": b"CANARY"}).result()
    assert len(pool.step_ids()) == 40
    assert pool.get_step(parent.step.step_id) == parent
    print(rotate(pool).version)
    pool.submit(lambda db: pool.forgetting.forget(db, ["session-0"])).result()
    print(finishing.finish(pool))
    print(pool.verify().problems, pool.stats().steps)
    print(pool.stats().encryption)
    backup.back_up(pool, home.with_name("b"), seal=partial(seal_keys, passphrase="a passphrase"), progress=in_silence)
with Pool.open(home, store_of(home), writer=True) as pool:
    print(len(pool.step_ids()))
restore.restore(
    home, home.with_name("b"), store=store_of(home), passphrase=lambda: "", replace=True,
    rooms=restore.Rooms(adopt=lambda _: None, mend=lambda *_: None), progress=in_silence,
)
with Pool.open(home, store_of(home)) as pool:
    print(len(pool.step_ids()), pool.verify().problems)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that a process without SQLCipher made and used in every way, and its backup `b` beside it."""
    home = tmp_path_factory.mktemp("rows") / "home"
    said = without(home, SERVE)
    assert said[:3] == ["2", "[]", "[] 30"]
    assert said[3].startswith("rows (metadata visible): ")
    assert said[4:] == ["30", "30 []"]
    return home


@pytest.fixture
def rows_only(made: Path, tmp_path: Path) -> Path:
    """A copy of that home."""
    return copy_home(made, tmp_path / "home")


def test_rows_are_sealed_and_their_sizes_tell_little(rows_only: Path) -> None:
    everything = b"".join(contents(rows_only).values())
    assert b"word word" not in everything
    assert b"CANARY" not in everything
    assert (rows_only / "pool.db").read_bytes().startswith(b"SQLite format 3")
    assert (rows_only / "pool.db").stat().st_mode & 0o777 == 0o600
    database = sqlite3.connect(rows_only / "pool.db")
    lengths = {
        row[0] for row in database.execute("SELECT length(tokens) FROM steps UNION SELECT length(talk) FROM steps")
    }
    database.close()
    assert len(lengths) <= 4
    assert all((length - 29) % 512 == 0 for length in lengths), "version, nonce and tag, and whole buckets"


def test_the_two_kinds_of_pool_are_told_apart_in_one_line(rows_only: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    before = contents(rows_only)
    with pytest.raises(StorageError, match=r"^[^\n]*pool.db was made where SQLCipher is missing[^\n]*$"):
        Pool.open(rows_only, store_of(rows_only))
    assert contents(rows_only) == before
    whole = tmp_path / "whole"
    with Pool.open(whole, store_of(whole), writer=True) as pool:
        pool.keep_step(make_kept()).result()
    before = contents(whole)
    (said,) = without(
        whole,
        """
try:
    Pool.open(home, store_of(home))
except ClawloopError as error:
    print(error)
""",
    )
    assert said.endswith("pool.db is encrypted by SQLCipher, whose module is missing here; pip install sqlcipher3")
    assert contents(whole) == before
    assert outcome(whole) == ""


def test_a_wrong_key_is_refused_without_the_file_layer_too(rows_only: Path) -> None:
    (said,) = without(
        rows_only,
        """
try:
    Pool.open(home, KnownKey(KeyBundle(bytes(32), {4: bytes(32)})))
except ClawloopError as error:
    print(type(error).__name__, error)
""",
    )
    assert said.startswith(f"{KeyMissing.__name__} ")
    assert "does not open with this key" in said


def test_a_backup_of_rows_alone_is_encrypted_where_that_can_be_done(made: Path, tmp_path: Path) -> None:
    anew = tmp_path / "anew"
    restore(
        anew,
        made.with_name("b"),
        store=store_of(anew),
        passphrase=lambda: "a passphrase",
        replace=False,
        rooms=Rooms(adopt=lambda _: None, mend=lambda *_: None),
        progress=in_silence,
    )
    assert outcome(anew) == ""
    assert not (anew / "pool.db").read_bytes().startswith(b"SQLite")
    with Pool.open(anew, store_of(anew)) as pool:
        assert pool.stats().steps == 30
        assert pool.stats().encryption == "file (SQLCipher) and rows"


def test_what_is_not_sealed_by_its_rows_is_never_opened_without_sqlcipher(tmp_path: Path) -> None:
    (said,) = without(
        tmp_path,
        """
from clawloop_shared.database import open_database
try:
    open_database(home / "server.db", bytes(32))
except ClawloopError as error:
    print(error)
""",
    )
    assert "must be encrypted, and SQLCipher's module is missing" in said
    assert list(tmp_path.iterdir()) == []


def test_with_an_old_sqlite_writers_of_all_processes_take_turns(tmp_path: Path, make_kept: MakeKept) -> None:
    """An engine before 3.51.3 may corrupt a log that two write at the same instant."""
    home = tmp_path / "home"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = (
        WITHOUT
        + """
with Pool.open(home, store_of(home)) as pool:
    pool.submit(lambda db: db.execute("PRAGMA wal_autocheckpoint = 5").fetchall()).result()
    for number in range(60):
        pool.keep_step(make_step("session-%s" % sys.argv[2], parent=None)).result()
"""
    )
    without(home, "Pool.open(home, store_of(home)).close()")
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(home), str(number)], env=environment) for number in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    (said,) = without(home, "pool = Pool.open(home, store_of(home)); print(pool.stats().steps, pool.verify().problems)")
    assert said == "180 []"
    assert (home / "pool.db.turn").exists() == (sqlite3.sqlite_version_info < (3, 51, 3))


def test_with_sqlcipher_no_turns_are_needed(tmp_path: Path, key: bytes, make_kept: MakeKept) -> None:
    assert engine().sqlite_version_info >= (3, 51, 3)
    with Pool.open(tmp_path, KnownKey.of(key)) as pool:
        pool.keep_step(make_kept()).result()
    assert not (tmp_path / "pool.db.turn").exists()
