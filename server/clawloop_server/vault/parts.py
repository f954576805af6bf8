"""Where the parts of an item lie that comes piece by piece: names that nobody can tell without the device's key.

    blobs/DEVICE/ITEM-BODY         the parts so far        blobs/DEVICE/ITEM-BODY.done   the receipt, sealed

All three are keyed hashes. By ITEM what a device wants forgotten is found; once its key is gone nothing of it can be.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from clawloop_server.vault.seal import DeviceSeal

FOLDER = "blobs"
"""in the home of the server"""


def parts_folder(blobs: Path, seal: DeviceSeal) -> Path:
    """Where all of a device lies."""
    return blobs / seal.name("blobs", "").hex()


def part_name(seal: DeviceSeal, *, item_id: str, sha256: str, size_bytes: int) -> str:
    """The name of an item's file."""
    body = seal.name("blob", "\0".join((item_id, sha256, str(size_bytes))))
    return f"{_item(seal, item_id)}-{body.hex()}"


def drop_parts(blobs: Path, seal: DeviceSeal, item_ids: Iterable[str]) -> int:
    """Remove what came of these items, and their receipts; how many files. Names of other things are of nothing.

    Raises:
        OSError: a file cannot be removed.
    """
    folder = parts_folder(blobs, seal)
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    doomed = {_item(seal, item_id) for item_id in item_ids} if there else set()
    gone = [name for name in there if name.partition("-")[0] in doomed]
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    return len(gone)


def drop_all_parts(blobs: Path, seal: DeviceSeal) -> None:
    """Remove all of a device: before its key goes, for afterwards nobody knows which folder is its own.

    Raises:
        OSError: a file cannot be removed.
    """
    folder = parts_folder(blobs, seal)
    if folder.is_dir():
        shutil.rmtree(folder)


def _item(seal: DeviceSeal, item_id: str) -> str:
    return seal.name("blob-item", item_id).hex()
