"""Giving the room of what was deleted back to the disk, a few pages at a time, so that no write waits for long."""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

SPARE_PAGES = 4096
"""empty pages that stay in the file for what comes next"""
_PAGES_AT_ONCE = 1000


def shrink(pool: "Pool", *, spare_pages: int = SPARE_PAGES) -> bool:
    """Let the file go down to what it holds and `spare_pages`, and cut the log; False if a reader stands in the way of
    that."""
    while pool.submit(partial(_vacuum, spare_pages=spare_pages)).result():
        pass
    return pool.cut_log()


def pragma(database: "Database", name: str) -> int:
    """A number that SQLite tells of a database."""
    return int(database.conn.execute(f"PRAGMA {name}").fetchone()[0])


def _vacuum(database: "Database", *, spare_pages: int) -> bool:
    """Move pages from the file's end into empty ones; False once no more than `spare_pages` are empty."""
    spare = pragma(database, "freelist_count") - spare_pages
    if spare <= 0 or not pragma(database, "auto_vacuum"):
        return False
    database.conn.execute(f"PRAGMA incremental_vacuum({min(spare, _PAGES_AT_ONCE)})").fetchall()
    return True
