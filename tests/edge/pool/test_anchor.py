"""An older pool, another pool or another history in the pool's place is refused, and nothing is overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.heads import current
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool

from .homes import PAGE_BYTES, contents, copy_home, outcome, store_of

MakeKept = Callable[..., KeptStep]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


def keep(home: Path, make_kept: MakeKept, *, steps: int, first: int = 0) -> None:
    """Serve for so many steps, then stop."""
    with Pool.open(home, store_of(home), writer=True) as pool:
        for number in range(first, first + steps):
            step = make_kept(session=f"session-{number % 3}", words=f"word {number} " * 300)
            pool.keep_step(step, index={"number": b"%d" % number}).result()
            pool.set_state("cursor", b"%d" % number).result()


def end_of(home: Path) -> int:
    with Pool.open(home, store_of(home)) as pool, pool.read() as database:
        return current(database).seq


def test_the_anchor_is_the_owners_alone_and_tells_nothing(home: Path, make_kept: MakeKept) -> None:
    keep(home, make_kept, steps=2)
    anchor = home / "pool.key.anchor"
    assert anchor.stat().st_mode & 0o777 == 0o600
    assert b"session" not in anchor.read_bytes()
    assert b"word" not in anchor.read_bytes()


def test_an_older_copy_of_the_whole_file_is_refused_until_it_is_accepted(
    home: Path, tmp_path: Path, make_kept: MakeKept
) -> None:
    keep(home, make_kept, steps=2)
    early, older = (home / "pool.db").read_bytes(), end_of(home)
    keep(home, make_kept, steps=3)
    newer = end_of(home)
    late = copy_home(home, tmp_path / "late")
    (home / "pool.db").write_bytes(early)
    before = contents(home)
    for writer in (False, True):
        with pytest.raises(PoolError) as refused:
            Pool.open(home, store_of(home), writer=writer)
        said = str(refused.value)
        assert f"it ends with change {older}, and had change {newer} at 20" in said
        assert said.endswith("clawloop-edge pool accept")
        assert "\n" not in said
        assert contents(home) == before
    with Pool.open(home, store_of(home), accept=True) as pool:
        assert pool.stats().steps == 2
    keep(home, make_kept, steps=1)
    assert outcome(home) == ""
    shutil.copy(home / "pool.key.anchor", late)
    assert "other" in outcome(late) or "are not those" in outcome(late) or "older" in outcome(late)


def test_an_older_database_beside_the_log_of_the_newer_is_seen(home: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    keep(home, make_kept, steps=4)
    early = (home / "pool.db").read_bytes()
    keep(home, make_kept, steps=10, first=4)
    with Pool.open(home, store_of(home), writer=True) as pool:
        pool.keep_step(make_kept()).result()
        pool.anchor()
        killed = copy_home(home, tmp_path / "killed")
    assert (killed / "pool.db-wal").stat().st_size > 0
    assert outcome(copy_home(killed, tmp_path / "whole")) == ""
    (killed / "pool.db").write_bytes(early)
    assert outcome(killed) != ""


def test_a_history_that_parted_before_the_anchor_is_refused(
    home: Path, tmp_path: Path, make_kept: MakeKept, key: bytes
) -> None:
    keep(home, make_kept, steps=2)
    fork = copy_home(home, tmp_path / "fork")
    keep(home, make_kept, steps=2)
    with Pool.open(fork, KnownKey(store_of(home).load()), writer=True) as pool:
        for _ in range(9):
            pool.keep_step(make_kept()).result()
    shutil.copy(home / "pool.key.anchor", fork)
    assert "are not those that it had at" in outcome(fork)


def test_another_pool_of_the_same_key_is_refused(home: Path, tmp_path: Path, make_kept: MakeKept) -> None:
    keep(home, make_kept, steps=1)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    shutil.copy(home / "pool.key", other)
    keep(other, make_kept, steps=9)
    shutil.copy(home / "pool.key.anchor", other)
    assert "this is another pool" in outcome(other)


def test_a_lost_anchor_is_seen_and_a_new_pool_needs_none(home: Path, make_kept: MakeKept) -> None:
    with Pool.open(home, store_of(home)) as pool:
        pool.keep_step(make_kept()).result()
    assert outcome(home) == ""
    keep(home, make_kept, steps=1)
    (home / "pool.key.anchor").unlink()
    assert "the pool's anchor is gone, and it had one at change 2" in outcome(home)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 40, None])
def test_a_damaged_or_changed_anchor_is_refused(home: Path, make_kept: MakeKept, damage: bytes | None) -> None:
    keep(home, make_kept, steps=1)
    anchor = home / "pool.key.anchor"
    anchor.write_bytes(anchor.read_bytes().replace(b'"seq":1', b'"seq":0') if damage is None else damage)
    assert "pool accept" in outcome(home)
    with Pool.open(home, store_of(home), accept=True):
        pass
    assert outcome(home) == ""


def test_an_anchor_that_others_can_read_is_refused(home: Path, make_kept: MakeKept) -> None:
    keep(home, make_kept, steps=1)
    (home / "pool.key.anchor").chmod(0o644)
    assert "mode 0644" in outcome(home)


def test_what_a_command_decides_while_no_edge_runs_is_not_taken_back_by_an_older_file(
    home: Path, tmp_path: Path, make_kept: MakeKept
) -> None:
    keep(home, make_kept, steps=1)
    older = copy_home(home, tmp_path / "older")
    with Pool.open(home, store_of(home)) as command:
        command.keep_step(make_kept(session="other")).result()
    written = (home / "pool.key.anchor").read_bytes()
    assert outcome(home) == ""
    assert (home / "pool.key.anchor").read_bytes() == written, "a command that only looks moves nothing"
    shutil.copy(older / "pool.db", home)
    assert "the pool is older than it was" in outcome(home)


def test_what_commands_keep_beside_the_edge_needs_no_anchor_of_its_own(home: Path, make_kept: MakeKept) -> None:
    with Pool.open(home, store_of(home), writer=True) as serving:
        serving.keep_step(make_kept()).result()
        with Pool.open(home, store_of(home)) as command:
            command.keep_step(make_kept(session="other")).result()
        serving.anchor()
        written = (home / "pool.key.anchor").read_bytes()
        serving.anchor()
        assert (home / "pool.key.anchor").read_bytes() == written, "nothing new, nothing written"
    assert b'"seq":2' in (home / "pool.key.anchor").read_bytes()
    assert outcome(home) == ""


def test_a_page_of_an_older_file_spliced_into_the_newer_is_found(
    home: Path, tmp_path: Path, make_kept: MakeKept
) -> None:
    keep(home, make_kept, steps=9)
    old = (home / "pool.db").read_bytes()
    keep(home, make_kept, steps=9, first=9)
    new = (home / "pool.db").read_bytes()
    with Pool.open(home, store_of(home)) as pool, pool.read() as database:
        roots = dict(database.execute("SELECT rootpage, name FROM sqlite_master").fetchall())
    silent, spliced = set[str](), 0
    for start in range(0, len(old), PAGE_BYTES):
        page = old[start : start + PAGE_BYTES]
        if page == new[start : start + PAGE_BYTES]:
            continue
        copy = copy_home(home, tmp_path / "spliced")
        (copy / "pool.db").write_bytes(new[:start] + page + new[start + PAGE_BYTES :])
        spliced += 1
        if not outcome(copy):
            silent.add(roots.get(start // PAGE_BYTES + 1, str(start)))
    assert spliced > 12
    assert silent <= {"heads"}, "an older list of noted heads is no loss: the next anchor is noted anew"
