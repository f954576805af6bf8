"""A session as a person reads it in a terminal: who speaks, what tools gave back, and what became of each step.

What models, tools and people wrote is shown as text alone: no markup in it is read, no control character gets through.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from clawloop_edge.cli.context import console, count, shown
from clawloop_edge.cli.conversation import Message, View, text_shown, views
from clawloop_edge.cli.moments import lasted, told
from clawloop_edge.sessions.tree import text_of
from clawloop_shared.records import Target

if TYPE_CHECKING:
    from clawloop_edge.pool.records import SessionSummary
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.items import OutboxItem
    from clawloop_shared.records import Signal, Step

_STYLES = {"user": "bold cyan", "assistant": "bold green", "tool": "yellow", "system": "magenta"}
_TOOL_LINES, _TOOL_CHARS = 4, 400
_CALL_CHARS = 200
_SPEAKER_WIDTH = 9


def trainable(step: Step) -> str:
    """Whether a step may be learned from, in the words that its caller got."""
    return "yes" if step.trainable else f"no ({step.untrainable})"


def whereabouts(items: Iterable[OutboxItem], *, now: datetime) -> str:
    """Where a step went, from the outbox items that it is in."""
    found = [f"{_learned(item)}{item.state}{_detail(item, now)}" for item in items]
    return "; ".join(found) if found else "stays on this device"


def _learned(item: OutboxItem) -> str:
    return f"learned from at home for delta item {item.item_id}: " if item.delta else ""


def _detail(item: OutboxItem, now: datetime) -> str:
    if item.state == "queued":
        return f", may leave {told(item.release_ms, now=now)}"
    if item.state == "received":
        return f" by the server {told(item.received_ms, now=now)}"
    if item.state == "sent":
        return ", not yet acknowledged" if item.has_bytes else " in part or whole, then withdrawn"
    return ""


def judged(signals: Sequence[Signal]) -> str:
    """Signals in a few words: `+1 user "thanks"`."""
    said = (f'"{one.comment}"' if one.comment else "" for one in signals)
    return ", ".join(f"{one.value:+g} {one.source} {words}".strip() for one, words in zip(signals, said, strict=True))


def header(session: SessionSummary, *, now: datetime) -> RenderableType:
    """What a transcript begins with."""
    span = f"{told(session.first_ms, now=now)} to {told(session.last_ms, now=now)}"
    counts = f"{count(session.steps, 'step')}, {session.trainable} trainable"
    facts = " · ".join(filter(None, (session.app, span, counts)))
    return Group(shown(session.title or "(no title)", style="bold"), shown(session.session_id), shown(facts))


def step_shown(
    view: View, *, signals: Sequence[Signal], items: Sequence[OutboxItem], taken_out: bool, full: bool, now: datetime
) -> RenderableType:
    """One step: what is new in it, its reply, and what became of it. `taken_out`: by its owner, of training."""
    kept = view.kept
    lines: list[RenderableType] = [_rule(view, now)]
    if view.note:
        lines.append(Text(f"↱ {view.note}", style="blue"))
    if not view.aside or full:
        lines += [line for message in view.new for line in _message(message, full=full)]
    lines += _message(kept.reply, full=full)
    step, took = kept.step, lasted(kept.finished_ms - kept.started_ms)
    facts = (
        "trainable: no (you said so)" if taken_out and step.trainable else f"trainable: {trainable(step)}",
        f"adapter {step.policy.version}",
        f"{view.tokens[0]:,} + {view.tokens[1]:,} tokens in {took}",
        *_judgements(signals),
        whereabouts(items, now=now),
    )
    lines.append(shown(" · ".join(filter(None, facts)), style="dim"))
    return Padding(Group(*lines), (0, 0, 1, 0))


def _judgements(signals: Sequence[Signal]) -> Iterator[str]:
    """What was said of a step, and of the run or trajectory that it ends."""
    for target in (Target.STEP, Target.RUN, Target.TRAJECTORY):
        said = judged([one for one in signals if one.target is target])
        if said:
            yield said if target is Target.STEP else f"its {target.value}: {said}"


def _rule(view: View, now: datetime) -> RenderableType:
    kept = view.kept
    what = f"{view.number} · {told(kept.started_ms, now=now)}" + (f" · side request: {kept.kind}" if view.aside else "")
    return Rule(shown(f"{what} · {kept.step.step_id}"), align="left", style="dim")


def _message(message: Message, *, full: bool) -> Iterator[RenderableType]:
    """A message beside its speaker, who is named once."""
    role = str(message.get("role"))
    role = "system" if role == "developer" else role
    for number, text in enumerate(_pieces(message, role, full=full)):
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=_SPEAKER_WIDTH, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(shown("" if number else role, style=_STYLES.get(role, "bold")), text)
        yield grid


def _pieces(message: Message, role: str, *, full: bool) -> Iterator[Text]:
    text, thoughts = text_of(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
    if role == "system" and not full:
        yield _length("instructions", text)
        return
    if isinstance(thoughts, str) and thoughts:
        yield shown(thoughts.strip("\n"), style="dim italic") if full else _length("thoughts", thoughts)
    if not full:
        text = _folded(text) if role == "tool" else text_shown({**message, "tool_calls": None})
    if text.strip():
        yield shown(text.strip("\n"))
    for call in message.get("tool_calls") or ():
        yield shown(f"→ {_call(call, full=full)}", style="yellow")


def _length(what: str, text: str) -> Text:
    return Text(f"({what}: {len(text):,} characters)", style="dim")


def _folded(text: str) -> str:
    """The first lines of what a tool gave back, and how much more there is."""
    lines = text.strip("\n").splitlines()
    head = "\n".join(lines[:_TOOL_LINES])[:_TOOL_CHARS]
    left = len(text.strip("\n")) - len(head)
    return f"{head}\n… {left:,} more characters (--full)" if left else head


def _call(call: Any, *, full: bool) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else ("?", call)
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = arguments
    if full:
        return f"{name} {json.dumps(value, indent=2, ensure_ascii=False)}"
    line = (
        " ".join(f"{key}={_value(each)}" for key, each in value.items()) if isinstance(value, dict) else _value(value)
    )
    return f"{name} {line if len(line) <= _CALL_CHARS else line[: _CALL_CHARS - 1] + '…'}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and " " not in value else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())


def _ends(steps: Sequence[View]) -> dict[tuple[Target, str], str]:
    """The step at which a signal on a step, a run or a trajectory is shown: the last of them."""
    found: dict[tuple[Target, str], str] = {}
    for step in (view.kept.step for view in steps):
        ends = (Target.STEP, step.step_id), (Target.RUN, step.run_id), (Target.TRAJECTORY, step.trajectory_id)
        found |= dict.fromkeys(ends, step.step_id)
    return found


def print_session(pool: Pool, session_id: str, *, full: bool, now: datetime) -> None:
    """Print a session step by step."""
    from clawloop_edge.pool.curation import Curations
    from clawloop_edge.privacy.outbox import Outbox

    with pool.reading() as reading:
        session, signals = reading.session(session_id), reading.session_signals(session_id)
        steps = list(views(reading.session_steps(session_id)))
        known = Curations(reading.database, reading.keyring)
        taken_out = {view.kept.step.step_id for view in steps if known.off(view.kept.step)}
    if session is None:  # it was forgotten between being named and being read
        return
    console.print(header(session, now=now))
    last = _ends(steps)
    whole = [one for one in signals if (one.target, one.target_id) not in last]
    if whole:
        console.print(shown(f"judged as a whole: {judged(whole)}"))
    console.print()
    for view in steps:
        step_id = view.kept.step.step_id
        own = [one for one in signals if last.get((one.target, one.target_id)) == step_id]
        items = Outbox.items_with(pool, step_id)
        off = step_id in taken_out
        console.print(step_shown(view, signals=own, items=items, taken_out=off, full=full, now=now))
