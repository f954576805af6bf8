"""The seed of what devices learn together: everybody who learns beside one adapter draws the same factor from it.

Knows no torch, since the hub makes tasks with it, and the trainer undoes them.
"""

from __future__ import annotations

import hashlib


def task_seed(line_id: str, version: int) -> int:
    """The seed of tasks beside that adapter version of a line, 63 bits."""
    digest = hashlib.sha256(f"clawloop learn task\0{line_id}\0{version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
