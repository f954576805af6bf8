"""What can happen to a disk: each fault is told in one line, what was kept before is there, nothing is overwritten."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import StorageError

from .homes import PAGE_BYTES, contents, copy_home, outcome, store_of

MakeKept = Callable[..., KeptStep]
LATER = 4


@pytest.fixture
def home(tmp_path: Path, make_kept: MakeKept) -> Path:
    """The home of an edge that served and was stopped."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    with Pool.open(folder, store_of(folder), writer=True) as pool:
        for number in range(6):
            pool.keep_step(make_kept(session=f"session-{number % 2}", words=f"word {number} " * 400)).result()
    return folder


@pytest.fixture
def killed(tmp_path: Path, make_kept: MakeKept) -> tuple[Path, list[KeptStep]]:
    """The home of an edge that was killed, all of its pool in the log; the last steps came after the anchor."""
    folder, kept = tmp_path / "serving", [make_kept(session=f"session-{number}") for number in range(12)]
    folder.mkdir(mode=0o700)
    with Pool.open(folder, store_of(folder), writer=True) as pool:
        for each in kept[:-LATER]:
            pool.keep_step(each).result()
        pool.anchor()
        for each in kept[-LATER:]:
            pool.keep_step(each).result()
        return copy_home(folder, tmp_path / "killed"), kept


def test_a_flipped_bit_in_any_page_is_found(home: Path, tmp_path: Path) -> None:
    chance, whole = random.Random(4), (home / "pool.db").read_bytes()
    for start in range(0, len(whole), PAGE_BYTES):
        copy = copy_home(home, tmp_path / "flipped")
        damaged = bytearray(whole)
        damaged[start + chance.randrange(PAGE_BYTES)] ^= 1 << chance.randrange(8)
        (copy / "pool.db").write_bytes(damaged)
        assert outcome(copy) != "", f"page {start // PAGE_BYTES + 1}"


def test_two_pages_that_changed_places_are_found(home: Path, tmp_path: Path) -> None:
    whole = (home / "pool.db").read_bytes()
    pages = [whole[start : start + PAGE_BYTES] for start in range(0, len(whole), PAGE_BYTES)]
    for one in range(1, len(pages) - 1, 5):
        swapped = [*pages]
        swapped[one], swapped[one + 1] = swapped[one + 1], swapped[one]
        copy = copy_home(home, tmp_path / "swapped")
        (copy / "pool.db").write_bytes(b"".join(swapped))
        assert outcome(copy) != "", f"page {one + 1}"


@pytest.mark.parametrize("part", [0.02, 0.4, 0.97])
def test_a_file_that_was_cut_is_found_and_left_as_it_is(home: Path, part: float) -> None:
    whole = (home / "pool.db").read_bytes()
    (home / "pool.db").write_bytes(whole[: int(len(whole) * part)])
    before = contents(home)
    assert outcome(home) != ""
    assert contents(home) == before


def test_an_emptied_file_is_not_taken_for_a_new_pool(home: Path) -> None:
    (home / "pool.db").write_bytes(b"")
    assert "older than it was" in outcome(home)
    (home / "pool.db").unlink()
    assert "older than it was" in outcome(home)


def damaged_logs(log: bytes) -> list[bytes]:
    """The log cut, and with a bit flipped, at places over its whole length."""
    chance, found = random.Random(5), list[bytes]()
    for number in range(24):
        place = len(log) * number // 24 + chance.randrange(len(log) // 24)
        flipped = bytearray(log)
        flipped[place] ^= 1 << chance.randrange(8)
        found += [log[:place], bytes(flipped)]
    return found


def test_a_torn_or_flipped_log_gives_what_came_before_or_is_refused(
    killed: tuple[Path, list[KeptStep]], tmp_path: Path
) -> None:
    """Never a wrong row, and never a silent loss of what the anchor knows."""
    home, kept = killed
    assert outcome(copy_home(home, tmp_path / "whole")) == ""
    log = (home / "pool.db-wal").read_bytes()
    refused, opened = 0, 0
    for damaged in damaged_logs(log):
        copy = copy_home(home, tmp_path / "torn")
        (copy / "pool.db-wal").write_bytes(damaged)
        if outcome(copy):
            refused += 1
            continue
        opened += 1
        with Pool.open(copy, store_of(copy)) as pool:
            found = [pool.get_step(step_id) for step_id in pool.step_ids()]
        assert len(found) >= len(kept) - LATER
        assert found == kept[: len(found)]
    assert refused > opened > 0


