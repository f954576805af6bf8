"""Moving a pool's keys and its anchor to another store, so that a kill at any moment leaves a pool that opens.

    1  a note says from where to where
    2  the other store gets the keys and the anchor, and the pool is opened with it
    3  `switch` changes what the configuration says, in one rename
    4  the first store lets go of them, and the note goes

Whoever moves keys again after a crash removes first what the note says that the configuration does not. Knows no
configuration.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.anchor import Anchor
from clawloop_edge.pool.keys import KeyStore, key_lock
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.store import LOCK_NAME, Pool
from clawloop_shared.files import publish_secret, sync_folder

NOTE_NAME = "keys.moving"


class Spot(msgspec.Struct, frozen=True):
    """A store as `[pool]` in the configuration names it; no `key_file`: the home's own."""

    key: str
    key_file: str = ""


class _Note(msgspec.Struct, frozen=True, tag_field="is", tag="clawloop-keys-moving.v1"):
    source: Spot
    target: Spot


def move_keys(
    folder: Path, source: Spot, *, target: Spot, store_at: Callable[[Spot], KeyStore], switch: Callable[[Spot], None]
) -> None:
    """Keep the keys of the pool in `folder` at `target` instead of at `source`, where the configuration has them.

    Where both are the same, only what an earlier move has left behind is removed.

    Raises:
        PoolError: an edge runs here; there are keys at `target` already; or a store cannot be read or written.
        StorageError: the folder cannot be written.
    """
    with FileLock.acquire(folder / LOCK_NAME), key_lock(folder):
        _clear(folder, source, store_at=store_at)
        if source == target:
            return
        old, new = store_at(source), store_at(target)
        if new.holds:
            raise PoolError(f"there is {new.name} already; it is not replaced: move it away, if it is of no use")
        keys = old.load()
        points = Anchor(old.anchor, keys.file_key).read()
        publish_secret(folder / NOTE_NAME, msgspec.json.encode(_Note(source, target)) + b"\n")
        new.put(keys)
        if points:
            Anchor(new.anchor, keys.file_key).write(points)
        _check_opens(folder, new)
        switch(target)
        old.remove()
        _forget_note(folder)


def broken_off(folder: Path) -> bool:
    """Whether a move of the keys ended in its middle, so that keys lie in two stores."""
    return (folder / NOTE_NAME).exists()


def _clear(folder: Path, now: Spot, *, store_at: Callable[[Spot], KeyStore]) -> None:
    """Remove what an earlier move has left at the other of its two places."""
    try:
        note = msgspec.json.decode((folder / NOTE_NAME).read_bytes(), type=_Note)
    except FileNotFoundError:
        return
    except msgspec.DecodeError as error:
        raise PoolError(f"{folder / NOTE_NAME} is damaged; see in which stores the keys are, then remove it") from error
    if now not in (note.source, note.target):
        raise PoolError(
            f"a move of the keys from {note.source.key} to {note.target.key} broke off, and [pool] says {now.key}; "
            f'set `key = "{note.source.key}"` there, and do it again'
        )
    _check_opens(folder, store_at(now))
    store_at(note.target if now == note.source else note.source).remove()
    _forget_note(folder)


def _check_opens(folder: Path, store: KeyStore) -> None:
    """Raises ClawloopError: the pool does not open with what is there."""
    Pool._open(folder, store, lock=None, accept=False)._close()


def _forget_note(folder: Path) -> None:
    (folder / NOTE_NAME).unlink(missing_ok=True)
    sync_folder(folder)
