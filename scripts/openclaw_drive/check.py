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
MAIN, HEARTBEAT, COMPACTION, TITLE = "main", "heartbeat", "compaction", "title"
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
Decode = Callable[[Sequence[int]], str]


class Signal(msgspec.Struct, frozen=True, kw_only=True):
    """A judgement of a step, a run or a session, as `explain` tells it."""

    signal_id: str
    target_id: str
    source: str
    value: float
    comment: str = ""


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
    signals: list[Signal] = []
    max_abs_difference: float | None = None
    reference_difference: float | None = None


@dataclass(frozen=True)
class Talk:
    """One conversation as it was driven: by which `part` of the drive, its turns, and the kinds of what OpenClaw was
    made to ask the model there by itself."""

    part: str
    turns: tuple[Turn, ...]
    asides: frozenset[str] = frozenset()
    scripted: bool = False

    @property
    def name(self) -> str:
        """What the drive calls it."""
        return self.turns[0].session_key

    @property
    def session_id(self) -> str:
        """OpenClaw's own name of the conversation."""
        return self.turns[0].session_id


@dataclass(frozen=True)
class Conversation:
    """A talk from both sides: OpenClaw's transcript, and the steps of its session."""

    talk: Talk
    transcript: Transcript
    steps: tuple[Kept, ...]

    @property
    def main(self) -> list[Kept]:
        """The steps of the main line."""
        return [step for step in self.steps if step.kind == MAIN]


@dataclass(frozen=True)
class Finding:
    """One thing that must hold, and what is against it."""

    name: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.problems


def check_all(
    conversations: Sequence[Conversation], apart: Sequence[Kept] = (), *, decode: Decode, end: str
) -> list[Finding]:
    """Every check of kept steps; `apart` are those of no conversation. `end` is the text of the model's end token."""
    sampled = [*apart, *(step for c in conversations if not c.talk.scripted for step in c.steps)]
    steps = [*apart, *(step for c in conversations for step in c.steps)]
    pairs = [pair for c in conversations for pair in _pairs(c)]
    return [
        _finding("every answer OpenClaw got is a step of its conversation's session", map(_missing, conversations)),
        _finding("one session a conversation, and no other", _sessions(conversations)),
        _finding("one run a user turn", map(_runs, conversations)),
        _finding("user turns are the main line, a heartbeat is not", (_kind(s, said) for s, said in pairs)),
        _finding(
            "what else OpenClaw asks is a side request of its kind", [*map(_asides, conversations), *map(_title, apart)]
        ),
        _finding("each session's main line is one tree", map(_tree, conversations)),
        _finding("each prompt has its parent's reply by the ids that were sampled", map(_spliced, conversations)),
        _finding("response ids decode to the text that was kept", (_decodes(s, decode) for s in steps)),
        _finding("and to what OpenClaw stored", (_delivered(s, said, decode=decode, end=end) for s, said in pairs)),
        _finding("as many logprobs as ids, each finite and at most 0", map(_logprobs, steps)),
        _finding(f"teacher-forced logprobs equal the kept ones within {MAX_DIFFERENCE:g}", map(_rescored, sampled)),
        _finding("and so do those of transformers and torch", map(_referenced, sampled)),
        _finding("sampled turns are all trainable, nothing else is", _trainable(conversations, apart)),
    ]


def check_tool_loop(conversations: Sequence[Conversation], part: str, *, word: str) -> Finding:
    """Some conversation of `part` has a step that calls a tool, its result with `word`, and the run's next step."""
    found = any(_has_tool_loop(c, word) for c in conversations if c.talk.part == part)
    return Finding(f"a real tool loop: {part}", () if found else (f"no tool gave {word!r} between two steps of a run",))


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
        return f"{conversation.talk.name}: OpenClaw has no answer on record"
    return f"{conversation.talk.name}: not kept: {', '.join(lost)}" if lost else ""


def _sessions(conversations: Sequence[Conversation]) -> list[str]:
    names = [c.talk.session_id for c in conversations]
    problems = [] if len(set(names)) == len(names) else [f"OpenClaw gave one id to several conversations: {names}"]
    for c in conversations:
        wanted = c.talk.session_id
        strange = {step.session_id for step in c.steps} - {wanted}
        split = {turn.session_id for turn in c.talk.turns} - {wanted}
        if strange or split:
            problems.append(f"{c.talk.name}: expected session {wanted} alone, found also {sorted(strange | split)}")
    return problems


