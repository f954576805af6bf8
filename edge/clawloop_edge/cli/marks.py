"""What kind of thing stood where an item has a mark: looked up in the step that is kept here, and searched again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.redact.detector import Detector
    from clawloop_shared.records import Step

_BEFORE, _AFTER = 256, 64
"""tokens around a mark that are searched with it: most kinds are told by what stands before them"""
_ORIGINAL = (
    "SELECT record_id FROM outbox_records WHERE item_id = ? AND iif(sent_as = '', record_id, sent_as) = ? LIMIT 1"
)


class Marks:
    """Names the marks of one item. Knows nothing once the session is not kept here any more."""

    def __init__(
        self, pool: Pool, item_id: str, *, decode: Callable[[Sequence[int]], str], detector: Callable[[], Detector]
    ) -> None:
        """`detector` is called when the first mark is named: it reads what this machine knows."""
        self._pool, self._item_id, self._decode = pool, item_id, decode
        self._make = detector
        self._detector: Detector | None = None
        self._ids: dict[str, list[int]] = {}

    def kind(self, step: Step, start: int, length: int) -> str:
        """The kinds of what stood in `length` tokens from `start` on; empty if that cannot be told."""
        ids = self._original(step)
        if len(ids) < start + length:
            return ""
        self._detector = self._detector or self._make()
        first = max(0, start - _BEFORE)
        text = self._decode(ids[first : start + length + _AFTER])
        begin, end = len(self._decode(ids[first:start])), len(self._decode(ids[first : start + length]))
        found = [span.kind for span in self._detector.find(text) if span.start < end and begin < span.end]
        return ", ".join(dict.fromkeys(found))

    def _original(self, step: Step) -> list[int]:
        if step.step_id not in self._ids:
            with self._pool.reading() as reading:
                row = reading.database.conn.execute(_ORIGINAL, (self._item_id, step.step_id)).fetchone()
                kept = reading.step(row[0]) if row else None
            self._ids[step.step_id] = kept.token_ids if kept else []
        return self._ids[step.step_id]
