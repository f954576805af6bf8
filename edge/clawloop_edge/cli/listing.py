"""Sessions, listed for a person: two lines each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from rich.console import RenderableType
from rich.table import Table

from clawloop_edge.cli.context import console, on_one_line, shown
from clawloop_edge.cli.moments import told

if TYPE_CHECKING:
    from clawloop_edge.pool.records import SessionSummary

_HEADS = ("last", "session and its agent", "steps", "trainable")
_GAPS, _TITLE_CHARS = 2 * (len(_HEADS) - 1), 20


def listing(sessions: Sequence[SessionSummary], *, now: datetime) -> RenderableType:
    """Two lines a session: what it was about; then its id and its agent, whole, as other commands take them."""
    lasts = [told(one.last_ms, now=now) for one in sessions]
    taken = max(map(len, [*lasts, _HEADS[0]])) + sum(map(len, _HEADS[2:])) + _GAPS
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in _HEADS:
        justify: Literal["right", "left"] = "right" if head in _HEADS[2:] else "left"
        table.add_column(head, no_wrap=head != _HEADS[1], overflow="fold", justify=justify)
    table.columns[1].width = max(_TITLE_CHARS, console.width - taken)
    for one, last in zip(sessions, lasts, strict=True):
        title = on_one_line(one.title or "(no title)", style="bold")
        table.add_row(last, title, str(one.steps), str(one.trainable))
        table.add_row("", shown(f"{one.session_id}  {one.app}".rstrip(), style="dim"))
    return table