def _runs(conversation: Conversation) -> str:
    """A turn may be two where OpenClaw got no answer that it could show (nothing, or a call that is no JSON): it asks
    for one under a new trace id, and may give up."""
    theirs: dict[str, set[str]] = {}
    for step, said in _pairs(conversation):
        if not said.heartbeat:
            theirs.setdefault(said.run_id, set()).add(step.run_id)
    turns, failed = len(conversation.talk.turns), sum(turn.failed for turn in conversation.talk.turns)
    ours = {step.run_id for step in conversation.main}
    beside = ours & {step.run_id for step in conversation.steps if step.kind != MAIN}
    apart = sum(map(len, theirs.values())) == len(set().union(*theirs.values())) and not beside
    split = sum(len(runs) > 1 for runs in theirs.values())
    spoiled = sum(map(_spoiled, conversation.main))
    enough = turns - failed <= len(theirs) <= turns and (failed or turns <= len(ours) <= turns + spoiled)
    if apart and split <= failed + spoiled and enough:
        return ""
    return (
        f"{conversation.talk.name}: {turns} turns ({failed} failed), {len(theirs)} runs of OpenClaw's, {len(ours)} kept"
    )


def _spoiled(step: Kept) -> bool:
    """Whether a step began a tool call and wrote none that can be read."""
    found = _CALL.search(step.text)
    try:
        return "<tool_call>" in step.text and not (found and json.loads(found.group(1)))
    except json.JSONDecodeError:
        return True


def _kind(step: Kept, said: Said) -> str:
    wanted = HEARTBEAT if said.heartbeat else MAIN
    found = (step.app, step.kind)
    return "" if found == ("openclaw", wanted) else f"{step.step_id}: expected {wanted}, found {', '.join(found)}"


def _asides(conversation: Conversation) -> str:
    found = {step.kind for step in conversation.steps} - {MAIN}
    wanted = set(conversation.talk.asides)
    return "" if found == wanted else f"{conversation.talk.name}: expected {sorted(wanted)}, found {sorted(found)}"


def _title(step: Kept) -> str:
    return "" if (step.app, step.kind) == ("openclaw", TITLE) else f"{step.step_id}: no conversation's, {step.kind}"


def _tree(conversation: Conversation) -> str:
    """One step without a parent, the first; every other one continues an earlier one. That may be a heartbeat, whose
    answer OpenClaw keeps in the history, but nothing that was asked beside the conversation."""
    ids: set[str] = set()
    orphans = []
    for step in conversation.steps:
        if step.kind not in (MAIN, HEARTBEAT):
            continue
        if step.parent_id not in (ids or {""}):
            orphans.append(f"{step.step_id} has the parent {step.parent_id or '(none)'}")
        ids.add(step.step_id)
    return f"{conversation.talk.name}: {'; '.join(orphans)}" if orphans else ""


def _spliced(conversation: Conversation) -> str:
    """Not so where a summary has taken the place of the parent's reply."""
    summarised = {said.response_id for said in conversation.transcript.said if said.summarised}
    replies = {step.step_id: step.response_ids for step in conversation.steps}
    anew = [
        step.step_id
        for step in conversation.main
        if step.parent_id in replies and step.step_id not in summarised
        if not _contains(step.prompt_ids, replies[step.parent_id])
    ]
    return f"{conversation.talk.name}: encoded anew: {', '.join(anew)}" if anew else ""


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids) - len(part) + 1))


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


def _trainable(conversations: Sequence[Conversation], apart: Sequence[Kept]) -> list[str]:
    wanted = [(step, step.kind == MAIN and not c.talk.scripted) for c in conversations for step in c.steps]
    wanted += [(step, False) for step in apart]
    return [f"{s.step_id}: {s.untrainable or 'trainable'}" for s, may in wanted if s.trainable is not may]


def _has_tool_loop(conversation: Conversation, word: str) -> bool:
    results = {r.call_id for r in conversation.transcript.results if word in r.text and not r.is_error}
    pairs = _pairs(conversation)
    for (step, said), (following, _) in pairwise(pairs):
        called = any(call.call_id in results for call in said.calls)
        if called and following.run_id == step.run_id and following.parent_id == step.step_id:
            return True
    return False
