"""Rows of other programs' formats, made of chosen steps: conversations, TRL's prompt-completion and preference, verl's
tasks. They hold text, and no tokens. Fields and sources: docs/formats/export.md.

One session is in memory at a time; answers that may make a pair wait on the disk, as blind tags, rewards and ids.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from clawloop_edge.pool.codec import to_json
from clawloop_edge.pool.picking import PickedPool, Seen
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Json, KeptStep, StepLine
from clawloop_edge.sessions.tree import text_of

TAKEN_OUT = "steps that you took out of training"
REWRITTEN = "answers whose conversation was rewritten in their midst"
ALIKE = "pairs of answers that say the same"
WITH_CALLS = "tasks whose prompt has tool calls, for which verl has no column"
_MAIN = "main"
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a trajectory's caller said of its task; empty where nothing was said."""

    data_source: str = ""
    ability: str = ""
    ground_truth: str = ""


TaskOf = Callable[[Reading, str], Task]
"""of a trajectory's id"""


def no_task(_reading: Reading, _trajectory_id: str) -> Task:
    """A `TaskOf` that knows of none."""
    return Task()


@dataclass(frozen=True)
class Session:
    """A session in one snapshot: all of its steps in order, and what is known of those that were chosen."""

    session_id: str
    reading: Reading
    lines: list[StepLine]
    seen: dict[str, Seen]

    def kept(self) -> Iterator[KeptStep]:
        """The chosen steps, in the order in which they were kept."""
        for kept in self.reading.session_steps(self.session_id):
            if kept.step.step_id in self.seen:
                yield kept


class Answer(NamedTuple):
    """What a trajectory answered: its first and its last chosen main-line step."""

    seen: Seen
    first: KeptStep
    last: KeptStep


@dataclass
class Tally:
    """Counts what went into an export, and why something did not."""

    progress: Callable[[int], None]
    steps: int = 0
    sessions: int = 0
    signals: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def count(self, sessions: Iterable[Session]) -> Iterator[Session]:
        """The sessions without the steps that their owner took out of training."""
        for session in sessions:
            seen = {name: each for name, each in session.seen.items() if each.curated.trainable is not False}
            self.left_out[TAKEN_OUT] += len(session.seen) - len(seen)
            if seen:
                self.sessions += 1
                self.steps += len(seen)
                self.signals += len({signal.signal_id for each in seen.values() for signal in each.signals})
                yield replace(session, seen=seen)
                self.progress(self.steps)


def chats(sessions: Iterable[Session]) -> Iterator[Json]:
    """A row for each conversation, as far as the last chosen step on each of its branches."""
    for session in sessions:
        inner = _ancestors(session)
        for kept in session.kept():
            if kept.step.step_id not in inner and kept.messages:
                yield {"messages": messages_of([*kept.messages, kept.reply])} | _tools(kept)


def _ancestors(session: Session) -> set[str]:
    """The steps that a chosen one goes on from, directly or not: it repeats what they said."""
    parents = {line.step_id: line.parent_id for line in session.lines}
    found = set[str]()
    for step_id in session.seen:
        above = parents[step_id]
        while above in parents and above not in found:
            found.add(above)
            above = parents[above]
    return found


def completions(sessions: Iterable[Session]) -> Iterator[Json]:
    """A row for each step: TRL's prompt-completion."""
    for session in sessions:
        for kept in session.kept():
            if kept.messages:
                said = {"prompt": messages_of(kept.messages), "completion": messages_of([kept.reply])}
                yield said | _tools(kept)


def preferences(pool: PickedPool, sessions: Iterable[Session], *, margin: float, tally: Tally) -> Iterator[Json]:
    """A row for each pair of answers in one group, or else to one prompt, whose rewards are `margin` apart: TRL's
    preference. The best goes with the worst, the next best with the next worst; each answer is in one pair at most."""
    with closing(sqlite3.connect("")) as database:  # a file without a name, that only this process can read
        database.execute("CREATE TABLE answers (key BLOB, reward REAL, first TEXT, last TEXT)")
        for session in sessions:
            rows = [_row_of(pool, answer) for answer in _answers(session) if answer.seen.reward is not None]
            database.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows)
        found = database.execute("SELECT key, reward, first, last FROM answers ORDER BY key, reward DESC, first")
        for _, group in groupby(found, key=itemgetter(0)):
            for good, bad in _pairs(list(group), margin=margin):
                with pool.reading() as reading:
                    row = _preference(reading, good[2:], bad[2:], tally=tally)
                if row is not None:
                    yield row


