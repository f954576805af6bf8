"""Scripted tool tasks: conversations with known tool results and a known right outcome, played by sampling a model.

A task says what the model is told, what each tool call returns, which calls are right and what the answer must name.
One JSON object a line; format: docs/training.md. Knows no adapter and makes no decision (release/gate.py does).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from clawloop_server.trainer.generation import Reply
from clawloop_shared.errors import ConfigError

_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_MARK = re.compile(r"</?tool_call>")


class Call(msgspec.Struct, frozen=True):
    """A tool call: which tool, with which arguments."""

    name: str
    arguments: dict[str, Any]


class ToolResult(msgspec.Struct, frozen=True):
    """What a call with exactly this name and these arguments returns."""

    name: str
    arguments: dict[str, Any]
    content: str


class Expectation(msgspec.Struct, frozen=True):
    """The right outcome: exactly these calls in this order, and an answer with this word and no other of the list."""

    calls: list[Call]
    answer_names: str = ""
    answer_only_one_of: list[str] = []


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task; `messages` and `tools` are those of the first call, in OpenAI's shapes."""

    messages: list[dict[str, Any]]
    expect: Expectation
    tools: list[dict[str, Any]] = []
    tool_results: list[ToolResult] = []
    tool_result_otherwise: str = '{"error": "not found"}'
    id: str = ""

    @property
    def tool_names(self) -> set[str]:
        """The tools that may be called."""
        return {tool.get("function", tool).get("name", "") for tool in self.tools}

    def result_of(self, call: Call) -> str:
        """What `call` returns."""
        matching = (r.content for r in self.tool_results if (r.name, r.arguments) == (call.name, call.arguments))
        return next(matching, self.tool_result_otherwise)


def load_tasks(path: Path) -> list[Task]:
    """The tasks in a JSONL file.

    Raises:
        ConfigError: no such file, no task in it, or a line that is no task; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"gate tasks {path}: {error.strerror}; set [gate] tasks to a JSONL file") from error
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tasks.append(msgspec.json.decode(line, type=Task))
        except msgspec.DecodeError as error:
            raise ConfigError(f"gate tasks {path}, line {number}: {error}") from error
    if not tasks:
        raise ConfigError(f"gate tasks {path} holds no task")
    return tasks


class Renderer(Protocol):
    """The tokenizer and chat template of a model."""

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        """Prompt ids, ready for the assistant's turn."""
        ...

    def text(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        ...


class TemplateRenderer:
    """The fast tokenizer of a model folder."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        """Prompt ids, ready for the assistant's turn."""
        text = self._tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Turn:
    """A reply, read: its text outside of tool calls, its calls, and whether its form was right."""

    content: str
    calls: list[Call]
    valid: bool


def read_reply(text: str, *, stopped: bool, tool_names: set[str]) -> Turn:
    """Split a reply into text and calls. It is valid if it ended, and each call is JSON for a tool that there is."""
    calls, valid = [], stopped
    for found in _TOOL_CALL.finditer(text):
        try:
            call = msgspec.json.decode(found[1], type=Call)
        except msgspec.DecodeError:
            valid = False
            continue
        valid = valid and call.name in tool_names
        calls.append(call)
    content = _TOOL_CALL.sub("", text).strip()
    return Turn(content, calls, valid and not _MARK.search(content))


@dataclass
class Episode:
    """A task being played: the conversation so far, the calls that were made, and whether every reply was valid."""

    task: Task
    messages: list[dict[str, Any]]
    calls: list[Call] = field(default_factory=list)
    answer: str | None = None
    valid: bool = True

    @property
    def open(self) -> bool:
        """Whether the model has the word. One reply more than the right calls is what an episode may have."""
        replies = len(self.messages) - len(self.task.messages) - len(self.calls)
        return self.valid and self.answer is None and replies <= len(self.task.expect.calls)

    def take(self, turn: Turn) -> None:
        """Go on with a reply: call its tools, or end with its text as the answer."""
        self.valid = turn.valid
        if not turn.calls:
            self.answer = turn.content
            return
        calls = [
            {"id": f"call{len(self.calls) + n}", "type": "function", "function": msgspec.structs.asdict(call)}
            for n, call in enumerate(turn.calls)
        ]
        self.messages.append({"role": "assistant", "content": turn.content, "tool_calls": calls})
        for made, call in zip(calls, turn.calls, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": made["id"], "content": self.task.result_of(call)})
        self.calls += turn.calls

    @property
    def reward(self) -> float:
        """1 if the calls were the right ones and the answer names what it must and nothing else, else 0."""
        expect = self.task.expect
        if not self.valid or self.answer is None or self.calls != expect.calls:
            return 0.0
        words = set(re.findall(r"\w+", self.answer))
        named = words & {*expect.answer_only_one_of, expect.answer_names} - {""}
        return float(named == {expect.answer_names} - {""})


@dataclass(frozen=True)
class Scores:
    """Of each task (in order) and each of its samples: the reward, and whether every reply had the right form."""

    rewards: list[list[float]]
    valid: list[list[bool]]


Sampler = Callable[[Sequence[Sequence[int]], int], list[Reply]]
"""(prompts, turn from 0) -> one reply each"""


def play(tasks: Sequence[Task], sampler: Sampler, *, renderer: Renderer, samples: int) -> Scores:
    """Play every task `samples` times, all at once: one call of the sampler a turn."""
    episodes = [Episode(task, list(task.messages)) for task in tasks for _ in range(samples)]
    turn = 0
    while going := [episode for episode in episodes if episode.open]:
        prompts = [renderer.render(episode.messages, episode.task.tools) for episode in going]
        for episode, reply in zip(going, sampler(prompts, turn), strict=True):
            text = renderer.text(reply.ids)
            episode.take(read_reply(text, stopped=reply.stopped, tool_names=episode.task.tool_names))
        turn += 1
    rewards = [episode.reward for episode in episodes]
    valid = [episode.valid for episode in episodes]
    starts = range(0, len(episodes), samples)
    return Scores([rewards[at : at + samples] for at in starts], [valid[at : at + samples] for at in starts])
