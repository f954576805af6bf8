"""The marks that OpenClaw leaves in its requests, read and taken off. Pure; knows nothing but message texts.

Its last message is ephemeral and moves, its timestamps and its `Runtime:` line are put into user texts, and a retried
turn is rewritten. Two requests of one conversation compare equal only without them. Observed on OpenClaw 2026.9.6.
"""

import re
from collections.abc import Iterable

INTERNAL_CONTEXT = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
SYSTEM_MARK = "<!-- openclaw:attempt:"
TITLE = "Generate a concise session title"
COMPACTION = "You are a context summarization assistant"
HEARTBEAT = "Follow the heartbeat monitor scratch context"
SUBAGENT = "[Subagent Context]"
BACKGROUND = "A background task completed"

_STAMP = re.compile(r"\A\[[A-Z][a-z]{2} \d{4}-\d{2}-\d{2} \d{2}:\d{2}(?::\d{2})? [^\]\n]{1,40}\] ")
_RUNTIME = re.compile(r"(?:\A|\n)Runtime: agent=[^\n|]* \| [^\n]*\Z")
_SESSION_ID = re.compile(r"\bsessionId=([0-9A-Za-z-]{8,64})")
_SESSION_KEY = re.compile(r"\bsession=([^\s|]{1,256})")
_QUEUED = "[Queued user message from a previous active turn;"
_CONTINUE = "\n\nContinue the current task from the existing transcript, preserving completed work."
_RUNTIME_TAIL_CHARS = 2000


def is_internal(text: str) -> bool:
    """Whether a user text is the ephemeral context that OpenClaw puts last and never keeps."""
    return text.startswith(INTERNAL_CONTEXT)


def clean(text: str) -> str:
    """A user text as it was typed: without timestamp, `Runtime:` line and the frame of a retry."""
    if "Runtime: agent=" in text[-_RUNTIME_TAIL_CHARS:]:
        text = _RUNTIME.sub("", text).rstrip("\n")
    if text.startswith("["):
        text = _STAMP.sub("", text)
    if text.startswith(_QUEUED):
        text = text.partition("\n")[2].partition(_CONTINUE)[0]
    return text


def runtime_line(texts: Iterable[str]) -> str:
    """The first `Runtime:` line that ends one of `texts`, or an empty string."""
    for text in texts:
        found = _RUNTIME.search(text, max(0, len(text) - _RUNTIME_TAIL_CHARS)) if "Runtime: agent=" in text else None
        if found:
            return found.group().lstrip("\n")
    return ""


def session_id(runtime: str) -> str:
    """The `sessionId` of a `Runtime:` line, or an empty string."""
    found = _SESSION_ID.search(runtime)
    return found.group(1) if found else ""


def is_subagent(runtime: str) -> bool:
    """Whether a `Runtime:` line names the session of a sub-agent."""
    found = _SESSION_KEY.search(runtime)
    return bool(found) and ":subagent:" in found.group(1)  # type: ignore[union-attr]