def _row_of(pool: PickedPool, answer: Answer) -> tuple[bytes, float, str, str]:
    step, reward = answer.first.step, answer.seen.reward
    assert reward is not None
    group, prompt = step.group_id.encode("utf-8", "surrogatepass"), [answer.first.messages, answer.first.tools]
    key = pool.tag("export group", group) if group else pool.tag("export prompt", to_json(prompt))
    return key, reward.value, step.step_id, answer.last.step.step_id


def _pairs(answers: Sequence[Any], *, margin: float) -> Iterator[tuple[Any, Any]]:
    """Pairs of answers that are sorted from the best to the worst."""
    for good, bad in zip(answers[: len(answers) // 2], reversed(answers), strict=False):
        if good[1] - bad[1] < margin:
            return
        yield good, bad


def _preference(reading: Reading, good: Sequence[str], bad: Sequence[str], *, tally: Tally) -> Json | None:
    steps = [reading.kept(step_id) for step_id in (*good, *bad)]
    if any(step is None for step in steps):  # forgotten meanwhile
        return None
    first, last, other_first, other_last = (step for step in steps if step is not None)
    chosen, rejected = _completion(first, last), _completion(other_first, other_last)
    if chosen is None or rejected is None:
        tally.left_out[REWRITTEN] += 1
        return None
    if chosen == rejected:
        tally.left_out[ALIKE] += 1
        return None
    return {"prompt": messages_of(first.messages), "chosen": chosen, "rejected": rejected} | _tools(first)


def _completion(first: KeptStep, last: KeptStep) -> list[Json] | None:
    """What was said from the first step's prompt on; None if the last one's does not go on from it."""
    start = len(first.messages)
    if last.messages[:start] != first.messages:
        return None
    return messages_of([*last.messages[start:], last.reply])


def tasks(sessions: Iterable[Session], *, task_of: TaskOf, tally: Tally) -> Iterator[Json]:
    """A row for each trajectory: verl's columns."""
    index = 0
    for session in sessions:
        for answer in _answers(session):
            step = answer.first.step
            prompt = messages_of(answer.first.messages)
            if any("tool_calls" in message for message in prompt):
                tally.left_out[WITH_CALLS] += 1
                continue
            task = task_of(session.reading, step.trajectory_id) if step.trajectory_id else Task()
            reward = answer.seen.reward
            yield {
                "data_source": task.data_source or answer.first.app or "clawloop",
                "prompt": [{"role": each["role"], "content": text_of(each.get("content"))} for each in prompt],
                "ability": task.ability or "agent",
                "reward_model": {"style": "rule", "ground_truth": task.ground_truth},
                "extra_info": {
                    "split": step.channel.value,
                    "index": index,
                    "step_id": step.step_id,
                    "group_id": step.group_id,
                    "answer": text_of(answer.last.reply.get("content")),
                    "reward": reward.value if reward else None,
                    "weight": reward.weight if reward else None,
                },
            }
            index += 1


def _answers(session: Session) -> Iterator[Answer]:
    """What each trajectory of a session answered, as far as its steps were chosen."""
    found: dict[tuple[str, ...], Answer] = {}
    for kept in session.kept():
        if kept.kind != _MAIN or not kept.messages:
            continue
        step = kept.step
        key = (step.trajectory_id or step.run_id, step.group_id, step.channel)
        first = found[key].first if key in found else kept
        found[key] = Answer(session.seen[step.step_id], first, kept)
    yield from found.values()


def messages_of(messages: Iterable[Json]) -> list[Json]:
    """Messages as templates of other programs take them: parts of text are one text, arguments of calls are objects."""
    return [_message(message) for message in messages]


def _message(message: Json) -> Json:
    found = {name: message[name] for name in _FIELDS if message.get(name) not in (None, [])}
    if isinstance(found.get("content"), list) and all(_is_text(part) for part in found["content"]):
        found["content"] = text_of(found["content"])
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call) for call in found["tool_calls"]]
    else:
        found.setdefault("content", "")
    return found


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(kept: KeptStep) -> Json:
    return {"tools": kept.tools} if kept.tools else {}
