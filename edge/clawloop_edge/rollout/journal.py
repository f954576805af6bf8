"""What a rollout has done so far: one JSON event a line, each on disk before the next thing is done.

A crash can tear the last line alone; it is cut off when the journal is opened again. One process writes it at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.lock import FileLock
from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.files import sync_folder

JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "rollout.lock"


class Ending(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    """by itself, exit code 0"""
    EXIT_CODE = "exit code"
    """by itself, with another one"""
    SIGNAL = "signal"
    """killed by a signal that was not ours"""
    TIMEOUT = "timeout"
    """it took too long, and was killed"""
    NOT_STARTED = "not started"
    """there is no such program, or it may not be run"""
    NO_CALL = "no call"
    """it ended well, and never called the model"""
    REFUSED = "refused"
    """the edge would not take its task"""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What must stay as it was for a rollout to go on."""

    agent: str
    n: int
    channel: str
    scorers: list[str]
    shell: bool = False
    tell_answer: bool = False
    failed_reward: float | None = None
    seed: int | None = None


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """The first event."""

    rollout_id: str
    settings: Settings


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """A run has its trajectory, and its agent is about to start."""

    run: str
    trajectory_id: str
    group: str


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """Its agent is gone, and its trajectory completed. `told` is the reward that the agent printed, if it did."""

    run: str
    trajectory_id: str
    ending: Ending
    detail: str = ""
    seconds: float = 0.0
    steps: int = 0
    told: float | None = None


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One judgement of a run. Without `step_id` it is of the whole trajectory."""

    source: str
    value: float
    weight: float = 1.0
    comment: str = ""
    step_id: str = ""


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored"):
    """Its judgements are with the edge. `problem` says why one that was asked for is missing."""

    run: str
    scores: list[Score]
    problem: str = ""


Event = Opened | Begun | Ended | Scored


class Journal:
    """The events of one rollout."""

    def __init__(self, folder: Path, lock: FileLock, events: list[Event]) -> None:
        self.folder, self._lock = folder, lock
        self._path = folder / JOURNAL_NAME
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._begun: dict[str, Begun] = {}
        self._ended: dict[str, Ended] = {}
        self._scored: dict[str, Scored] = {}
        for event in events:
            self._take(event)

    @classmethod
    def open(cls, folder: Path, opened: Opened, *, resume: bool) -> Self:
        """The journal of `folder`, begun anew or (with `resume`) as it was left.

        Raises:
            ConfigError: there is one already, or none to go on with, it was begun with other settings, or another
                rollout writes it now.
            StorageError: it is damaged, or cannot be written.
        """
        path = folder / JOURNAL_NAME
        if path.exists() != resume:
            there = f"{folder} holds a rollout already; go on with it by --resume, or name another --out"
            raise ConfigError(there if not resume else f"{folder} holds no rollout to go on with; leave --resume out")
        try:
            lock = FileLock.acquire(folder / LOCK_NAME)
        except PoolError as error:
            raise ConfigError(f"another rollout writes to {folder} now; wait for it, or name another --out") from error
        try:
            events = _read(path) if resume else []
            found = cls(folder, lock, events)
            if not events:
                found.append(opened)
                sync_folder(folder)
        except BaseException:
            lock.release()
            raise
        before = found.opened.settings
        if before != opened.settings:
            found.close()
            different = _difference(before, opened.settings)
            raise ConfigError(
                f"this rollout was begun with other settings: {different}; give those again, or name another --out"
            )
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others open it."""
        os.close(self._handle)
        self._lock.release()

    def append(self, event: Event) -> None:
        """Keep an event; it is on disk on return.

        Raises:
            StorageError: it could not be written.
        """
        try:
            os.write(self._handle, msgspec.json.encode(event) + b"\n")
            os.fsync(self._handle)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
        self._take(event)

    @property
    def ended(self) -> Mapping[str, Ended]:
        """Runs whose agent is gone, by name."""
        return self._ended

    @property
    def scored(self) -> Mapping[str, Scored]:
        """Runs that are done, by name."""
        return self._scored

    @property
    def left(self) -> list[Begun]:
        """What was begun and never ended: its agents died with the rollout, or live on without it."""
        return [begun for run, begun in self._begun.items() if run not in self._ended]

    def _take(self, event: Event) -> None:
        match event:
            case Opened():
                self.opened = event
            case Begun():
                self._begun[event.run] = event
            case Ended():
                self._ended[event.run] = event
            case Scored():
                self._scored[event.run] = event


def _read(path: Path) -> list[Event]:
    """The events of a journal; a torn last line is cut off.

    Raises:
        StorageError: another line is damaged, or it does not begin as a journal does.
    """
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    decoder = msgspec.json.Decoder(Event)
    events: list[Event] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            events.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise StorageError(f"{path}: line {number} is damaged ({error}); begin anew with another --out") from error
    if events and not isinstance(events[0], Opened):
        raise StorageError(f"{path}: it does not begin as a journal does; begin anew with another --out")
    return events


def _difference(before: Settings, now: Settings) -> str:
    pairs = ((name, getattr(before, name), getattr(now, name)) for name in Settings.__struct_fields__)
    return ", ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in pairs if old != new)
