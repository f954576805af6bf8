"""Redaction in a process of its own, so that no search holds up the edge: `RedactWorker` asks, `_serve` answers.

The child is started on first use, has little claim to the CPU, and ends when its pipe does, so with its parent. What it
is asked goes through the pipe as msgpack; neither its arguments nor its environment nor any log has a part of it. It
reads this machine's known values itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import RedactionError
from clawloop_edge.privacy.redact.tokens import Redaction
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from clawloop_edge.privacy.redact.turns import TurnSearch

JOB_CPU_S = 120.0
"""a job that takes more is given up: a million tokens take some ten seconds"""
WAIT_S = 600.0
START_S = 60.0
IDLE_S = 900.0
"""after which a child that nobody asks ends"""
AGE_S = 3_600.0
"""after which it ends anyhow, so that the next one reads this machine's values afresh"""
MEMORY_BYTES = 1 << 30
_TRIES = 2
_KILL_EVERY_S = 0.05
_MAX_MESSAGE_BYTES = 256 << 20


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """What the child works with: the model's folder, the edge's home, and whether lengths are hidden."""

    folder: str
    home: str
    strict: bool = True
    job_cpu_s: float = JOB_CPU_S


class _Ids(msgspec.Struct, frozen=True, tag="ids"):
    """Redact a step; with `learn` only look for what it gives away of its session."""

    ids: list[int]
    session_id: str
    also: list[str] = []
    learn: bool = False


class _Turns(msgspec.Struct, frozen=True, tag="turns"):
    ids: list[int]


class _Text(msgspec.Struct, frozen=True, tag="text"):
    text: str
    session_id: str


class _Answer(msgspec.Struct, frozen=True, tag="answer"):
    """`texts` of what was asked, `spans` of ids that were replaced, by `reserved_id`."""

    reserved_id: int = 0
    spans: list[tuple[int, int]] = []
    texts: list[str] = []


class _Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """Why there is no answer, without content."""

    reason: str


_Job = _Ids | _Turns | _Text
_JOB, _REPLY = msgspec.msgpack.Decoder(_Job), msgspec.msgpack.Decoder(_Answer | _Trouble)


class JobFailed(RedactionError):
    """This one job cannot be done, however often it is asked for."""


