"""Learning in a process of its own: started for a job, fed, watched, and ended within a second when it must stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from clawloop_edge.child import Child
from clawloop_edge.engine.memory import ram_bytes
from clawloop_edge.errors import LearnFailed, NotLearnable
from clawloop_edge.learn.child import MOST_BYTES, Begin, Done, Held, Kept, Message, decode, encode
from clawloop_edge.learn.job import Job, Learned

ASK_S = 0.25
"""how often it is asked whether to go on"""
SILENT_S = 120.0
"""without a sign of life, after which the process is ended"""
UPDATE_S = 4 * 3600.0
"""for one update"""
SAVE_S = 60.0
"""between two states that are kept; the last one is, too, before it ends without a result"""
LEAST_BYTES = 256 << 20
_MODULE = "clawloop_edge.learn.child"
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")
"""of the environment; the rest may hold secrets"""
_ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class MlxLearner:
    """A `Learner` in MLX. One job at a time."""

    def __init__(self, *, silent_s: float = SILENT_S, update_s: float = UPDATE_S, save_s: float = SAVE_S) -> None:
        """`silent_s`: without a sign of life, and `update_s`: for one update, after which the process is ended;
        `save_s`: how often its state is kept."""
        self._silent_s, self._update_s, self._save_s = silent_s, update_s, save_s
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The process that learns, if there is one."""
        return self._child.pid if self._child else None

    def learn(
        self,
        job: Job,
        *,
        go_on: Callable[[], bool],
        kept: bytes = b"",
        keep: Callable[[bytes], None] = lambda _: None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Learned | None:
        """What came of the job; None if `go_on` said no before it was done. See `Learner`.

        Raises:
            NotLearnable: it cannot be done, however often it is tried.
            LearnFailed: it cannot be done, it took more memory than it may, or its process ended or hung; what was
                kept before stays good.
        """
        limit = job.max_memory_bytes or max(LEAST_BYTES, free_bytes() // 2)
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | _ALONE
        child = Child(_MODULE, environment=environment, silent=True)
        try:
            child.start()
        except OSError as error:
            child.end()
            raise LearnFailed(f"the process that learns does not start: {error.strerror}; try again") from error
        self._child = child
        heard, saver, learned = _Heard(), _Saver(keep, every_s=self._save_s), None
        begin = [encode(Begin(job, kept, limit))]
        del job, kept  # the process has them, and they are large
        talk = threading.Thread(target=_talk, args=(child, begin, heard), name="clawloop-learn", daemon=True)
        talk.start()
        try:
            learned = self._follow(child, heard, saver, limit=limit, go_on=go_on, told=told)
            return learned
        finally:
            child.kill()
            talk.join()
            for message in heard.take(0.0):  # it may have got one further
                if isinstance(message, Kept):
                    saver.offer(message.state)
            saver.finish(last=learned is None)
            child.end()
            self._child = None

    def _follow(
        self,
        child: Child,
        heard: _Heard,
        saver: _Saver,
        *,
        limit: int,
        go_on: Callable[[], bool],
        told: Callable[[int], None],
    ) -> Learned | None:
        now = time.monotonic()
        watch = _Watch(limit, silent_s=self._silent_s, update_s=self._update_s, heard_at=now, moved_at=now)
        while go_on():
            watch.check(child, time.monotonic(), kept_bytes=saver.held_bytes + heard.held_bytes)
            saver.look(time.monotonic())
            for message in heard.take(ASK_S):
                if message is None:
                    raise LearnFailed(
                        f"the process that learns {_end_of(child)} in update {watch.updates + 1}; try again"
                    )
                watch.heard(message, time.monotonic())
                if isinstance(message, Kept):
                    saver.offer(message.state)
                elif isinstance(message, Held):
                    told(message.updates)
                elif isinstance(message, Done):
                    return message.learned
                elif message.final:
                    raise NotLearnable(message.reason)
                else:
                    raise LearnFailed(message.reason)
        return None


class _Heard:
    """What the process said last of each kind: never more than one state, however slow what is done with it is."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._latest: dict[type, Message] = {}
        self._over = False

    def put(self, message: Message | None) -> None:
        """None: it says no more."""
        with self._ready:
            if message is None:
                self._over = True
            else:
                self._latest.pop(type(message), None)  # the newest is the last
                self._latest[type(message)] = message
            self._ready.notify()

    def take(self, timeout_s: float) -> list[Message | None]:
        """What was not taken yet, in its order."""
        with self._ready:
            self._ready.wait_for(lambda: self._latest or self._over, timeout_s)
            found = [*self._latest.values(), *([None] if self._over else [])]
            self._latest.clear()
            return found

    @property
    def held_bytes(self) -> int:
        """Of the state that was not taken yet."""
        with self._ready:
            kept = self._latest.get(Kept)
        return len(kept.state) if isinstance(kept, Kept) else 0


class _Saver:
    """Keeps the latest state in a thread of its own, now and then; one is kept and one waits, at most."""

    def __init__(self, keep: Callable[[bytes], None], *, every_s: float) -> None:
        self._keep, self._every_s, self._saved_at = keep, every_s, -math.inf
        self._waiting: bytes | None = None
        self._thread: threading.Thread | None = None
        self._saving_bytes = 0
        self._error: BaseException | None = None

    @property
    def held_bytes(self) -> int:
        """Of states that are in memory."""
        return self._saving_bytes + len(self._waiting or b"")

    def offer(self, state: bytes) -> None:
        """This is the latest state."""
        self._waiting = state

    def look(self, now: float) -> None:
        """Begin to keep what waits, if it is time. Raises what keeping did."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()
        if self._thread is None and self._waiting is not None and now - self._saved_at >= self._every_s:
            state, self._waiting, self._saved_at = [self._waiting], None, now
            self._saving_bytes = len(state[0])
            self._thread = threading.Thread(target=self._save, args=(state,), name="clawloop-save", daemon=True)
            self._thread.start()

    def finish(self, *, last: bool) -> None:
        """Wait until what is being kept is, and keep the `last` one too. Raises what keeping did."""
        if self._thread is not None:
            self._thread.join()
            self._settle()
        if last and self._waiting is not None:
            self._keep(self._waiting)
        self._waiting = None

    def _save(self, state: list[bytes]) -> None:
        try:
            self._keep(state.pop())
        except BaseException as error:  # noqa: BLE001 - it is raised where it can be heard
            self._error = error

    def _settle(self) -> None:
        self._thread, self._saving_bytes = None, 0
        error, self._error = self._error, None
        if error is not None:
            raise error


class _Watch:
    """Whether the process lives, gets on, and keeps to its memory."""

    def __init__(self, limit: int, *, silent_s: float, update_s: float, heard_at: float, moved_at: float) -> None:
        self._limit, self._silent_s, self._update_s = limit, silent_s, update_s
        self._heard_at, self._moved_at, self._told = heard_at, moved_at, 0
        self.updates = 0

    def heard(self, message: Message, now: float) -> None:
        self._heard_at = now
        if isinstance(message, Held):
            self._told, self.updates = message.memory_bytes, message.updates
        else:
            self._moved_at = now

    def check(self, child: Child, now: float, *, kept_bytes: int) -> None:
        """`kept_bytes`: of its states that this process holds. Raises LearnFailed."""
        held = max(self._told, resident_bytes(child.pid)) + kept_bytes
        if held > self._limit:
            raise LearnFailed(
                f"learning held {held} bytes, over its limit of {self._limit}, and was ended; raise [learn]"
                " max_memory_bytes, or lower max_sample_tokens"
            )
        if now - self._heard_at > self._silent_s:
            raise LearnFailed(f"the process that learns gave no sign for {self._silent_s:g} s and was ended; try again")
        if now - self._moved_at > self._update_s:
            raise LearnFailed(f"an update took more than {self._update_s:g} s and was ended; lower max_sample_tokens")


def _talk(child: Child, begin: list[bytes], heard: _Heard) -> None:
    """Give the process its job, and pass on what it says; None when it is gone, or says what cannot be read."""
    with contextlib.suppress(EOFError, OSError, msgspec.DecodeError):
        child.send(begin.pop())
        while True:
            heard.put(decode(child.receive(MOST_BYTES)))
    heard.put(None)


def _end_of(child: Child) -> str:
    """How it ended."""
    code = child.wait(1.0)
    if code is None:
        return "closed its pipe"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def resident_bytes(pid: int | None) -> int:
    """What a process holds in memory; 0 where that is not known (then its own word counts)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if sys.platform == "linux" and pid is not None:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import psutil
    except ImportError:
        return 0
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def free_bytes() -> int:
    """What is free on this machine; a quarter of all where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        import psutil
    except ImportError:
        return ram_bytes() // 4
    return int(psutil.virtual_memory().available)
