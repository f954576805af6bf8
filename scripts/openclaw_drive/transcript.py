"""What OpenClaw itself keeps of a conversation: its SQLite transcript, opened read-only.

Each assistant message there carries the completion id that it got over HTTP, so a kept step is compared with the very
message that OpenClaw made of it. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

MAX_EVENT_BYTES = 4 << 20
_HEARTBEAT = "[OpenClaw heartbeat poll]"
_OWN_WORD = "gateway-injected"
"""what OpenClaw names as the model of what it answers itself, to a command for one"""


class TranscriptError(Exception):
    """The file is no database of the OpenClaw that this was written for."""


@dataclass(frozen=True)
class Call:
    """A tool call as OpenClaw ran it."""

    call_id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Said:
    """One assistant message: the completion id that it came with, OpenClaw's run, its text and its calls.

    `heartbeat`: nobody asked, OpenClaw woke the model. `summarised`: since the answer before, a summary took the place
    of what had been said.
    """

    response_id: str
    run_id: str
    text: str
    calls: tuple[Call, ...]
    heartbeat: bool = False
    summarised: bool = False


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back to the model."""

    call_id: str
    text: str
    is_error: bool


@dataclass(frozen=True)
class Transcript:
    """One conversation, in order; and what OpenClaw itself answered, by the key of the message it answered to."""

    said: tuple[Said, ...]
    results: tuple[ToolResult, ...]
    own_words: Mapping[str, str] = field(default_factory=dict)


def read_transcript(database: Path, session_id: str) -> Transcript:
    """The conversation that OpenClaw keeps under `session_id`.

    Raises:
        TranscriptError: the file is not its database.
    """
    try:
        return _read(_events(database, session_id))
    except (sqlite3.Error, json.JSONDecodeError, KeyError) as error:
        raise TranscriptError(f"{database} is not the transcript of OpenClaw 2026.9.6: {error!r}") from error


def find_session(database: Path, session_key: str) -> str:
    """OpenClaw's id of the conversation that `session_key` names now, or an empty string."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        found = connection.execute(
            "SELECT session_id FROM session_windows WHERE session_key = ? ORDER BY created_at DESC", (session_key,)
        ).fetchone()
    return str(found[0]) if found else ""


def _events(database: Path, session_id: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT event_json, event_zstd FROM transcript_events WHERE session_id = ? ORDER BY seq", (session_id,)
        ).fetchall()
    return [_event(row) for row in rows]


def _read(events: list[dict[str, Any]]) -> Transcript:
    said: list[Said] = []
    results: list[ToolResult] = []
    own_words: dict[str, str] = {}
    heartbeat = summarised = False
    for event in events:
        message = event.get("message", {})
        match (event.get("type"), message.get("role")):
            case ("compaction", _):
                summarised = True
            case ("message", "user"):
                heartbeat = _text(message["content"]).startswith(_HEARTBEAT)
            case ("message", "toolResult"):
                results.append(_result(message))
            case ("message", "assistant") if message.get("model") == _OWN_WORD:
                own_words[message.get("idempotencyKey", "")] = _text(message["content"])
            case ("message", "assistant"):
                said.append(_said(message, heartbeat=heartbeat, summarised=summarised))
                summarised = False
    return Transcript(tuple(said), tuple(results), own_words)


def _event(row: tuple[str | None, bytes | None]) -> dict[str, Any]:
    plain, packed = row
    raw = plain or zstandard.ZstdDecompressor().decompress(packed or b"", max_output_size=MAX_EVENT_BYTES)
    found: dict[str, Any] = json.loads(raw)
    return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def _said(message: dict[str, Any], *, heartbeat: bool, summarised: bool) -> Said:
    calls = [part for part in message["content"] if part.get("type") == "toolCall"]
    return Said(
        response_id=message.get("responseId", ""),
        run_id=message.get("__openclaw", {}).get("runId", ""),
        text=_text(message["content"]),
        calls=tuple(Call(part["id"], part["name"], part["arguments"]) for part in calls),
        heartbeat=heartbeat,
        summarised=summarised,
    )


def _result(message: dict[str, Any]) -> ToolResult:
    return ToolResult(message["toolCallId"], _text(message["content"]), bool(message.get("isError")))
