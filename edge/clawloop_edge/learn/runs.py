"""The task that a device was given, the run that learns it, and what came of earlier ones: on disk, sealed.

What a run needs to go on where it was broken off (the trajectories that it learns from, the learner's own state) lies
sealed in files beside the pool, under a key of the run's own in the pool: so that a large state never holds up what an
agent says, and that forgetting one of its sessions makes all of it unreadable. docs/formats/deltas.md.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.learn.job import Interrupted
from clawloop_edge.pool.forgetting import Going
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.counting import give_back_in
from clawloop_edge.privacy.deltas import Source
from clawloop_shared.deltas import LearnTask
from clawloop_shared.errors import ClawloopError
from clawloop_shared.files import publish_parts
from clawloop_shared.levels import Level
from clawloop_shared.records import Trajectory

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.crypt import Scope

TASK, RUN, HISTORY, NOW, SERVER = "learn.task", "learn.run", "learn.history", "learn.now", "learn.server"
"""states: the newest task, the run under way, what came of runs, when its owner asked to learn at once, and the key of
the server that asked"""
FOLDER = "learning"
"""of a home: what a run under way needs, sealed"""
HISTORY_LENGTH = 50
_JOB, _STATE = "job", "state"
_PART_BYTES = 4 << 20
"""of a file that are sealed together: some milliseconds, in which nothing else of this process runs"""
_MOST_PART_BYTES = 64 << 20
"""of one that an earlier version wrote"""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run under way. `entry_id` is the ledger's, of a run that will be noised by `sigma` times the norm `clip`."""

    run_id: str
    task: LearnTask
    level: Level
    rank: int
    step_ids: list[str]
    session_ids: list[str]
    sources: dict[str, Source]
    started_ms: int
    sigma: float = 0.0
    clip: float = 0.0
    entry_id: str = ""

    @property
    def scope(self) -> str:
        """The name of the key that its files are sealed with."""
        return f"learn/{self.run_id}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run: a delta in the outbox (`item_id`), or why there is none. `epsilon` is what the ledger counts
    for the line since then. Not `done`: the task may be tried again. `failed`: it was what the task or the data are,
    or learning broke; the next one waits for a while."""

    task_id: str
    line_id: str
    base_version: int
    at_ms: int
    took_s: float
    level: Level
    trajectories: int
    item_id: str = ""
    reason: str = ""
    reward: float | None = None
    updates: int = 0
    set_aside: dict[str, int] = {}
    epsilon: float = 0.0
    done: bool = True
    failed: bool = False


class _Trajectories(msgspec.Struct, frozen=True):
    trajectories: list[Trajectory]


class Runs:
    """What is kept of learning in one pool. What writes waits for the disk."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    # The task

    def task(self) -> LearnTask | None:
        """The newest task that was taken on and is not done with."""
        raw = self._pool.get_state(TASK)
        return msgspec.msgpack.decode(raw, type=LearnTask) if raw else None

    def keep_task(self, task: LearnTask) -> None:
        """Take on a task in the place of the one before."""
        self._pool.set_state(TASK, msgspec.msgpack.encode(task)).result()

    def belong_to(self, server: bytes) -> None:
        """Be of the server with this key: what another one asked for is forgotten, and its run given up."""

        def operation(database: "Database") -> None:
            if read_state(database, self._pool.keyring, name=SERVER) != server:
                drop_run(database, self._pool)
                write_state(database, self._pool.keyring, name=TASK, value=b"")
                write_state(database, self._pool.keyring, name=SERVER, value=server)

        self._pool.submit(operation).result()

    # The run

    def run(self) -> Run | None:
        """The run under way."""
        with self._pool.read() as database:
            return run_in(database, self._pool)

    def read_trajectories(self, run: Run, *, go_on: Callable[[], bool] = lambda: True) -> list[Trajectory] | None:
        """What it learns from, exactly as when it began; None if that cannot be read any more.

        Raises:
            Interrupted: `go_on` said no.
        """
        raw = self._read(run, _JOB, go_on)
        return msgspec.msgpack.decode(raw, type=_Trajectories).trajectories if raw else None

    def read_state(self, run: Run, *, go_on: Callable[[], bool] = lambda: True) -> bytes:
        """The learner's own state that was kept last; empty if there is none. Raises Interrupted."""
        return self._read(run, _STATE, go_on) or b""

    def keep_state(self, run: Run, state: bytes) -> None:
        """Keep the learner's own state in the place of the one before.

        Raises:
            StorageError: the disk is full or not writable.
            PoolError: the run was given up meanwhile.
        """
        self._write(run, _STATE, state)

    def keep_trajectories(self, run: Run, trajectories: Sequence[Trajectory]) -> None:
        """Keep what it learns from. Raises StorageError, PoolError."""
        self._write(run, _JOB, msgspec.msgpack.encode(_Trajectories(list(trajectories))))

    def end(self, run: Run, outcome: Outcome) -> None:
        """Give a run up, and write down that it came to nothing."""

        def operation(database: "Database") -> None:
            if drop_run(database, self._pool, run_id=run.run_id):
                end_in(database, self._pool, outcome)

        self._pool.submit(operation).result()
        self.clear_files()

    def clear_files(self) -> None:
        """Remove the files of runs that are over, which nothing opens any more, and what a process that was killed has
        left half written. For the one thread that writes them."""
        for name in (_JOB, _STATE):
            for draft in (self._pool.folder / FOLDER).glob(f".{name}.sealed.*"):
                draft.unlink(missing_ok=True)
        if self.run() is None:
            for name in (_JOB, _STATE):
                self._path(name).unlink(missing_ok=True)

    # Before and after

    def history(self) -> list[Outcome]:
        """What came of the latest runs, oldest first."""
        raw = self._pool.get_state(HISTORY)
        return msgspec.msgpack.decode(raw, type=list[Outcome]) if raw else []

    def ask_now(self, now_ms: int) -> None:
        """Have the edge learn as soon as it can, idle and on power or not."""
        self._pool.set_state(NOW, now_ms.to_bytes(8, "big")).result()

    def asked_done(self) -> None:
        """That was heard: it is done once for each time that it was asked."""
        if self.asked_ms():
            self._pool.set_state(NOW, b"").result()

    def asked_ms(self) -> int:
        """When its owner last asked for that; 0: never, or it was done."""
        return int.from_bytes(self._pool.get_state(NOW) or b"", "big")

    def _path(self, name: str) -> Path:
        return self._pool.folder / FOLDER / f"{name}.sealed"

    def _scope(self, run: Run) -> "Scope":
        with self._pool.read() as database:
            return self._pool.keyring.find(database, run.scope)

    def _write(self, run: Run, name: str, plain: bytes) -> None:
        self._path(name).parent.mkdir(mode=0o700, exist_ok=True)
        publish_parts(self._path(name), _sealed(self._scope(run), run, name=name, plain=plain), mode=0o600)

    def _read(self, run: Run, name: str, go_on: Callable[[], bool] = lambda: True) -> bytes | None:
        """None if it is not there, or of another run, or damaged: then the run begins anew, with the same release."""
        with contextlib.suppress(OSError, ClawloopError, msgspec.DecodeError):
            size, parts = msgspec.msgpack.decode(self._path(name).read_bytes(), type=tuple[int, list[bytes]])
            scope, plain = self._scope(run), bytearray()
            part_bytes = _PART_BYTES if len(parts) == _count(size, _PART_BYTES) else _MOST_PART_BYTES
            if len(parts) != _count(size, part_bytes):
                return None
            for at, part in enumerate(parts):
                if not go_on():
                    raise Interrupted
                column = f"{name}/{at * part_bytes}/{size}"
                plain += scope.unseal("learn", run.run_id, column=column, sealed=part)
            return bytes(plain)
        return None


