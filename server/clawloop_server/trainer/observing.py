"""What training does, for those who watch it: a line an event on a file and on the trainer's output, and TensorBoard.

    {"event": "began", "round_id": .., "at_ms": .., "base_version": .., "trajectories": .., "steps": .., "updates": ..}
    {"event": "update", "round_id": .., "at_ms": .., "update": .., "reward": .., ..}      every metric of the update
    {"event": "round", "round_id": .., "at_ms": .., "state": .., "verdict": .., "reason": .., ..}

Numbers, verdicts and ids of rounds alone: no content, and no id of a session, step or trajectory. Which metrics there
are is the business of those who measure them. Nothing here can fail a round. Knows no tensor and no database.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

METRICS_FILE = "metrics.jsonl"
BOARD_FOLDER = "tensorboard"
MAX_BYTES = 16 << 20
"""of the file; a fuller one becomes `metrics.1.jsonl`, in the place of the one before it"""
TAIL_BYTES = 256 << 10
MAX_BOARD_BYTES = 64 << 20
"""of all event files together; the oldest go when the trainer starts"""

_log = logging.getLogger("clawloop.trainer")

Event = dict[str, Any]
Opened = TypeVar("Opened")


class Observer:
    """Told of rounds and updates, it tells those who watch.

    `emit` gets each event; `board` draws the metrics of updates and rounds, or is None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        emit: Callable[[Event], None] = lambda event: None,
        board: Callable[[Path, int], Board | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._folder, self._emit, self._open_board, self._clock = folder, emit, board or open_board, clock
        self._file: MetricsFile | None = _unless_broken(lambda: MetricsFile(folder / METRICS_FILE, max_bytes=max_bytes))
        self._board: Board | None = None
        self._asked_board = False
        self._round_id, self._last_s, self._update = "", clock(), 0

    def began(self, round: msgspec.Struct) -> None:
        """A round begins; `round` has its id."""
        fields = msgspec.structs.asdict(round)
        self._round_id, self._last_s = fields["round_id"], self._clock()
        self._tell("began", fields)

    def updated(self, metrics: Mapping[str, float]) -> None:
        """An update was made. Its time and tokens a second are measured here where they are not among its metrics."""
        now_s = self._clock()
        seconds, self._last_s = now_s - self._last_s, now_s
        timed = {"seconds": seconds, **metrics}
        if "tokens" in metrics and timed["seconds"] > 0:
            timed = {"tokens_per_s": metrics["tokens"] / timed["seconds"], **timed}
        self._update = int(metrics.get("update", self._update + 1))
        self._tell("update", timed)
        self._draw("train", timed)

    def ended(self, report: msgspec.Struct) -> None:
        """A round ended."""
        fields = msgspec.structs.asdict(report)
        self._tell("round", fields)
        self._draw("round", {name: value for name, value in fields.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Close what is open."""
        for opened in (self._file, self._board):
            if opened is not None:
                _close(opened)
        self._file = self._board = None

    def _tell(self, kind: str, fields: Mapping[str, Any]) -> None:
        event = {"event": kind, "round_id": self._round_id, "at_ms": time.time_ns() // 1_000_000}
        event = {**event, **{name: value for name, value in fields.items() if name not in event}}
        self._write(event)
        try:
            self._emit(event)
        except Exception as error:  # noqa: BLE001 who watches can be gone; the round has no need of them
            _log.error("an event of training cannot be told: %s", error)

    def _write(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            self._file.append(event)
        except Exception as error:  # noqa: BLE001
            # The figures are for eyes; a full disk must not stop a round that has no other need of it.
            _log.error("%s cannot be written and stays as it is until the next start: %s", METRICS_FILE, error)
            _close(self._file)
            self._file = None

    def _draw(self, group: str, values: Mapping[str, float]) -> None:
        if not self._asked_board:
            self._asked_board = True
            self._board = _unless_broken(lambda: self._open_board(self._folder / BOARD_FOLDER, self._update))
        if self._board is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{group}/{name}", value, self._update)
            self._board.flush()
        except Exception as error:  # noqa: BLE001 what the writer's thread runs into, it raises here
            _log.error("TensorBoard's files cannot be written and stay as they are until the next start: %s", error)
            self._board = None


class MetricsFile:
    """A file (0600) of one JSON object a line, only ever appended to, and bounded: a full one becomes the second file,
    in the place of the one before. A line that a crash left unfinished is cut off when it is opened.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._handle = _open_append(path)
        _cut_torn(self._handle)

    def append(self, event: Event) -> None:
        """Write one line, by one call of the system, so that others see it whole."""
        line = msgspec.json.encode(event) + b"\n"
        size = os.fstat(self._handle).st_size
        if size and size + len(line) > self._max_bytes:
            self._path.replace(second_file(self._path))
            full, self._handle = self._handle, _open_append(self._path)
            os.close(full)
        if os.write(self._handle, line) != len(line):
            _cut_torn(self._handle)
            raise OSError("the disk is full")

    def close(self) -> None:
        """Close it."""
        os.close(self._handle)


def second_file(path: Path) -> Path:
    """Where what was in the file goes when it is full."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def read_events(folder: Path, *, round_id: str = "") -> Iterator[Event]:
    """The events in the trainer's folder, oldest first; those of one round if it is named. What is no line of ours is
    passed over."""
    path = folder / METRICS_FILE
    for part in (second_file(path), path):
        try:
            lines = part.read_bytes().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            event = event_of(line)
            if event is not None and round_id in ("", event["round_id"]):
                yield event


def round_updates(folder: Path, round_id: str) -> list[Event]:
    """The updates of a round in their order. After a crash a round goes on from an update before: what was made again
    counts as it was the last time, and what came after it does not count."""
    found: list[Event] = []
    for event in read_events(folder, round_id=round_id):
        if event["event"] == "update" and isinstance(event.get("update"), int | float):
            found = [*(before for before in found if before["update"] < event["update"]), event]
    return found


def latest_events(folder: Path) -> dict[str, Event]:
    """The latest event of each kind, as far as the end of the file has one."""
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    found = (event_of(line) for line in lines)
    return {event["event"]: event for event in found if event is not None}


def event_of(line: bytes) -> Event | None:
    """The event of a line, or None if it is none. One that is of no round has an empty `round_id`."""
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        return None
    return found if isinstance(found.setdefault("round_id", ""), str) else None


def _open_append(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _cut_torn(handle: int) -> None:
    """Cut off what follows the last end of a line."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    os.ftruncate(handle, end)


class Board(Protocol):
    """What draws numbers over updates: the part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One number of one step."""

    def flush(self) -> None:
        """Write it."""

    def close(self) -> None:
        """Write it, and close the file."""


def open_board(folder: Path, first_update: int) -> Board | None:
    """A writer of TensorBoard files; None if the package `tensorboard` is not installed.

    What an earlier process drew of `first_update` and later is not shown any more: those updates are made again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    folder.mkdir(mode=0o700, exist_ok=True)
    _prune_board(folder)
    board: Board = SummaryWriter(folder, purge_step=first_update, max_queue=1000)
    return board


def _prune_board(folder: Path) -> None:
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MAX_BOARD_BYTES:
            path.unlink()


def _close(opened: MetricsFile | Board) -> None:
    try:
        opened.close()
    except Exception as error:  # noqa: BLE001
        _log.error("what training was shown with cannot be closed: %s", error)


def _unless_broken(make: Callable[[], Opened]) -> Opened | None:
    try:
        return make()
    except Exception as error:  # noqa: BLE001
        _log.error("%s; training goes on unseen until the next start", error)
        return None
