"""What must hold of kept steps, as plain functions on values: OpenClaw's own transcript against the edge's words.

Nothing of the edge's code is used here; texts are decoded with the tokenizer file of the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from openclaw_drive.agent import Turn
from openclaw_drive.transcript import Said, Transcript

MAX_DIFFERENCE = 1e-3
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
Decode = Callable[[Sequence[int]], str]


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A step as `clawloop-edge explain STEP --json` tells it.

    The differences (nats) between kept and teacher-forced logprobs: `max_abs_difference` is the edge's own word
    (`--rescore`), `reference_difference` that of transformers and torch. A scripted step has neither.
    """

    step_id: str
    session_id: str
    run_id: str
    parent_id: str
    kind: str
    app: str
    trainable: bool
    untrainable: str
    temperature: float
    adapter_version: int
    text: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_logprobs: list[float]
    max_abs_difference: float | None = None
    reference_difference: float | None = None


@dataclass(frozen=True)
class Conversation:
    """One conversation from both sides: the turns driven, OpenClaw's transcript, and the steps of its session."""

    name: str
    turns: tuple[Turn, ...]
    transcript: Transcript
    steps: tuple[Kept, ...]
    scripted: bool = False

    @property
    def session_id(self) -> str:
        """OpenClaw's own name of the conversation."""
        return self.turns[0].session_id


@dataclass(frozen=True)
class Finding:
    """One thing that must hold, and what is against it."""

    name: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.problems


def check_all(conversations: Sequence[Conversation], *, decode: Decode, end: str) -> list[Finding]:
    """Every check of kept steps. `end` is the text of the model's end token."""
    sampled = [step for c in conversations if not c.scripted for step in c.steps]
    steps = [step for c in conversations for step in c.steps]
    pairs = [pair for c in conversations for pair in _pairs(c)]
    return [
        _finding("every answer OpenClaw got is a step of its conversation's session", map(_missing, conversations)),
        _finding("one session a conversation, and no other", _sessions(conversations)),
        _finding("one run a user turn", map(_runs, conversations)),
        _finding("steps are OpenClaw's main line", map(_main_line, steps)),
        _finding("response ids decode to the text that was kept", (_decodes(s, decode) for s in steps)),
        _finding("and to what OpenClaw stored", (_delivered(s, said, decode=decode, end=end) for s, said in pairs)),
        _finding("as many logprobs as ids, each finite and at most 0", map(_logprobs, steps)),
        _finding(f"teacher-forced logprobs equal the kept ones within {MAX_DIFFERENCE:g}", map(_rescored, sampled)),
        _finding("and so do those of transformers and torch", map(_referenced, sampled)),
        _finding("sampled steps are trainable, scripted ones are not", _trainable(conversations)),
    ]


def check_tool_loop(conversations: Sequence[Conversation], word: str) -> Finding:
    """Some conversation has a step that calls a tool, its result with `word`, and the next step of the same run."""
    found = any(_has_tool_loop(conversation, word) for conversation in conversations)
    return Finding("a real tool loop", () if found else (f"no tool gave {word!r} between two steps of one run",))


def split_calls(text: str) -> tuple[str, list[tuple[str, object]]]:
    """What a reply's text says besides calls, and its calls as (name, arguments). An unreadable call is text."""
    calls: list[tuple[str, object]] = []

    def take(match: re.Match[str]) -> str:
        try:
            call = json.loads(match[1])
            calls.append((call["name"], call.get("arguments", {})))
        except (json.JSONDecodeError, KeyError):
            return match[0]
        return ""

    return _CALL.sub(take, text).strip(), calls


def _finding(name: str, problems: Iterable[str]) -> Finding:
    return Finding(name, tuple(filter(None, problems)))


def _pairs(conversation: Conversation) -> list[tuple[Kept, Said]]:
    by_id = {step.step_id: step for step in conversation.steps}
    return [(by_id[s.response_id], s) for s in conversation.transcript.said if s.response_id in by_id]


