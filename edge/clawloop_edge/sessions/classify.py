"""Main line or side request, told by content, and which program is calling. Pure.

Only main-line steps may be learned from; a title, a summary or a heartbeat is no turn of the user's. For OpenClaw a
request counts as main only if nothing speaks against it; for other programs only what is certain is a side request.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_edge.sessions import openclaw
from clawloop_edge.sessions.tree import parts_of, text_of

_APP_CHARS = 40
_OPENING_CHARS = 400
_SYSTEM_ROLES = ("system", "developer")


class Kind(StrEnum):
    """What a request is for."""

    MAIN = "main"
    """a user's turn or its tool loop"""
    TITLE = "title"
    """a name for the conversation"""
    COMPACTION = "compaction"
    """a summary of the conversation"""
    RECAP = "recap"
    """a note on what was done, for somebody who looks on"""
    SLUG = "slug"
    """a file name for the conversation"""
    MEMORY_FLUSH = "memory flush"
    """notes taken before a compaction"""
    REVIEW = "review"
    """a judgement of a command, a widget, a consent or the agent's own work"""
    ASIDE = "aside"
    """a question beside the conversation, which does not become part of it"""
    HEARTBEAT = "heartbeat"
    """a poll by timer or system event"""
    SCHEDULED = "scheduled"
    """a job that runs by itself at its time"""
    BACKGROUND = "background"
    """the answer to something that is done, due or told by another session"""
    SUBAGENT = "subagent"
    """a sub-agent's own conversation"""
    HELPER = "helper"
    """anything else that a program asks for itself"""
    UNKNOWN = "unknown"
    """OpenClaw's, but of no shape we know"""


Openings = tuple[tuple[str, Kind], ...]

_OPENCLAW_SYSTEM: Openings = (
    ("Generate a concise session title", Kind.TITLE),
    ("You are a context summarization assistant", Kind.COMPACTION),
    ("Write an Activity recap", Kind.RECAP),
    ("You judge the trajectory of a running AI agent session", Kind.RECAP),
    ("You write the live status line for an AI assistant", Kind.RECAP),
    ("You are OpenClaw's exec safety reviewer", Kind.REVIEW),
    ("You are OpenClaw's dashboard widget safety reviewer", Kind.REVIEW),
    ("You classify one chat message from a user who was just asked to approve", Kind.REVIEW),
    ("You are answering an ephemeral /btw side question", Kind.ASIDE),
    ("You are OpenClaw, the system", Kind.HELPER),
    ("You are a JSON-only function.", Kind.HELPER),
    ("You are keeping a dream diary", Kind.HELPER),
    ("Write concise meeting notes in the transcript's language", Kind.HELPER),
)
"""How the system prompts begin of requests that OpenClaw makes without tools and without any other mark of its own."""
_OPENCLAW_LABEL = "You are labeling the supplied message, not participating in its conversation."
_OPENCLAW_SIDE_CHAT = "You are the read-only Side chat assistant observing session "
_OPENCLAW_FIRST: Openings = (
    ("You are an assistant that summarizes texts concisely while keeping", Kind.HELPER),
    ("Reply with OK. Do not use tools.", Kind.HELPER),
)
"""The same of first user messages."""
_OPENCLAW_LAST: Openings = (
    (openclaw.MEMORY_FLUSH, Kind.MEMORY_FLUSH),
    ("Based on this conversation, generate a short 1-2 word filename slug", Kind.SLUG),
    ("Skill review. Distill new durable learning", Kind.REVIEW),
    ("Reply with OK. Do not use tools.", Kind.HELPER),
    ("You are a memory search agent.", Kind.HELPER),
    (openclaw.HEARTBEAT, Kind.HEARTBEAT),
    (openclaw.SCHEDULED, Kind.SCHEDULED),
    (openclaw.COMMAND_DONE, Kind.BACKGROUND),
    (openclaw.TIMER, Kind.BACKGROUND),
    (openclaw.EVENT, Kind.BACKGROUND),
    ("A background task completed. Use this result", Kind.BACKGROUND),
    ("A background task finished. Process the completion update", Kind.BACKGROUND),
    ("[Internal task completion event]", Kind.BACKGROUND),
    ("[Inter-session message]", Kind.BACKGROUND),
)
"""How the last thing asked begins in requests that bear OpenClaw's marks."""
_OPENCLAW_KEYS: Openings = (
    ("cron:", Kind.SCHEDULED),
    ("hook:", Kind.BACKGROUND),
    ("helper:", Kind.HELPER),
    ("setup-inference:", Kind.HELPER),
    ("internal-session-effects:", Kind.HELPER),
)
"""How session keys begin of sessions that are no conversation of the user's."""
_OPENCLAW_CONTEXT = ("[OpenClaw room event]", "A background task completed. Keep internal details private")
"""What stands in the ephemeral context of a turn that nobody asked for."""
_SUBAGENT = "[Subagent Context]"

