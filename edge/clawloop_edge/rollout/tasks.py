"""The tasks of a rollout: one JSON object a line. A line that is no task is named by its number; the others go on.

Whatever keys a task has are data: nothing here or behind it makes names of tables or columns of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from clawloop_shared.errors import ConfigError

Json = dict[str, Any]
MAX_TASK_BYTES = 64 << 10
"""what the edge takes as a trajectory's metadata, and what fits into an environment variable"""
ANSWERS = ("answer", "answer_regex", "ground_truth", "reward_model")
"""where a task may say what is right"""
_MAX_NAME_CHARS = 200


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One line. `key` is a hash of all that it says, so that a task that was changed is another one."""

    key: str
    name: str
    line: int
    fields: Json

    def told(self, hidden: Collection[str]) -> Json:
        """What an agent is told: all fields but those that are `hidden`."""
        return {name: value for name, value in self.fields.items() if name not in hidden}


class BrokenLine(msgspec.Struct, frozen=True):
    """A line that is no task, and why."""

    line: int
    reason: str


def read_tasks(path: Path) -> tuple[list[Task], list[BrokenLine]]:
    """The tasks of a file in its order, and the lines that are none. Empty lines are left out.

    Raises:
        ConfigError: the file cannot be read, or has no task at all.
    """
    tasks: dict[str, Task] = {}
    names: dict[str, int] = {}
    broken: list[BrokenLine] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            task = _task(line, number)
            if task.name in names:
                raise ValueError(f"its id is that of line {names[task.name]}; give it another")
            if task.key in tasks:
                raise ValueError(f"it is the same as line {tasks[task.key].line}; a task is run --n times already")
        except ValueError as error:
            broken.append(BrokenLine(number, str(error)))
            continue
        tasks[task.key] = task
        names[task.name] = number
    if not tasks:
        first = f"; line {broken[0].line}: {broken[0].reason}" if broken else ""
        raise ConfigError(f"{path} has no task; a task is one JSON object a line{first}")
    return list(tasks.values()), broken


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"cannot read the tasks {path}: {error.strerror}") from error


def _task(line: bytes, number: int) -> Task:
    """One line. Raises ValueError: it is no task."""
    if len(line) > MAX_TASK_BYTES:
        raise ValueError(f"it has {len(line)} bytes; {MAX_TASK_BYTES} at most, so name larger things by a file")
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {str(error).removeprefix('JSON is malformed: ')}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"it is no JSON object, but {type(fields).__name__}")
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if not isinstance(prompt, str | None):
        raise ValueError("its prompt is no text")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise ValueError("its messages are no list of objects")
    name = fields.get("id", f"line {number}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError("its id is neither a text nor a whole number")
    name = str(name)
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise ValueError(f"its id must be 1 to {_MAX_NAME_CHARS} printable characters")
    key = hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:32]
    return Task(key=key, name=name, line=number, fields=fields)
