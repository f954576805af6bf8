"""The one thread that owns the model. Commands go in through a queue; between them it takes turns.

MLX arrays that are not evaluated cannot cross threads, so whatever touches the model runs here. Knows no model itself.

The thread never ends; it waits for the next engine. MLX keeps Python objects in thread-local storage, which a thread
that ends takes down after `join` has returned: if the interpreter is finalising by then, the wait for its lock ends the
process with "terminate called without an active exception" (seen in 2 of 60 runs on a busy machine).
"""

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar, Protocol, TypeVar

from clawloop_edge.errors import EngineError, EngineGone

log = logging.getLogger(__name__)
T = TypeVar("T")


class Work(Protocol):
    """What the thread does when no command waits."""

    @property
    def busy(self) -> bool: ...
    def turn(self) -> None: ...
    def fail_all(self, error: BaseException) -> None: ...
    def close(self) -> None:
        """Let go of what belongs to the thread."""
        ...


class _Thread(threading.Thread):
    """Does one job after another, and waits for more without holding anything."""

    parked: ClassVar[list["_Thread"]] = []

    def __init__(self) -> None:
        super().__init__(name="clawloop-engine", daemon=True)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self.start()

    @classmethod
    def doing(cls, job: Callable[[], None], ended: threading.Event) -> "_Thread":
        """A thread that does `job`, and then sets `ended`: one that is free, or a new one."""
        thread = cls._free() or cls()
        thread._jobs.put((job, ended))
        return thread

    @classmethod
    def _free(cls) -> "_Thread | None":
        """A parked thread; a process that was forked has only the names of its parent's."""
        while True:
            try:
                thread = cls.parked.pop()
            except IndexError:
                return None
            if thread.is_alive():
                return thread

    def run(self) -> None:
        while True:
            job, ended = self._jobs.get()
            try:
                job()
            except Exception:
                log.exception("an engine ended with an error")
            del job  # it holds the engine
            self.parked.append(self)
            ended.set()


class Worker:
    """Runs `make` in its thread, then commands and turns of what it made, until `stop`."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.ready: Future[None] = Future()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a collected call cancels itself, perhaps in the middle of `post`
        self._closed = False
        self._since_s: float | None = None  # when the command or turn in progress began
        self._ended = threading.Event()
        self._thread = _Thread.doing(lambda: self._run(make), self._ended)
        atexit.register(self.stop)  # a daemon thread inside MLX at interpreter exit would abort the process

    @property
    def alive(self) -> bool:
        """Whether commands are still taken."""
        return not self._closed

    @property
    def busy_s(self) -> float:
        """How long the command or turn in progress has taken so far; 0 between two."""
        since_s = self._since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` in the thread, some time soon.

        Raises:
            EngineGone: the thread has ended.
        """
        with self._lock:
            if self._closed:
                raise EngineGone("the engine is not running; restart clawloop-edge")
            self._queue.put(command)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Run `question` in the thread; the future has its answer or its error. Raises EngineGone."""
        answer: Future[T] = Future()

        def command() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001 - the one who asked gets it
                answer.set_exception(error)

        self.post(command)
        return answer

    def stop(self) -> None:
        """End the work and wait for it. What is still served is failed first."""
        atexit.unregister(self.stop)
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._ended.wait()

    def _run(self, make: Callable[[], Work]) -> None:
        try:
            self._work(make)
        finally:
            self._closed = True

    def _work(self, make: Callable[[], Work]) -> None:
        try:
            work = make()
        except BaseException as error:  # noqa: BLE001 - `open` raises it
            self._closed = True
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._take_commands(work):
                self._do(work.turn, otherwise=work.fail_all)
        finally:
            self._end(work)

    def _take_commands(self, work: Work) -> bool:
        """Run the commands that wait; sleeps if there is nothing else to do. False once it shall stop."""
        while True:
            try:
                command = self._queue.get(block=not work.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._do(command)

    def _do(self, what: Callable[[], None], otherwise: Callable[[BaseException], None] | None = None) -> None:
        """Whatever fails, the thread goes on; `otherwise` ends the calls that a failed turn leaves in the dark."""
        self._since_s = time.monotonic()
        try:
            what()
        except Exception as error:
            log.exception("the engine's thread goes on after an error")
            if otherwise is not None:
                otherwise(EngineError(f"the engine failed ({type(error).__name__}); see the log, and try again"))
        finally:
            self._since_s = None

    def _end(self, work: Work) -> None:
        with self._lock:
            self._closed = True
        while not self._queue.empty():
            command = self._queue.get()
            if command is not None:
                self._do(command)
        work.fail_all(EngineGone("the engine was stopped while this call was in flight"))
        work.close()