def _count(size: int, part_bytes: int) -> int:
    return max(1, -(-size // part_bytes))


def _sealed(scope: "Scope", run: Run, *, name: str, plain: bytes) -> Iterator[bytes]:
    """The file of `plain`, part by part: msgpack of `[bytes, parts]`."""
    view, encode = memoryview(plain), msgspec.msgpack.encode
    yield b"\x92" + encode(len(plain))
    yield b"\xdd" + _count(len(plain), _PART_BYTES).to_bytes(4, "big")
    for start in range(0, max(len(plain), 1), _PART_BYTES):
        part, column = bytes(view[start : start + _PART_BYTES]), f"{name}/{start}/{len(plain)}"
        yield encode(scope.seal("learn", run.run_id, column=column, plain=part))


# Inside any transaction or snapshot


def run_in(database: "Database", pool: Pool) -> Run | None:
    """The run under way."""
    raw = read_state(database, pool.keyring, name=RUN)
    return msgspec.msgpack.decode(raw, type=Run) if raw else None


# Inside a write transaction


def begin_run(database: "Database", pool: Pool, run: Run) -> None:
    """Note that a run is under way, and make its key."""
    pool.keyring.ensure(database, run.scope)
    write_state(database, pool.keyring, name=RUN, value=msgspec.msgpack.encode(run))
    write_state(database, pool.keyring, name=NOW, value=b"")


def drop_run(database: "Database", pool: Pool, *, run_id: str = "", spare: bool = True) -> bool:
    """Let the run under way (or that of this id alone) go, and make its files unreadable; False if there is none.

    `spare`: nothing of it left nor will, so its release is given back.
    """
    run = run_in(database, pool)
    if run is None or (run_id and run.run_id != run_id):
        return False
    write_state(database, pool.keyring, name=RUN, value=b"")
    pool.keyring.destroy(database, run.scope)
    if spare and run.entry_id:
        give_back_in(database, run.entry_id)
    return True


def end_in(database: "Database", pool: Pool, outcome: Outcome) -> None:
    """Write down what came of a run. A task that is done with goes, if no newer one took its place."""
    keyring = pool.keyring
    raw = read_state(database, keyring, name=HISTORY)
    before = msgspec.msgpack.decode(raw, type=list[Outcome]) if raw else []
    kept = [*before, outcome][-HISTORY_LENGTH:]
    write_state(database, keyring, name=HISTORY, value=msgspec.msgpack.encode(kept))
    write_state(database, keyring, name=NOW, value=b"")
    raw = read_state(database, keyring, name=TASK)
    if outcome.done and raw and msgspec.msgpack.decode(raw, type=LearnTask).task_id == outcome.task_id:
        write_state(database, keyring, name=TASK, value=b"")


def prepare(pool: Pool) -> None:
    """Have a run of `pool` go with any session that it learns from, whichever process forgets that."""

    def go(database: "Database", going: Going) -> None:
        run = run_in(database, pool)
        if run is not None and (going.everything or not set(run.session_ids).isdisjoint(going.session_ids)):
            drop_run(database, pool)

    pool.forgetting.goes_with("learn", go)
