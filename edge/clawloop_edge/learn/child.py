"""The process that learns: it gets a job over a pipe, tells its state after each update, and what came of it.

It ends at once when its pipe does: with its parent, or when that wants it to. It holds no key, writes no file, and what
goes wrong is told by kind and place, never by words that might quote what was learned from. `learner.MlxLearner` is the
parent's side.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.child import behave, connect, held_bytes
from clawloop_edge.errors import NotLearnable
from clawloop_edge.learn.job import Job, Learned
from clawloop_shared.errors import ClawloopError

MOST_BYTES = 8 << 30
"""of a message"""
BEAT_S = 0.25
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""of our own or of the numbers: the same comes to the same"""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """A job, the state to go on from (empty: from the start), and the bytes it may hold."""

    job: Job
    kept: bytes
    memory_bytes: int


class Held(msgspec.Struct, frozen=True, tag="held"):
    """A sign of life: what the process holds in memory, and how many updates it has done."""

    memory_bytes: int
    updates: int


class Kept(msgspec.Struct, frozen=True, tag="kept"):
    """The state after an update."""

    state: bytes


class Done(msgspec.Struct, frozen=True, tag="done"):
    """What came of the job."""

    learned: Learned


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """Why nothing can come of it; `final`: nor could it another time."""

    reason: str
    final: bool = False


Message = Held | Kept | Done | Trouble


def encode(message: Begin | Message) -> bytes:
    """As it goes over the pipe."""
    return msgspec.msgpack.encode(message, enc_hook=str)


def decode_begin(data: bytes) -> Begin:
    """The first message. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(data, type=Begin, dec_hook=_path)


def decode(data: bytes) -> Message:
    """What the child says. Raises msgspec.DecodeError."""
    message: Message = msgspec.msgpack.decode(data, type=Message)
    return message


def _path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"{kind} cannot be decoded")


class _Pipe:
    """The way to the parent; beats while work goes on."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self.updates = connection, threading.Lock(), 0
        self._own = held_bytes()

    def send(self, message: Message) -> None:
        with self._lock:
            self._connection.send_bytes(encode(message))

    def watch(self) -> None:
        """End this process when the pipe does. Nothing more is said by the parent."""
        with contextlib.suppress(EOFError, OSError):
            self._connection.recv_bytes(MOST_BYTES)
        os._exit(0)

    def beat(self) -> None:
        """Say again and again how much memory is held."""
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            try:
                self.send(Held(_held(), self.updates))
            except OSError:
                os._exit(0)


def _held() -> int:
    """What the system counts for this process, or, where MLX's memory is not in that (Metal), what MLX counts."""
    import mlx.core as mx

    return max(held_bytes(), int(mx.get_active_memory()) + int(mx.get_cache_memory()))


def main() -> None:
    """Do one job."""
    behave()
    connection = connect()
    begin = decode_begin(connection.recv_bytes(MOST_BYTES))
    pipe = _Pipe(connection)
    threading.Thread(target=pipe.watch, daemon=True).start()
    threading.Thread(target=pipe.beat, daemon=True).start()
    pipe.send(_outcome(begin, pipe))
    connection.close()
    os._exit(0)  # the threads wait for a pipe that is not read any more


def _outcome(begin: Begin, pipe: _Pipe) -> Done | Trouble:
    try:
        return Done(_learn(begin, pipe))
    except ClawloopError as error:
        return Trouble(str(error), isinstance(error, NotLearnable))
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must learn of it, and nobody else may
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"
        return Trouble(f"learning broke off in update {pipe.updates + 1}: {place}", isinstance(error, _FAULTS))


def _learn(begin: Begin, pipe: _Pipe) -> Learned:
    from clawloop_edge.learn.opening import open_job

    updates = open_job(begin.job, kept=begin.kept, memory_bytes=begin.memory_bytes)
    pipe.updates = updates.progress.at_update
    while not updates.done:
        updates.step()
        pipe.updates += 1
        pipe.send(Kept(msgspec.msgpack.encode(updates.progress)))
    return updates.result()


if __name__ == "__main__":
    main()
