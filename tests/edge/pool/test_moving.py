"""Moving keys to another place: the pool opens with what the configuration says, whenever it is killed."""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import keyring
import pytest

from clawloop_edge.errors import PoolError
from clawloop_edge.pool import moving
from clawloop_edge.pool.keys import FileKeyStore, KeychainKeyStore, KeyStore
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.moving import Spot, broken_off, move_keys
from clawloop_edge.pool.passphrase import PassphraseKeyStore
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool

from .test_keys import DictKeyring
from .test_passphrase import CHEAP, Person

PLACES = (Spot("keychain"), Spot("file"), Spot("passphrase", "sealed"))


class Killed(BaseException):
    """As far as a process can tell of its own end."""


class Home:
    """A folder with a pool, and what its configuration says of its keys."""

    def __init__(self, folder: Path, now: Spot) -> None:
        self.folder, self.now = folder, now

    def store_at(self, spot: Spot) -> KeyStore:
        if spot.key == "keychain":
            return KeychainKeyStore("clawloop-test", "me")
        path = self.folder / (spot.key_file or "pool.key")
        return FileKeyStore(path) if spot.key == "file" else PassphraseKeyStore(path, Person(), cost=CHEAP)

    def switch(self, spot: Spot) -> None:
        self.now = spot

    def move(self, target: Spot) -> None:
        move_keys(self.folder, self.now, target=target, store_at=self.store_at, switch=self.switch)

    @property
    def holding(self) -> list[Spot]:
        """Where keys are."""
        return [spot for spot in PLACES if self.store_at(spot).holds]


@pytest.fixture
def home_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_kept: Callable[..., KeptStep]) -> Callable[..., Home]:
    """`home_at(spot)`: a home whose keys are there, with one step; a keychain that holds nothing else."""
    numbers = itertools.count()

    def make(spot: Spot) -> Home:
        monkeypatch.setattr(keyring.core, "_keyring_backend", DictKeyring())
        home = Home(tmp_path / f"home-{next(numbers)}", spot)
        with Pool.open(home.folder, home.store_at(spot), writer=True) as pool:
            pool.keep_step(make_kept()).result()
        return home

    return make


def steps_in(home: Home) -> int:
    with Pool.open(home.folder, home.store_at(home.now)) as pool:
        return pool.stats().steps


@pytest.mark.parametrize(("source", "target"), [*itertools.permutations(PLACES, 2)])
def test_keys_and_anchor_go_to_the_other_place_and_leave_the_first(
    home_at: Callable[..., Home], source: Spot, target: Spot
) -> None:
    home = home_at(source)
    home.move(target)
    assert (home.now, home.holding, broken_off(home.folder)) == (target, [target], False)
    assert steps_in(home) == 1
    anchors = [home.store_at(spot).anchor for spot in PLACES]
    assert [anchor is not None and anchor.read() is not None for anchor in anchors] == [s == target for s in PLACES]
    home.move(source)
    assert (home.holding, steps_in(home)) == ([source], 1)


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> list[FileLock]:
    """All locks that are taken from now on: a process that is killed lets go of them."""
    taken: list[FileLock] = []
    acquire = FileLock.acquire

    def noted(path: Path, *, wait: bool = False) -> FileLock:
        taken.append(acquire(path, wait=wait))
        return taken[-1]

    monkeypatch.setattr(FileLock, "acquire", noted)
    return taken


def killed_after(lines: int, work: Callable[[], None], *, locks: list[FileLock]) -> bool:
    """Do some work, and end it after so many lines of the module; whether that was before its end."""
    left = lines

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != moving.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    sys.settrace(trace)
    try:
        work()
    except Killed:
        for lock in locks:
            lock.release()
        return True
    finally:
        sys.settrace(None)
    return False


def test_whenever_it_is_killed_the_pool_opens_and_doing_it_again_leaves_one_place(
    home_at: Callable[..., Home], locks: list[FileLock]
) -> None:
    (source, target), told, lines = PLACES[:2], set(), 0
    while True:
        home = home_at(source)
        if not killed_after(lines, partial(home.move, target), locks=locks):
            break
        assert steps_in(home) == 1
        assert home.now in home.holding
        assert broken_off(home.folder) or home.holding == [home.now]
        told.add((home.now, len(home.holding)))
        home.move(target)
        assert (home.now, home.holding, broken_off(home.folder), steps_in(home)) == (target, [target], False, 1)
        lines += 1
    assert told >= {(source, 1), (source, 2), (target, 2)}


def test_keys_of_somebody_else_are_not_replaced(home_at: Callable[..., Home]) -> None:
    home = home_at(PLACES[0])
    other = home.store_at(PLACES[1]).create()
    with pytest.raises(PoolError, match=r"there is key file .* already; it is not replaced"):
        home.move(PLACES[1])
    home.move(home.now)
    assert home.store_at(PLACES[1]).load() == other
    assert steps_in(home) == 1


def test_while_an_edge_runs_nothing_is_moved(home_at: Callable[..., Home]) -> None:
    home = home_at(PLACES[1])
    with (
        Pool.open(home.folder, home.store_at(home.now), writer=True),
        pytest.raises(PoolError, match="already runs"),
    ):
        home.move(PLACES[0])
    assert home.holding == [PLACES[1]]
