"""The marks that OpenClaw leaves in its requests, read and taken off. Pure; knows nothing but message texts.

Its last message is ephemeral and moves, its timestamps and its `Runtime:` line are put into user texts, a retried turn
is rewritten, and a wake-up is replayed under a short name. Two requests of one conversation compare equal only without
them. Observed on OpenClaw 2026.9.6 or, where nothing set it off, read in that package.
"""

import re
from collections.abc import Iterable

INTERNAL_CONTEXT = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"
SYSTEM_MARK = "<!-- openclaw:attempt:"
HEARTBEAT = "[OpenClaw heartbeat poll]"
"""how a heartbeat's prompt is replayed in later requests; `clean` gives the prompt itself this name too"""
COMMAND_DONE = "[OpenClaw exec completion]"
TIMER = "[OpenClaw cron wake]"
EVENT = "[OpenClaw session event]"
SCHEDULED = "[cron:"
MEMORY_FLUSH = "Pre-compaction memory flush"

_WAKES = (
    ("Follow the heartbeat monitor scratch context", HEARTBEAT),
    ("An async command completion event was triggered", COMMAND_DONE),
    ("An async command you ran earlier ", COMMAND_DONE),
    ("A scheduled cron event was triggered", TIMER),
    ("A scheduled reminder has been triggered", TIMER),
    ("A new session was started via /new or /reset", "[OpenClaw session new]"),
    ("[OpenClaw session reset]", "[OpenClaw session new]"),
    (f"{COMMAND_DONE}\n", COMMAND_DONE),
)
_WAKE_OPENINGS = tuple(opening for opening, _ in _WAKES)
_SUMMARIES = (
    "The conversation history before this point was compacted into the following summary:",
    "The following is a summary of a branch that this conversation came back from:",
)
_STAMP = re.compile(r"\A\[[A-Z][a-z]{2} \d{4}-\d{2}-\d{2} \d{2}:\d{2}(?::\d{2})? [^\]\n]{1,40}\] ")
_RUNTIME = re.compile(r"(?:\A|\n)Runtime: (?:name=[^\n|]* \| )?agent=[^\n|]* \| [^\n]*\Z")
_SESSION_ID = re.compile(r"\bsessionId=([0-9A-Za-z-]{8,64})")
_SESSION_KEY = re.compile(r"\bsession=([^\s|]{1,256})")
_CLOCK = re.compile(r"\nCurrent time: [^\n]+\nReference UTC: \d{4}-\d{2}-\d{2} \d{2}:\d{2} UTC\Z")
_QUEUED = "[Queued user message from a previous active turn;"
_ABORTED = ("<turn_aborted>", "</turn_aborted>")
_CONTINUE = "Continue the current task from the existing transcript, preserving completed work."
_TAIL_CHARS = 2000
_CLOCK_TAIL_CHARS = 200
_FRAMES = 8
_SYSTEM_END = "\n<!-- /openclaw:attempt:"


def is_internal(text: str) -> bool:
    """Whether a user text is the ephemeral context that OpenClaw puts last and never keeps."""
    return text.startswith(INTERNAL_CONTEXT)


def is_summary(text: str) -> bool:
    """Whether a user text stands for history that was taken out."""
    return text.startswith(_SUMMARIES)


def clean(text: str) -> str:
    """A user text as it was typed: without timestamp, `Runtime:` line and the frames of a retry, of which some leave
    nothing. A wake-up gets the short name under which later requests show it."""
    if "Runtime: " in text[-_TAIL_CHARS:]:
        text = _RUNTIME.sub("", text).rstrip("\n")
    if text.startswith("["):
        text = _unframed(_STAMP.sub("", text))
    if text.startswith(_CONTINUE) or (text.startswith(_ABORTED[0]) and text.rstrip().endswith(_ABORTED[1])):
        return ""
    return _wake(text) or text


def _unframed(text: str) -> str:
    for _ in range(_FRAMES):
        if not text.startswith(_QUEUED):
            break
        text = text.partition("\n")[2].partition(f"\n\n{_CONTINUE}")[0]
    return text


def _wake(text: str) -> str:
    """The name of the wake-up that a prompt is, or an empty string."""
    if text.startswith(_WAKE_OPENINGS):
        return next(name for opening, name in _WAKES if text.startswith(opening))
    # A heartbeat's prompt may be the user's own; the clock under it is OpenClaw's.
    clocked = "Current time: " in text[-_CLOCK_TAIL_CHARS:] and _CLOCK.search(text, max(0, len(text) - _TAIL_CHARS))
    return HEARTBEAT if clocked and not text.startswith((SCHEDULED, MEMORY_FLUSH)) else ""


def runtime_line(texts: Iterable[str], *, system: str = "") -> str:
    """The first `Runtime:` line that ends one of `texts`, else the one at the end of a system prompt, else nothing."""
    for text in texts:
        found = _RUNTIME.search(text, max(0, len(text) - _TAIL_CHARS)) if "Runtime: " in text else None
        if found:
            return found.group().lstrip("\n")
    at = system.rfind("\nRuntime: ")
    return "" if at < 0 else runtime_line([system[at:].partition(_SYSTEM_END)[0].rstrip("\n")])


def session_id(runtime: str) -> str:
    """The `sessionId` of a `Runtime:` line, or an empty string."""
    found = _SESSION_ID.search(runtime)
    return found.group(1) if found else ""


def session_key(runtime: str) -> str:
    """The `session` of a `Runtime:` line without the agent's name, e.g. `main` or `subagent:1c81d855`."""
    found = _SESSION_KEY.search(runtime)
    return re.sub(r"\Aagent:[^:]*:", "", found.group(1)) if found else ""
