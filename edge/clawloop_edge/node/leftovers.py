"""What an edge that was killed may have left in its home: cleared when the next one starts, whatever it is set to."""

from pathlib import Path

from clawloop_edge.node.blobs import drop_parts

FETCHED, NODE, KEY_FILE = "fetched", "node", "node.key"
"""folders of a home: the files of a large adapter until all are there, what a stock SuperNode reads; and its key"""
ABANDONED_S = 86_400.0
"""so long after the last try, what was fetched of an adapter is not waited for any more"""


def clear(home: Path) -> None:
    """Remove a SuperNode's key that lies in plain, and what was fetched and abandoned. Raises OSError."""
    (home / NODE / KEY_FILE).unlink(missing_ok=True)
    drop_parts(home / FETCHED, older_than_s=ABANDONED_S)