class RedactWorker:
    """The parent's side. Any thread may ask; each waits for its answer."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._closed = 0
        self._connection: Connection | None = None
        self._process: BaseProcess | None = None

    @property
    def pid(self) -> int | None:
        """The child's process, if there is one."""
        return self._process.pid if self._process else None

    def learn(self, ids: Sequence[int], *, session_id: str) -> None:
        """Look for what a step gives away of its session. Raises as `redact` does."""
        self._ask(_Ids(list(ids), session_id, learn=True))

    def redact(self, ids: Sequence[int], *, session_id: str = "", also: Iterable[str] = ()) -> Redaction:
        """The ids of a step without what must not leave, and without the texts `also`.

        Raises:
            JobFailed: the search broke off at these ids, twice.
            RedactionError: the child cannot be started, or was closed meanwhile: ask again another time.
        """
        answer = self._ask(_Ids(list(ids), session_id, list(also)))
        found = list(ids)
        for start, length in answer.spans:
            found[start : start + length] = [answer.reserved_id] * length
        return Redaction(found, answer.spans)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each turn. Raises as `redact` does."""
        return self._ask(_Turns(list(ids))).texts

    def text(self, text: str, *, session_id: str = "") -> str:
        """A text without what must not leave. Raises as `redact` does."""
        return self._ask(_Text(text, session_id)).texts[0]

    def close(self) -> None:
        """End the child at once, also in the middle of a job: nothing of that is lost but the time."""
        self._closed += 1
        while not self._lock.acquire(timeout=_KILL_EVERY_S):  # somebody waits for an answer, or starts a child
            self._kill()
        try:
            self._kill()
            self._end()
        finally:
            self._lock.release()

    def _ask(self, job: _Job) -> _Answer:
        closed = self._closed
        with self._lock:
            data = msgspec.msgpack.encode(job)
            for _ in range(_TRIES):  # a child that was idle for long, or was killed, is not there any more
                if self._closed != closed:
                    break
                try:
                    reply = self._exchange(self._connection or self._start(), data, within_s=WAIT_S)
                except (EOFError, OSError):
                    self._end()
                    continue
                if isinstance(reply, _Trouble):
                    raise JobFailed(f"redaction broke off: {reply.reason}; this is left out of what leaves")
                return reply
            if self._closed != closed:
                raise RedactionError("redaction was broken off, as the edge is stopping; it is done again")
            raise JobFailed("redaction died twice of the same text; this is left out of what leaves")

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), name="clawloop-redact", daemon=True)
        try:
            self._process.start()
            other.close()
            plan = msgspec.msgpack.encode(self._plan)
            reply = self._exchange(self._connection, plan, within_s=START_S)
        except (EOFError, OSError) as error:
            self._end()
            reason = f"the process that redacts does not start ({type(error).__name__})"
            raise RedactionError(f"{reason}; nothing is redacted, so nothing leaves") from error
        if isinstance(reply, _Trouble):
            self._end()
            raise RedactionError(f"nothing can be redacted, so nothing leaves: {reply.reason}")
        return self._connection

    @staticmethod
    def _exchange(connection: Connection, data: bytes, *, within_s: float) -> _Answer | _Trouble:
        connection.send_bytes(data)
        if not connection.poll(within_s):
            raise TimeoutError(f"no answer within {within_s:.0f} s")
        reply: _Answer | _Trouble = _REPLY.decode(connection.recv_bytes(_MAX_MESSAGE_BYTES))
        return reply

    def _kill(self) -> None:
        process = self._process
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            if process is not None and process.pid is not None:
                process.kill()

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and self._process.pid is not None:
            self._process.join(1.0)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
        self._connection = self._process = None


# What follows runs in the child.


def _serve(connection: Connection) -> None:
    """Answer until the parent closes the pipe or asks nothing for long, or this child is too old or too large."""
    _behave()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, and so is all reason to stay
        plan = msgspec.msgpack.decode(connection.recv_bytes(_MAX_MESSAGE_BYTES), type=Plan)
        worker = _Child(plan)
        connection.send_bytes(worker.answer(worker.open))
        until = time.monotonic() + AGE_S
        while _held_bytes() < MEMORY_BYTES and time.monotonic() < until and connection.poll(IDLE_S):
            connection.send_bytes(worker.answer(partial(worker.do, connection.recv_bytes(_MAX_MESSAGE_BYTES))))


def _behave() -> None:
    os.nice(10)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this by its pipe
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(
        ValueError, OSError
    ):  # macOS has no such limit; there the peak is looked at after each job
        resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY_BYTES, 4 * MEMORY_BYTES))


class _Child:
    """What the child holds between its jobs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._search: TurnSearch | None = None

    def open(self) -> _Answer:
        """Read the model's vocabulary and this machine's known values."""
        from clawloop_edge.home import EdgeHome
        from clawloop_edge.privacy.redact.machine import detector
        from clawloop_edge.privacy.redact.tokens import TokenTable
        from clawloop_edge.privacy.redact.turns import TurnSearch

        table = TokenTable.of(Path(self._plan.folder))
        self._search = TurnSearch(table, detector(EdgeHome(Path(self._plan.home))), strict=self._plan.strict)
        return _Answer(table.reserved_id)

    def do(self, data: bytes) -> _Answer:
        """One job."""
        from clawloop_edge.privacy.redact.values import Value

        assert self._search is not None, "its parent ends a child that could not open"
        job, search = _JOB.decode(data), self._search
        if isinstance(job, _Text):
            return _Answer(texts=[search.text(job.text, session_id=job.session_id)])
        if isinstance(job, _Turns):
            return _Answer(texts=search.texts(job.ids))
        if job.learn:
            search.learn(job.ids, session_id=job.session_id)
            return _Answer()
        also = [Value(text, "second-opinion", whole=False) for text in job.also]
        return _Answer(search.reserved_id, search.redact(job.ids, session_id=job.session_id, also=also).spans)

    def answer(self, work: Callable[[], _Answer]) -> bytes:
        """The encoded answer of `work`, or where it failed; never what with: that may quote content."""
        signal.setitimer(signal.ITIMER_PROF, self._plan.job_cpu_s)  # ends the process, even within a search of `re`
        try:
            return msgspec.msgpack.encode(work())
        except ClawloopError as error:
            return msgspec.msgpack.encode(_Trouble(str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must learn of it, and nobody else may
            at = traceback.extract_tb(error.__traceback__)[-1]
            return msgspec.msgpack.encode(_Trouble(f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}"))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _held_bytes() -> int:
    """What this process holds in memory; on macOS the most that it ever held. Linux counts the peak of the process that
    it was forked from (an edge with its model) as its own, so there it is what is held now."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
