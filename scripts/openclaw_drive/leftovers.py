"""What OpenClaw leaves in /tmp whatever TMPDIR says: an empty folder, and lock files named after its databases.

Only what belongs to the databases of one HOME is removed; another OpenClaw on this machine keeps its own. Observed on
OpenClaw 2026.9.6.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SYSTEM_TMP = Path("/tmp")


def remove_leftovers(home: Path, *, tmp: Path = SYSTEM_TMP, keep_folder: bool = False) -> None:
    """Remove the lock files of the databases under `home`, and folders of OpenClaw's that are empty then.

    `keep_folder` leaves its plain temporary folder, for when that was there before.
    """
    locks = tmp / f"openclaw-state-locks-{os.getuid()}"
    for database in home.resolve().rglob("*.sqlite"):
        name = hashlib.sha256(str(database).encode()).hexdigest()[:8]
        for lock in locks.glob(f"*.{name}.lock.sqlite*"):
            lock.unlink(missing_ok=True)
    for folder in [locks] if keep_folder else [locks, tmp / "openclaw"]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