def _missing(conversation: Conversation) -> str:
    kept = {step.step_id for step in conversation.steps}
    lost = [s.response_id or "(no id)" for s in conversation.transcript.said if s.response_id not in kept]
    if not conversation.transcript.said:
        return f"{conversation.name}: OpenClaw has no answer on record"
    return f"{conversation.name}: not kept: {', '.join(lost)}" if lost else ""


def _sessions(conversations: Sequence[Conversation]) -> list[str]:
    names = [c.session_id for c in conversations]
    problems = [] if len(set(names)) == len(names) else [f"OpenClaw gave one id to several conversations: {names}"]
    for c in conversations:
        strange = {step.session_id for step in c.steps} - {c.session_id}
        split = {turn.session_id for turn in c.turns} - {c.session_id}
        if strange or split:
            problems.append(f"{c.name}: expected session {c.session_id} alone, found also {sorted(strange | split)}")
    return problems


def _runs(conversation: Conversation) -> str:
    """A turn that OpenClaw gave up may be two: it tries again under a new trace id after an answer without content."""
    theirs: dict[str, set[str]] = {}
    for step, said in _pairs(conversation):
        theirs.setdefault(said.run_id, set()).add(step.run_id)
    turns, failed = len(conversation.turns), sum(turn.failed for turn in conversation.turns)
    ours = {step.run_id for step in conversation.steps}
    apart = sum(map(len, theirs.values())) == len(set().union(*theirs.values()))
    split = sum(len(runs) > 1 for runs in theirs.values())
    if apart and split <= failed and turns - failed <= len(theirs) <= turns and (failed or len(ours) == turns):
        return ""
    return f"{conversation.name}: {turns} turns ({failed} failed), {len(theirs)} runs of OpenClaw's, {len(ours)} kept"


def _main_line(step: Kept) -> str:
    return "" if (step.app, step.kind) == ("openclaw", "main") else f"{step.step_id}: {step.app}, {step.kind}"


def _decodes(step: Kept, decode: Decode) -> str:
    return "" if decode(step.response_ids) == step.text else f"{step.step_id}: its ids decode to another text"


def _delivered(step: Kept, said: Said, *, decode: Decode, end: str) -> str:
    content, calls = split_calls(decode(step.response_ids).removesuffix(end))
    if content != said.text.strip():
        return f"{step.step_id}: OpenClaw stored another text"
    if calls != [(call.name, call.arguments) for call in said.calls]:
        return f"{step.step_id}: OpenClaw stored other tool calls"
    return ""


def _logprobs(step: Kept) -> str:
    if len(step.response_logprobs) != len(step.response_ids) or not step.response_ids:
        return f"{step.step_id}: {len(step.response_ids)} ids, {len(step.response_logprobs)} logprobs"
    wrong = [p for p in step.response_logprobs if not math.isfinite(p) or p > 1e-4]
    return f"{step.step_id}: logprobs {wrong}" if wrong else ""


def _rescored(step: Kept) -> str:
    return _too_far(step, step.max_abs_difference)


def _referenced(step: Kept) -> str:
    if step.adapter_version:
        return f"{step.step_id}: sampled by adapter {step.adapter_version}, but none was ever installed"
    return _too_far(step, step.reference_difference)


def _too_far(step: Kept, difference: float | None) -> str:
    if difference is None or not difference <= MAX_DIFFERENCE:
        return f"{step.step_id}: largest difference {difference}"
    return ""


def _trainable(conversations: Sequence[Conversation]) -> list[str]:
    steps = [(c.scripted, step) for c in conversations for step in c.steps]
    return [f"{s.step_id}: {s.untrainable or 'trainable'}" for scripted, s in steps if s.trainable is scripted]


def _has_tool_loop(conversation: Conversation, word: str) -> bool:
    results = {r.call_id for r in conversation.transcript.results if word in r.text and not r.is_error}
    pairs = _pairs(conversation)
    for (step, said), (following, _) in pairwise(pairs):
        called = any(call.call_id in results for call in said.calls)
        if called and following.run_id == step.run_id and following.parent_id == step.step_id:
            return True
    return False