_OTHER_SYSTEM: Openings = (
    ("You are a title generator. You output ONLY a thread title.", Kind.TITLE),  # opencode
    ("You will generate a short title based on the first message a user begins a conversation with", Kind.TITLE),
    ("Analyze if this message indicates a new conversation topic", Kind.TITLE),  # Claude Code
    ("Summarize this coding conversation in under 50 characters", Kind.TITLE),
    ("You are a helpful AI assistant tasked with summarizing conversations", Kind.COMPACTION),
)
"""How other programs' system prompts begin, or what stands on their second line after the program's own name."""
_OPEN_WEBUI = "### Task:\n"
_OPEN_WEBUI_HISTORY = "<chat_history>"
_CLAUDE_CODE = "You are Claude Code"


class Traffic(msgspec.Struct, frozen=True):
    """What a request is for, which program sent it, and OpenClaw's `Runtime:` line if it has one."""

    kind: Kind
    app: str
    runtime: str = ""


def classify(messages: Sequence[dict[str, Any]], *, tools: bool, user_agent: str = "") -> Traffic:
    """Tell what a request is for."""
    system = text_of(messages[0].get("content")) if messages and messages[0].get("role") in _SYSTEM_ROLES else ""
    users = [parts for m in messages if m.get("role") == "user" and (parts := parts_of(m.get("content")))]
    marked = openclaw.SYSTEM_MARK in system[:_OPENING_CHARS]
    runtime = openclaw.runtime_line(users[0] if users else (), system=system if marked else "")
    if marked or runtime or any(openclaw.is_internal(parts[0]) for parts in users[-1:]):
        return Traffic(_marked_kind(system, users, tools=tools, runtime=runtime), "openclaw", runtime)
    if tools:
        return Traffic(Kind.MAIN, _app(user_agent))
    kind = _unmarked_kind(system, users)
    if kind is not None:
        return Traffic(kind, "openclaw")
    return Traffic(_other_kind(system, users), _app(user_agent))


def _marked_kind(system: str, users: list[list[str]], *, tools: bool, runtime: str) -> Kind:
    first = next((texts[0] for parts in users if (texts := _asked(parts))), "")
    last = next((texts[-1] for parts in reversed(users) if (texts := _asked(parts))), "")
    key = openclaw.session_key(runtime)
    if ":subagent:" in f":{key}" or first.startswith(_SUBAGENT):
        return Kind.SUBAGENT
    kind = _opening(last, _OPENCLAW_LAST) or _opening(key, _OPENCLAW_KEYS)
    if kind is not None:
        return kind
    if _OPENCLAW_SIDE_CHAT in system:
        return Kind.ASIDE
    if users and openclaw.is_internal(users[-1][0]) and any(phrase in users[-1][0] for phrase in _OPENCLAW_CONTEXT):
        return Kind.BACKGROUND
    return Kind.MAIN if tools else _unmarked_kind(system, users) or Kind.UNKNOWN


def _asked(parts: list[str]) -> list[str]:
    """What is left of a user message's parts once OpenClaw's own are gone."""
    return [text for part in parts if not openclaw.is_internal(part) and (text := openclaw.clean(part))]


def _unmarked_kind(system: str, users: list[list[str]]) -> Kind | None:
    """What a request without tools is for if OpenClaw makes such requests for itself."""
    kind = _opening(system, _OPENCLAW_SYSTEM) or _opening(users[0][0] if users else "", _OPENCLAW_FIRST)
    return kind or (Kind.TITLE if _OPENCLAW_LABEL in system else None)


def _other_kind(system: str, users: list[list[str]]) -> Kind:
    """What a request without tools is for if a program other than OpenClaw sent it."""
    if system.startswith(_CLAUDE_CODE):
        system = system.partition("\n")[2].lstrip()
    kind = _opening(system, _OTHER_SYSTEM)
    if kind is not None:
        return kind
    last = users[-1][-1] if users else ""
    if last.startswith(_OPEN_WEBUI) and _OPEN_WEBUI_HISTORY in last:
        return Kind.TITLE if "title" in last.split("\n", 2)[1] else Kind.HELPER
    return Kind.MAIN


def _opening(text: str, openings: Openings) -> Kind | None:
    return next((kind for opening, kind in openings if text.startswith(opening)), None)


def _app(user_agent: str) -> str:
    """The first product of a user agent without its version, e.g. `openai/python`."""
    words = user_agent.split()
    name = "".join(c for c in words[0].lower() if c.isascii() and (c.isalnum() or c in "/._-")) if words else ""
    return name[:_APP_CHARS] or "unknown"
