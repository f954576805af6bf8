"""Finding kept steps, runs and sessions by the beginnings of their ids. Reads on any connection; changes nothing."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

STEP_PREFIXES = ("chatcmpl-", "resp-", "msg-", "cmpl-")
"""what the APIs put before a step's ULID; a person may leave it out"""
_LAST = chr(0x10FFFF)


def steps_named(database: "Database", start: str, *, limit: int) -> list[str]:
    """Up to `limit` ids of steps that begin with `start`, with or without an API's prefix. A whole id stands alone."""
    found = _named(database, "steps", start=start, limit=limit)
    for prefix in STEP_PREFIXES:
        found = found or _named(database, "steps", start=prefix + start.upper(), limit=limit)
    return found


def sessions_named(database: "Database", start: str, *, limit: int) -> list[str]:
    """Up to `limit` ids of sessions that begin with `start`. A whole id stands alone."""
    return _named(database, "sessions", start=start, limit=limit)


def runs_named(database: "Database", start: str, *, limit: int) -> list[str]:
    """Up to `limit` ids of runs that begin with `start`. A whole id stands alone."""
    query = "SELECT DISTINCT run_id FROM steps WHERE run_id >= ? AND run_id < ? ORDER BY 1 LIMIT ?"
    found = [row[0] for row in database.conn.execute(query, (start, start + _LAST, limit))]
    return found[:1] if found and found[0] == start else found


def _named(database: "Database", table: str, *, start: str, limit: int) -> list[str]:
    column = f"{table.removesuffix('s')}_id"
    query = f"SELECT {column} FROM {table} WHERE {column} >= ? AND {column} < ? ORDER BY 1 LIMIT ?"  # noqa: S608
    found = [row[0] for row in database.conn.execute(query, (start, start + _LAST, limit))]
    return found[:1] if found and found[0] == start else found
