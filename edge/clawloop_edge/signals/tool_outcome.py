"""How a step's tool calls came out, read off their results. Pure but for the Protocol's shape.

A call that failed speaks against the step that made it, and so does one that the run has made before, word for word.
That calls worked says little, and is said once a run: else an agent could live on cheap calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.sessions.tree import text_of, user_texts
from clawloop_edge.signals.protocol import Case, Moment, Verdict

if TYPE_CHECKING:
    from clawloop_edge.pool.records import Json
    from clawloop_edge.signals.settings import ToolOutcomeSettings

_LOOKED_AT_CHARS = 2_000
"""of the head and of the tail of a result: there tools say how it went"""
_TAIL = re.compile(
    r"(?:command|process) (?:exited with code|timed out|aborted|failed)(?: ?:? ?(?P<code>-?\d{1,6}))?[^\n]{0,200}\Z",
    re.I,
)
_CODE = re.compile(r"\A\s*\W{0,4}(?:exit[ _]?code|return ?code|exit status)\W{1,3}(?P<code>-?\d{1,6})\b", re.I)
_HEAD = re.compile(
    r"\A\s*(?:\[?(?:error|fatal|exception|panic|failed|failure)\b\]?\s*[:\-\n]|Traceback \(most recent call last\)"
    r"|(?:tool|call|request|operation|command)[\w ]{0,40} (?:timed out|failed)\b|timed out\b|error\s*\Z)",
    re.I,
)
_CODE_KEYS = ("exitCode", "exit_code", "returncode", "return_code")
_STATUS_BAD = frozenset({"error", "failed", "failure", "timeout", "timed_out", "aborted"})


class ToolOutcomeScorer:
    """Judges steps whose tool results are there."""

    name = "tool-outcome"
    moments = frozenset({Moment.CONTINUED})

    def __init__(self, settings: ToolOutcomeSettings) -> None:
        self._settings = settings

    async def score(self, case: Case) -> list[Verdict]:
        """What the results say; no verdict where there are none."""
        results = [message for message in case.following if message.get("role") == "tool"]
        if not results:
            return []
        troubles = [trouble for result in results if (trouble := trouble_in(text_of(result.get("content"))))]
        if troubles:
            evidence = f"{len(troubles)} of {len(results)} tool results: {troubles[0]}"
            return [Verdict(value=-1.0, weight=self._settings.failed, evidence=evidence)]
        run = _this_run(case.answer.messages)
        if self._is_repeated(case.answer.reply, run):
            evidence = "the same tool call with the same arguments as before in this run"
            return [Verdict(value=-1.0, weight=self._settings.repeated, evidence=evidence)]
        if any(_worked(message) for message in run):
            return []
        return [Verdict(value=1.0, weight=self._settings.worked, evidence="the first tool call of its run that worked")]

    async def close(self) -> None:
        """Nothing is open."""

    @staticmethod
    def _is_repeated(reply: Json, run: Sequence[Json]) -> bool:
        made = {call for message in run for call in _calls(message)}
        return not made.isdisjoint(_calls(reply))


def trouble_in(text: str) -> str:
    """What a tool's result says went wrong, in our words; empty if nothing."""
    stripped = text.strip()
    if stripped[:1] == "{" and len(text) < 100 * _LOOKED_AT_CHARS:
        found = _trouble_in_json(stripped)
        if found is not None:
            return found
    head, tail = stripped[:_LOOKED_AT_CHARS], stripped[-_LOOKED_AT_CHARS:]
    for match in (_TAIL.search(tail), _CODE.search(head)):
        if match is not None:
            code = match["code"]
            if code is None:
                return "timed out" if "timed" in match[0].lower() else "failed"
            return "" if int(code) == 0 else f"exit code {int(code)}"
    match = _HEAD.search(head)
    if match is None:
        return ""
    return "timed out" if "timed out" in match[0].lower() else "error"


def _trouble_in_json(text: str) -> str | None:
    """The same for a result that is a JSON object; None if it is none, or says neither the one nor the other."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    code = next((value[key] for key in _CODE_KEYS if isinstance(value.get(key), int)), None)
    if code is not None and not isinstance(code, bool):
        return f"exit code {code}" if code else ""
    if value.get("timedOut") is True or value.get("timed_out") is True:
        return "timed out"
    bad_status = str(value.get("status", "")).lower() in _STATUS_BAD
    if value.get("error") or bad_status or value.get("isError") is True or value.get("is_error") is True:
        return "error"
    return "" if value.get("ok") is True or value.get("success") is True else None


def _this_run(messages: Sequence[Json]) -> Sequence[Json]:
    """The messages since the user last spoke."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at].get("role") == "user" and user_texts(messages[at].get("content")):
            return messages[at + 1 :]
    return messages


def _worked(message: Json) -> bool:
    return message.get("role") == "tool" and not trouble_in(text_of(message.get("content")))


def _calls(message: Json) -> list[tuple[str, bytes]]:
    """Name and arguments of each call of an assistant's message."""
    calls = message.get("tool_calls") or [] if message.get("role") == "assistant" else []
    functions = [call.get("function") or {} for call in calls]
    return [(str(each.get("name", "")), _canonical(each.get("arguments"))) for each in functions]


def _canonical(arguments: object) -> bytes:
    """Arguments without spacing and order of keys; what is no JSON stays as it is."""
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
        return msgspec.json.encode(value, order="sorted")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return str(arguments).encode("utf-8", "surrogatepass")
