"""The one thread that owns the model. Commands go in through a queue; between them it takes turns.

MLX arrays that are not evaluated cannot cross threads, so whatever touches the model runs here. Knows no model itself.
"""

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from clawloop_edge.errors import EngineGone

T = TypeVar("T")


class Work(Protocol):
    """What the thread does when no command waits."""

    @property
    def busy(self) -> bool: ...
    def turn(self) -> None: ...
    def fail_all(self, error: BaseException) -> None: ...


class Worker:
    """Runs `make` in its thread, then commands and turns of what it made, until `stop`."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.ready: Future[None] = Future()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # a collected call cancels itself, perhaps in the middle of `post`
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(make,), name="clawloop-engine", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a daemon thread inside MLX at interpreter exit would abort the process

    @property
    def alive(self) -> bool:
        """Whether commands are still taken."""
        return self._thread.is_alive() and not self._closed

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
        """End the thread and wait for it. What it still serves is failed first."""
        atexit.unregister(self.stop)
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, make: Callable[[], Work]) -> None:
        try:
            work = make()
        except BaseException as error:  # noqa: BLE001 - `open` raises it
            self._closed = True
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._take_commands(work):
                work.turn()
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
            command()

    def _end(self, work: Work) -> None:
        with self._lock:
            self._closed = True
        while not self._queue.empty():
            command = self._queue.get()
            if command is not None:
                command()
        work.fail_all(EngineGone("the engine was stopped while this call was in flight"))