def test_a_full_disk_refuses_a_step_in_one_line_and_takes_the_next_when_there_is_room(
    home: Path, make_kept: MakeKept
) -> None:
    limit = "PRAGMA max_page_count = "
    with Pool.open(home, store_of(home), writer=True) as pool:
        pool.submit(
            lambda db: db.execute(f"{limit}1").fetchall()
        ).result()  # the least that SQLite takes: what is there
        refused = make_kept(words=random.Random(6).randbytes(100_000).hex())
        with pytest.raises(StorageError, match=r"^[^\n]*full; check free disk space and rights$"):
            pool.keep_step(refused).result()
        assert pool.get_step(refused.step.step_id) is None
        pool.submit(lambda db: db.execute(f"{limit}1000000").fetchall()).result()
        pool.keep_step(refused).result()
        assert pool.get_step(refused.step.step_id) == refused
        assert pool.verify().problems == []
    assert outcome(home) == ""


CHILD = """
import os, resource, sys
from pathlib import Path
from clawloop_edge.pool.keys import FileKeyStore
from clawloop_edge.pool.store import Pool
from clawloop_edge.pool.rotate import rotate
from clawloop_shared.errors import ClawloopError

home, how, work = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with Pool.open(home.with_name("warm"), FileKeyStore(home.with_name("warm.key")), writer=True) as pool:
    rotate(pool)  # everything is imported before the rights to read it go
    pool.verify()

def limit():
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    elif os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)

def tried(name, action):
    try:
        action()
        print(name, "done", flush=True)
    except ClawloopError as error:
        print(name, type(error).__name__, error, flush=True)

store = FileKeyStore(home / "pool.key")
if work == "serve":
    with Pool.open(home, store, writer=True) as pool:
        limit()
        large = "CREATE TABLE t AS SELECT randomblob(999999)"
        tried("write", lambda: pool.submit(lambda db: db.execute(large)).result())
        tried("rotate", lambda: rotate(pool))
        tried("read", lambda: pool.verify().ok or 1 / 0)
else:
    limit()
    tried("open", lambda: Pool.open(home, store, writer=True).close())
"""


def child(home: Path, how: str, work: str) -> list[str]:
    """What a process says, line by line, whose disk is `full`, or who may not write (`read-only`)."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(home), how, work]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_a_disk_that_fills_up_while_the_edge_serves_loses_nothing(home: Path) -> None:
    said = child(home, "full", "serve")
    assert [line.split()[:2] for line in said] == [["write", "StorageError"], ["rotate", "done"], ["read", "done"]]
    assert "check free disk space" in said[0]
    assert outcome(home) == ""


def test_a_new_pool_on_a_full_disk_is_refused_in_one_line(tmp_path: Path) -> None:
    (line,) = child(tmp_path / "home", "full", "open")
    assert line.startswith("open StorageError ")
    assert "check free disk space" in line


@pytest.fixture
def guarded(home: Path) -> Iterator[Path]:
    """The home where its owner may read everything and write nothing. Root, whom no mode stops, is another's owner."""
    with TemporaryDirectory() as folder:  # not pytest's own, which only root may enter
        copy = copy_home(home, Path(folder) / "home")
        if os.geteuid() == 0:
            for path in (Path(folder), copy, *copy.rglob("*")):
                os.chown(path, 65534, 65534)
        copy.chmod(0o500)
        yield copy
        copy.chmod(0o700)


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(guarded: Path) -> None:
    before = contents(guarded)
    (line,) = child(guarded, "read-only", "open")
    assert line.startswith("open StorageError cannot open ")
    assert line.endswith("attempt to write a readonly database; check free disk space and rights")
    assert contents(guarded) == before
