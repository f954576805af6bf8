"""Words of their owner on steps, obeyed by the outbox in the transaction that keeps them. docs/formats/outbox.md.

What must not be learned from is not put into the outbox. An item that waits with such a step is taken back, and what
else it held is put into a new one: so the bytes that leave are always those that were shown. Of a step that had left
already, the word itself leaves, as a mark.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.curation import Curation
from clawloop_edge.pool.keeper import TARGET_COLUMNS
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.schema import prepare, read_cursor, take_back, write_cursor

if TYPE_CHECKING:
    from sqlite_utils import Database

_IDS = "(SELECT value FROM json_each(?))"
_WAITING = (
    f"SELECT DISTINCT item_id FROM outbox JOIN outbox_records USING (item_id) WHERE record_id IN {_IDS}"  # noqa: S608
    " AND state IN ('queued', 'approved')"
)
_FIRST = f"""SELECT min(seq) FROM (
    SELECT seq FROM steps WHERE step_id IN (SELECT record_id FROM outbox_records WHERE item_id IN {_IDS})
    UNION ALL SELECT seq FROM signals WHERE signal_id IN (SELECT record_id FROM outbox_records WHERE item_id IN {_IDS})
    )"""  # noqa: S608
_FIRST_AT_HOME = (
    f"SELECT min(seq) FROM steps AS s WHERE step_id IN {_IDS}"  # noqa: S608
    " AND NOT EXISTS (SELECT 1 FROM outbox_records AS r WHERE r.record_id = s.step_id)"
)


def adopt(pool: Pool) -> None:
    """Have the outbox of `pool` obey its owner's words."""
    prepare(pool)
    pool.obeyed_by["outbox"] = partial(obey, pool=pool)


def obey(database: "Database", said: Sequence[Curation], *, pool: Pool) -> None:
    """Have the outbox do what was said. Needs the transaction that keeps it."""
    what = said[0]
    if what.word.trainable is None:
        return
    query = f"SELECT step_id FROM steps WHERE {TARGET_COLUMNS[what.target]} = ? AND trainable"  # noqa: S608
    steps = _ids(row[0] for row in database.conn.execute(query, (what.target_id,)))
    first = _look_again(database, steps) if what.word.trainable else _take_out(database, pool, steps)
    if first is not None:
        write_cursor(database, pool.keyring, seq=min(read_cursor(database, pool.keyring), first - 1))


def _look_again(database: "Database", steps: str) -> int | None:
    """The first of these steps that stayed at home, and may go into the outbox now."""
    found: int | None = database.conn.execute(_FIRST_AT_HOME, (steps,)).fetchone()[0]
    return found


def _take_out(database: "Database", pool: Pool, steps: str) -> int | None:
    """Take back the items that wait with one of these steps; gives the first change of what they held."""
    items = [row[0] for row in database.conn.execute(_WAITING, (steps,))]
    found: int | None = database.conn.execute(_FIRST, [_ids(items)] * 2).fetchone()[0]
    take_back(database, pool.keyring, item_ids=items)
    return found


def _ids(names: Iterable[str]) -> str:
    return msgspec.json.encode(list(names)).decode()
