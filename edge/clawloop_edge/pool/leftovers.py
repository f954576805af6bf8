"""What a backup that took the pool's place may leave in a home if it was stopped halfway, and how it goes."""

import shutil
from pathlib import Path

from clawloop_edge.pool.keys import DATABASE_NAME

DRAFT_NAME = "restoring"
"""folder of what is not yet the pool"""
BEFORE_NAME = f"{DATABASE_NAME}.before"
"""what was the pool, until what took its place was seen to open"""


def clear(folder: Path, *, drafts: bool) -> None:
    """Remove them. Needs the lock of the keys, a pool that opens, and for `drafts` the lock of the pool."""
    for suffix in ("", "-wal"):
        (folder / f"{BEFORE_NAME}{suffix}").unlink(missing_ok=True)
    if drafts and (folder / DRAFT_NAME).exists():
        shutil.rmtree(folder / DRAFT_NAME)
