"""Homes that are copied, damaged and opened again."""

import shutil
from pathlib import Path

from clawloop_edge.pool.keys import FileKeyStore
from clawloop_edge.pool.store import Pool
from clawloop_shared.errors import ClawloopError

PAGE_BYTES = 4096


def store_of(home: Path) -> FileKeyStore:
    """The key file of a home."""
    return FileKeyStore(home / "pool.key")


def copy_home(home: Path, copy: Path) -> Path:
    """All files of a home as they are at this moment, as a copy of a killed edge's or a backup would have them."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(mode=0o700)
    for path in home.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    return copy


def contents(home: Path) -> dict[str, bytes]:
    """All files of a home but those that SQLite makes anew at will, and locks."""
    passing = (".lock", "-shm", ".turn")
    return {path.name: path.read_bytes() for path in home.iterdir() if path.is_file() and path.suffix not in passing}


def outcome(home: Path) -> str:
    """What opening and verifying says: empty if all is well, else one line. Any other error than ours goes on."""
    try:
        with Pool.open(home, store_of(home)) as pool:
            problems = pool.verify().problems
    except ClawloopError as error:
        problems = [str(error)]
    assert all(problem == " ".join(problem.split()) for problem in problems), "one line each"
    return problems[0] if problems else ""
