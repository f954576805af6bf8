"""What the owner said of steps that had left, as the marks that go after them. Reads one snapshot; writes nothing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from clawloop_edge.pool.curation import Curation
from clawloop_edge.pool.keeper import TARGET_COLUMNS
from clawloop_shared.levels import Level
from clawloop_shared.records import Mark

if TYPE_CHECKING:
    from sqlite_utils import Database

_LEFT = (
    "SELECT s.step_id, r.sent_as, o.level FROM steps AS s JOIN outbox_records AS r ON r.record_id = s.step_id"
    " JOIN outbox AS o USING (item_id) WHERE s.{column} = ? AND s.session_id = ? AND o.state IN ('sent', 'received')"
    " ORDER BY s.seq, o.seq"
)


def marks_of(database: "Database", said: Curation) -> Iterator[tuple[Mark, Level]]:
    """A mark for each step of a word on learning that had left, under the name and at the level at which it did."""
    if said.word.trainable is None:
        return
    query = _LEFT.format(column=TARGET_COLUMNS[said.target])
    rows = database.conn.execute(query, (said.target_id, said.session_id)).fetchall()
    for step_id, (sent_as, level) in {row[0]: row[1:] for row in rows}.items():
        mark = Mark(
            mark_id=f"{said.curation_id}/{step_id}",
            step_id=sent_as or step_id,
            trainable=said.word.trainable,
            created_ms=said.created_ms,
        )
        yield mark, Level(level)
