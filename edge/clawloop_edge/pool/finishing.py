"""What remains to be done once a forgetting is on disk, so that no earlier copy of a file brings back what is gone.

The search index is written anew under another key, the pool's key is rotated and the old one destroyed, and the log is
cut. A note in the pool names what is left of that; the process that forgot does it, and after a crash the next one that
opens the pool, or the edge that runs. Each part can be done again. Format: docs/formats/pool.md, "Forgetting".
"""

import logging
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.crypt import Keyring
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.shrinking import shrink
from clawloop_edge.pool.state import read_state, write_state
from clawloop_shared.errors import ClawloopError
from clawloop_shared.ids import new_id

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

_LOG = logging.getLogger(__name__)
UNFINISHED = "forget.unfinished"
LOCK_NAME = "forget.lock"
_TRIES = 10
_PAUSE_S = 0.5


class Part(StrEnum):
    """One thing to be done, in this order: the log is cut last, because the others write into it."""

    SEARCH = "search"
    """the search index is written anew, under another key"""
    KEY = "key"
    """the pool's key is rotated, so that old copies of wrapped keys open with nothing that is left"""
    LOG = "log"
    """the log is copied into the database, where deleted bytes are zeroed, and cut to nothing"""


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What is left to do after the forgetting `note_id`, the latest."""

    note_id: str
    parts: tuple[Part, ...]


def note(database: "Database", keyring: Keyring) -> None:
    """Note that all parts are to be done. Needs the transaction that forgets."""
    _write(database, keyring, note=Note(new_id(), tuple(Part)))


def latest(pool: "Pool") -> Note:
    """The latest forgetting and what of it is left to do; the id is empty if nothing was ever forgotten."""
    return _parse(pool.get_state(UNFINISHED))


def unfinished(pool: "Pool") -> tuple[Part, ...]:
    """What is left to do; nothing, as a rule."""
    return latest(pool).parts


def finish(
    pool: "Pool", *, tries: int = _TRIES, wait: bool = True, progress: Callable[[Part], None] = lambda part: None
) -> list[str]:
    """Do what is left to do; gives, as sentences, what could not be done now and stays noted.

    `tries`: how often to try to cut the log, which a long read stands in the way of. With `wait` another process that
    is at it is waited for, else it is left to that. `progress` is told of each part before it is done.
    """
    if not unfinished(pool):
        return []
    try:
        lock = FileLock.acquire(pool.folder / LOCK_NAME, wait=wait)
    except PoolError:
        return []
    with lock:
        problems: dict[Part, str] = {}
        while left := _next(pool, but=problems):
            found, part = left
            progress(part)
            try:
                _do(pool, part, tries=tries)
            except ClawloopError as error:
                problems[part] = _PROBLEMS[part].format(error)
            else:
                pool.submit(partial(_strike, keyring=pool.keyring, part=part, of=found)).result()
    return list(problems.values())


def resume(pool: "Pool") -> None:
    """Do what a forgetting before this process left to do, as far as it can be done at once."""
    try:
        problems = finish(pool, tries=1, wait=False)
    except ClawloopError as error:  # a damaged pool must open, so that it can be looked into
        problems = [str(error)]
    for problem in problems:
        _LOG.warning("something was forgotten, but %s", problem)


def _next(pool: "Pool", *, but: Collection[Part]) -> tuple[Note, Part] | None:
    found = latest(pool)
    return next(((found, part) for part in found.parts if part not in but), None)


_PROBLEMS = {
    Part.SEARCH: "the search index still has words of it: {}",
    Part.KEY: "the pool's key could not be changed, so an earlier copy of the pool can still be opened: {}",
    Part.LOG: "the database's log could not be cut: {}",
}


def _do(pool: "Pool", part: Part, *, tries: int) -> None:
    """Raises ClawloopError: it cannot be done now."""
    from clawloop_edge.pool.rotate import rotate
    from clawloop_edge.pool.search import SearchIndex

    if part is Part.SEARCH:
        SearchIndex(pool).forget()
    elif part is Part.KEY:
        rotate(pool)
    else:
        _cut_log(pool, tries)


def _cut_log(pool: "Pool", tries: int) -> None:
    for attempt in range(tries):
        if attempt:
            time.sleep(_PAUSE_S)
        if shrink(pool):
            return
    raise PoolError("another program reads the pool; it is tried again when the pool is next opened")


def _strike(database: "Database", *, keyring: Keyring, part: Part, of: Note) -> None:
    """Take a part off the note, unless more was forgotten meanwhile: then it is to be done once more."""
    now = _parse(read_state(database, keyring, name=UNFINISHED))
    if now.note_id == of.note_id:
        parts = tuple(each for each in now.parts if each is not part)
        _write(database, keyring, note=Note(now.note_id, parts))


def _parse(data: bytes | None) -> Note:
    return msgspec.msgpack.decode(data, type=Note) if data else Note("", ())


def _write(database: "Database", keyring: Keyring, *, note: Note) -> None:
    write_state(database, keyring, name=UNFINISHED, value=msgspec.msgpack.encode(note))
