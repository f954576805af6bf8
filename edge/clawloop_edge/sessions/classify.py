"""Main line or side request, told by content, and which program is calling. Pure.

Only main-line steps may be learned from; a title, a summary or a heartbeat is no turn of the user's.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_edge.sessions import openclaw
from clawloop_edge.sessions.tree import text_of, user_text

_APP_CHARS = 40


class Kind(StrEnum):
    """What a request is for."""

    MAIN = "main"
    """a user's turn or its tool loop"""
    TITLE = "title"
    """a name for the conversation"""
    COMPACTION = "compaction"
    """a summary of the conversation"""
    HEARTBEAT = "heartbeat"
    """a poll by timer or system event"""
    SUBAGENT = "subagent"
    """a sub-agent's own conversation"""
    BACKGROUND = "background"
    """the answer to a finished background task"""
    UNKNOWN = "unknown"
    """OpenClaw's, but of no shape we know"""


class Traffic(msgspec.Struct, frozen=True):
    """What a request is for, which program sent it, and OpenClaw's `Runtime:` line if it has one."""

    kind: Kind
    app: str
    runtime: str = ""


def classify(messages: Sequence[dict[str, Any]], *, tools: bool, user_agent: str = "") -> Traffic:
    """Tell what a request is for. Plain agents have but a main line."""
    system = text_of(messages[0].get("content")) if messages[0].get("role") in ("system", "developer") else ""
    users = [text_of(m.get("content")) for m in messages if m.get("role") == "user"]
    runtime = openclaw.runtime_line(_runtime_places(messages, system))
    if system.startswith(openclaw.TITLE) and not tools:
        return Traffic(Kind.TITLE, "openclaw", runtime)
    if system.startswith(openclaw.COMPACTION) and not tools:
        return Traffic(Kind.COMPACTION, "openclaw", runtime)
    marked = openclaw.SYSTEM_MARK in system[:200]
    if not (marked or runtime or any(map(openclaw.is_internal, users[-1:]))):
        return Traffic(Kind.MAIN, _app(user_agent))
    if not (tools or marked):
        return Traffic(Kind.UNKNOWN, "openclaw", runtime)
    return Traffic(_openclaw_kind(messages, runtime), "openclaw", runtime)


def _runtime_places(messages: Sequence[dict[str, Any]], system: str) -> list[str]:
    """Texts that may end in the `Runtime:` line: the first user message's parts, and the system prompt."""
    first = next((m.get("content") for m in messages if m.get("role") == "user"), "")
    parts = [text_of([part]) for part in first] if isinstance(first, list) else [text_of(first)]
    return [*parts, system]


def _openclaw_kind(messages: Sequence[dict[str, Any]], runtime: str) -> Kind:
    asked = [m for m in messages if m.get("role") == "user" and not openclaw.is_internal(text_of(m.get("content")))]
    last = user_text(asked[-1].get("content")) if asked else ""
    first = user_text(asked[0].get("content")) if asked else ""
    if openclaw.is_subagent(runtime) or first.startswith(openclaw.SUBAGENT):
        return Kind.SUBAGENT
    if last.startswith(openclaw.HEARTBEAT):
        return Kind.HEARTBEAT
    if last.startswith(openclaw.BACKGROUND):
        return Kind.BACKGROUND
    return Kind.MAIN


def _app(user_agent: str) -> str:
    """The first product of a user agent without its version, e.g. `openai/python`."""
    words = user_agent.split()
    name = "".join(c for c in words[0].lower() if c.isascii() and (c.isalnum() or c in "/._-")) if words else ""
    return name[:_APP_CHARS] or "unknown"
