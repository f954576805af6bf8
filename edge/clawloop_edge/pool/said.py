"""What was said in a step for the first time: texts of people and tools, and the reply. Pure.

Instructions, what an agent adds around a person's words, and histories that are retold to be summarised or named are
left out; so are thoughts.
"""

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from clawloop_edge.pool.records import Turn
from clawloop_edge.sessions.classify import Kind
from clawloop_edge.sessions.tree import text_of, user_texts

MAX_CHARS = 64 << 10
"""of a longer text the rest is not looked into"""
RETOLD = frozenset({Kind.TITLE, Kind.COMPACTION, Kind.RECAP, Kind.SLUG, Kind.REVIEW, Kind.HELPER})
"""kinds of requests whose messages tell again what was said elsewhere"""


class Speaker(StrEnum):
    """Who said it."""

    USER = "user"
    """a person"""
    ASSISTANT = "assistant"
    """the model: its text, and the tools that it called with their arguments"""
    TOOL = "tool"
    """what a tool gave back"""


class Said(msgspec.Struct, frozen=True):
    """One text and who said it."""

    who: Speaker
    text: str


def said(turn: Turn) -> Iterator[Said]:
    """What a step adds to its conversation, in order. Empty texts are left out."""
    messages = [] if turn.step.kind in RETOLD else turn.messages
    for message in (*messages, turn.reply):
        who = _SPEAKERS.get(message.get("role"))
        text = _text(message, who) if who else ""
        if who and text.strip():
            yield Said(who, text[:MAX_CHARS].encode(errors="replace").decode())


_SPEAKERS: dict[Any, Speaker] = {speaker.value: speaker for speaker in Speaker}


def _text(message: dict[str, Any], who: Speaker | None) -> str:
    content = message.get("content")
    if who is Speaker.USER:
        return "\n".join(user_texts(content))
    return "\n".join(filter(None, (text_of(content), *map(call_text, message.get("tool_calls") or ()))))


def call_text(call: Any) -> str:
    """A tool call as words: its name and the values of its arguments."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return ""
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = arguments
    return " ".join([str(function.get("name", "")), *_strings(value)])


def _strings(value: Any) -> Iterator[str]:
    """The texts and numbers in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += reversed(list(one.values()))
        elif isinstance(one, list):
            waiting += reversed(one)
        elif one is not None and not isinstance(one, bool):
            yield str(one)
