"""One thread that writes: operations that come while it is busy share the next transaction (group commit).

A caller never waits for the disk: `submit` returns a future that is resolved after COMMIT. An operation that fails
undoes itself and fails its own future alone. Knows nothing of what the operations do.

Patient operations (steps) may put off what they write until `settle`, and run without a savepoint each, which would
copy every page that one changes; so if one fails, the transaction is undone and each is run again in its own savepoint.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from clawloop_edge.errors import PoolError
from clawloop_shared.database import is_fault, transaction
from clawloop_shared.errors import StorageError

if TYPE_CHECKING:
    from sqlite_utils import Database

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_QUEUED_BYTES = 64 << 20
GROUP_OPERATIONS = 256
GROUP_BYTES = 8 << 20
BUSY_TRIES = 6
"""times `BUSY_TIMEOUT_MS`: how long another process may hold the database before what waits is given up"""


class _Job:
    __slots__ = ("future", "operation", "patient", "result", "size_bytes")

    def __init__(self, operation: Callable[["Database"], Any], *, size_bytes: int, patient: bool) -> None:
        self.operation, self.size_bytes, self.patient = operation, size_bytes, patient
        self.future: Future[Any] = Future()
        self.result: Any = None


class _TryApart(Exception):
    """A patient operation has failed, and with it the transaction that it shared."""


class Writer:
    """Runs operations on its own connection, in the order in which they came."""

    def __init__(
        self, database: "Database", *, settle: Callable[["Database"], None], undone: Callable[[], None]
    ) -> None:
        """`settle` writes what patient operations have put off: before any other operation, and before COMMIT.

        `undone` is called after an operation or a transaction was rolled back. Both are called in the thread.
        """
        self._database, self._settle, self._undone = database, settle, undone
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self.closed = False
        self.queued_bytes = 0
        self.refused = 0
        self._thread = threading.Thread(target=self._work, name="pool-writer", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """How many operations wait or run."""
        return len(self._jobs)

    def submit(
        self, operation: Callable[["Database"], T], *, size_bytes: int = 0, patient: bool = False
    ) -> "Future[T]":
        """Have `operation` run in the writer's thread, and return at once.

        A patient one may put off what it writes until `settle`. An operation may be run again, after its first run was
        undone.

        The future fails with PoolError if the pool is closed or more than `MAX_QUEUED_BYTES` wait, and with
        StorageError if the disk would not take it. An operation must not wait for another operation.
        """
        job = _Job(operation, size_bytes=size_bytes, patient=patient)
        job.future.set_running_or_notify_cancel()  # a client that goes away must not take its step with it
        with self._wake:
            problem = self._problem(size_bytes)
            if problem is None:
                self._jobs.append(job)
                self.queued_bytes += size_bytes
                self._wake.notify()
            else:
                self.refused += 1
        if problem is not None:
            job.future.set_exception(problem)
        return job.future

    def _problem(self, size_bytes: int) -> PoolError | None:
        if self.closed:
            return PoolError("the pool is closed; nothing more is kept")
        if size_bytes and self.queued_bytes + size_bytes > MAX_QUEUED_BYTES:
            waiting = f"{len(self._jobs)} writes of {self.queued_bytes >> 20} MiB wait"
            return PoolError(f"the disk does not keep up: {waiting}; this step is not kept")
        return None

    def close(self) -> None:
        """Write what waits, then stop the thread."""
        with self._wake:
            self.closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while group := self._next_group():
            try:
                self._write(group)
            except Exception as error:  # noqa: BLE001  # whatever it is, it belongs to those who wait for this group
                self._resolve(group, error)
            else:
                self._resolve(group, None)

    def _next_group(self) -> list[_Job]:
        """The jobs of the next transaction, oldest first; they stay queued until resolved. Empty: closed and done."""
        with self._wake:
            while not self.closed and not self._jobs:
                self._wake.wait()
            group: list[_Job] = []
            size = 0
            for job in self._jobs:
                if group and (size + job.size_bytes > GROUP_BYTES or len(group) >= GROUP_OPERATIONS):
                    break
                group.append(job)
                size += job.size_bytes
            return group

    def _write(self, group: list[_Job]) -> None:
        for attempt in range(1, BUSY_TRIES + 1):
            try:
                if not self._write_together(group):
                    self._write_apart(group)
                return
            except StorageError as error:
                self._undone()
                if "locked" not in str(error) or attempt == BUSY_TRIES:
                    raise
                log.warning("another process holds the pool; %d writes wait (try %d)", len(group), attempt)

    def _write_together(self, group: list[_Job]) -> bool:
        """False: a patient operation has failed, and nothing is written."""
        try:
            with transaction(self._database):
                for job in group:
                    if job.patient:
                        job.result = self._run_freely(job.operation)
                    else:
                        self._run_freely(self._settle)
                        self._run(job)
                self._run_freely(self._settle)
        except _TryApart:
            self._undone()
            return False
        return True

    def _run_freely(self, work: Callable[["Database"], T]) -> T:
        try:
            return work(self._database)
        except Exception as error:
            raise _TryApart from error

    def _write_apart(self, group: list[_Job]) -> None:
        with transaction(self._database):
            for job in group:
                self._run(job)

    def _run(self, job: _Job) -> None:
        if job.future.done():  # it failed in an earlier try of this group
            return
        try:
            with self._database.atomic():
                job.result = job.operation(self._database)
                self._settle(self._database)
        except Exception as error:  # handed on to whoever waits for this operation, and to nobody else
            self._undone()
            if is_fault(error):
                error = StorageError(f"the pool could not be written: {error}; check free disk space and rights")
            if not self._database.conn.in_transaction:  # the engine has ended the transaction of the whole group
                raise error from None
            job.future.set_exception(error)

    def _resolve(self, group: list[_Job], error: BaseException | None) -> None:
        with self._wake:
            for job in group:
                self._jobs.popleft()
                self.queued_bytes -= job.size_bytes
        for job in group:
            if job.future.done():
                continue
            if error is None:
                job.future.set_result(job.result)
            else:
                job.future.set_exception(error)
