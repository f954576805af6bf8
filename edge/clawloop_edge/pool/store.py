"""The pool: one encrypted database that keeps every step and signal of this edge. Layout: docs/formats/pool.md.

Writes go through one thread and are acknowledged by futures; reads take their own connections and never wait for it.
Several processes may open one pool; only one, the edge that serves, holds its lock (`writer=True`).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Full, LifoQueue
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from clawloop_edge.errors import PoolError, PoolFull
from clawloop_edge.pool import finishing, leftovers, schema
from clawloop_edge.pool.anchor import Anchor
from clawloop_edge.pool.crypt import INDEX_SCOPE, POOL_SCOPE, Keyring, encryption
from clawloop_edge.pool.curation import Obeys
from clawloop_edge.pool.forgetting import Forgetting, GoesWith
from clawloop_edge.pool.heads import Chained, chain_changes, chain_key_of, current
from clawloop_edge.pool.keeper import Keeper
from clawloop_edge.pool.keys import DATABASE_NAME, KeyBundle, KeyStore, key_lock, open_keys
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Change, KeptStep, PoolReport, PoolStats, SessionSummary, StepCount
from clawloop_edge.pool.retention import Gate
from clawloop_edge.pool.rotate import settle
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.tally import count_all, read_counts
from clawloop_edge.pool.verify import Progress, SealedColumn, count_pool, in_silence, verify_pool
from clawloop_edge.pool.writer import Writer
from clawloop_shared.database import BUSY_TIMEOUT_MS, engine, migrate, open_database, told, transaction, turn
from clawloop_shared.errors import KeyMissing, StorageError
from clawloop_shared.records import Signal, Step, check_signal

if TYPE_CHECKING:
    from sqlite_utils import Database

T = TypeVar("T")
LOCK_NAME = "pool.lock"
_IDLE_READERS = 4
_LOG_LIMIT_BYTES = 64 << 20
_CUT_WAIT_MS = 500


class Pool:
    """An open pool. Use it from any thread; close it, or use it as a context."""

    def __init__(
        self, folder: Path, keys: KeyBundle, *, store: KeyStore, database: "Database", lock: FileLock | None
    ) -> None:
        self.folder, self.store = folder, store
        self.anchoring = Anchor(store.anchor, keys.file_key)
        self._file_key, self._lock = keys.file_key, lock
        self.keyring, index_key = _prepare(database, keys, store=store)
        self._keeper = Keeper(self.keyring, index_key)
        self.tombstones, drop = self._keeper.tombstones, self._keeper.forget_recent
        self.forgetting = Forgetting(self.keyring, index_key, tombstones=self.tombstones, dropped=drop)
        self.chain_key = chain_key_of(index_key)
        self.gate = Gate()
        self.obeyed_by: dict[str, Obeys] = {}
        self._sealed: list[SealedColumn] = []
        self._chained: list[Chained] = []
        self._readers: LifoQueue[Database] = LifoQueue(_IDLE_READERS)
        self._writer = Writer(database, settle=self._keeper.settle, undone=self._keeper.forget_recent)
        self._database = database
        self._opened_at = current(database)

    @classmethod
    def open(cls, folder: Path, store: KeyStore, *, writer: bool = False, accept: bool = False) -> "Pool":
        """Open the pool in `folder`, or make it, with the keys that `store` has.

        `accept`: whatever the anchor says, this is the pool from now on; only for its owner's express word.

        Raises:
            KeyMissing: there is a pool, and its key is not there, or the pool was made with another key.
            PoolError: `writer` is asked for, and another edge has this pool; or the key must not be trusted; or the
                pool is an older copy than its anchor says.
            StorageError: the database cannot be read or written.
        """
        open_keys(store, folder)  # first: who is asked for a passphrase may take their time
        lock = FileLock.acquire(folder / LOCK_NAME) if writer else None
        try:
            with key_lock(folder):  # nobody changes keys or puts a backup here meanwhile
                pool = cls._open(folder, store, lock=lock, accept=accept)
        except BaseException:
            if lock:
                lock.release()
            raise
        finishing.resume(pool)
        return pool

    @classmethod
    def _open(cls, folder: Path, store: KeyStore, *, lock: FileLock | None, accept: bool) -> "Pool":
        keys = store.load()
        database = open_database(folder / DATABASE_NAME, keys.file_key, rows_sealed=True)
        try:
            with told(folder / DATABASE_NAME):
                if not accept:
                    Anchor(store.anchor, keys.file_key).check(database)
                pool = cls(folder, keys, store=store, database=database, lock=lock)
        except BaseException:
            database.close()
            raise
        try:
            settle(pool, keys)
            if lock or accept:
                pool.anchoring.follow(pool)
            leftovers.clear(folder, drafts=lock is not None)
        except BaseException:
            pool._close()
            raise
        return pool

    def anchor(self) -> None:
        """Note outside of the database how far it is, so that an older file in its place is refused. Waits.

        Raises:
            PoolError, StorageError: it cannot be noted there.
        """
        with key_lock(self.folder):
            self.anchoring.follow(self)

    def close(self) -> None:
        """Write what waits, then close all connections and let go of the lock.

        A command that has changed anything moves the anchor too: what its owner has decided with it, such as a lower
        level, must not be taken back by an older file while no edge runs.
        """
        try:
            if self._lock or self._changed():
                self.anchor()
        finally:
            self._close()

    def _changed(self) -> bool:
        """Whether anything was kept, by whichever process, since this one has opened the pool."""
        with self.read() as database:
            return current(database) != self._opened_at

    def _close(self) -> None:
        self._writer.close()
        while True:
            try:
                self._readers.get_nowait().close()
            except Empty:
                break
        self._database.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Writing: each returns at once; the future is resolved after COMMIT.

    def keep_step(self, kept: KeptStep, *, index: dict[str, bytes] | None = None) -> Future[None]:
        """Keep a step; its id makes it idempotent. `index` gives values that `find_step_by` shall find it by.

        The future fails with PoolError if too much waits to be written (`writer.MAX_QUEUED_BYTES`), and with PoolFull
        if there is no room (`gate`): the step is then not kept. `kept` must not be changed afterwards.
        """
        try:
            self.gate.check(kept.step.session_id)
        except PoolFull as full:
            refused: Future[None] = Future()
            refused.set_exception(full)
            return refused
        tags = dict(index or {})
        return self._writer.submit(
            lambda database: self._keeper.keep_step(database, kept, index=tags),
            size_bytes=_rough_size(kept),
            patient=True,
        )

    def keep_signal(self, signal: Signal) -> Future[None]:
        """Keep a signal; its id makes it idempotent. The future fails with PoolError if its target is not known.

        Raises:
            RecordError: the signal breaks its own rules.
        """
        check_signal(signal)
        return self._writer.submit(lambda database: self._keeper.keep_signal(database, signal))

    def set_state(self, name: str, value: bytes) -> Future[None]:
        """Keep a small value under a name, in place of the one before."""
        return self._writer.submit(lambda db: write_state(db, self.keyring, name=name, value=value))

    def drop_recent(self) -> Future[None]:
        """Let go of the steps that memory holds to build on, because another process may have forgotten some."""
        return self._writer.submit(lambda database: self._keeper.forget_recent())

    def submit(self, operation: Callable[["Database"], T]) -> Future[T]:
        """Run `operation` in the writer's thread, all or nothing. It must not wait for another write."""
        return self._writer.submit(operation)

    def adopt(
        self,
        name: str,
        migrations: Sequence[Callable[["Database"], None]],
        *,
        sealed: Sequence[SealedColumn] = (),
        chained: Sequence[Chained] = (),
        goes_with: GoesWith | None = None,
    ) -> None:
        """Have another room's tables in this pool. Waits.

        `sealed` names the columns that `verify` shall open, `chained` the records of the room's own kinds of changes,
        `goes_with` what must go with a session that is forgotten.
        """
        with self._reader() as database:
            database.conn.execute("PRAGMA query_only = OFF")
            migrate(database, name, migrations=migrations)
            database.conn.execute("PRAGMA query_only = ON")
        self._sealed += [column for column in sealed if column not in self._sealed]
        self._chained += [place for place in chained if place not in self._chained]
        if goes_with is not None:
            self.forgetting.goes_with(name, goes_with)

    # Reading: from any thread, on a snapshot, beside the writer.

    @contextmanager
    def read(self) -> Iterator["Database"]:
        """A connection that sees the pool as it is now, for as long as the block lasts. Only for reading.

        Raises:
            StorageError: the file is damaged or cannot be read.
        """
        try:
            with self._reader() as database:
                database.conn.execute("BEGIN")
                try:
                    yield database
                finally:
                    database.conn.execute("ROLLBACK")
        except engine().DatabaseError as error:
            raise StorageError(f"the pool cannot be read: {error}; run `clawloop-edge pool verify`") from error

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Several questions to one snapshot."""
        with self.read() as database:
            yield Reading(database, self.keyring)

    def get_step(self, step_id: str) -> KeptStep | None:
        """A kept step, exactly as it was given; None if it is not here."""
        with self.reading() as reading:
            return reading.kept(step_id)

    def step_ids(self) -> list[str]:
        """The ids of all steps, in the order in which they were kept."""
        with self.read() as database:
            return [row[0] for row in database.conn.execute("SELECT step_id FROM steps ORDER BY seq")]

    def find_steps_by(self, name: str, value: bytes, *, session_id: str | None = None, limit: int = 16) -> list[str]:
        """Ids of steps kept with `index={name: value}`, latest first."""
        query = (
            "SELECT s.step_id FROM lookups AS l JOIN steps AS s USING (seq)"
            " WHERE l.tag = ? AND (? IS NULL OR s.session_id = ?) ORDER BY s.seq DESC LIMIT ?"
        )
        with self.read() as database:
            parameters = (self._keeper.lookup_tag(name, value), session_id, session_id, limit)
            return [row[0] for row in database.conn.execute(query, parameters)]

    def tag(self, name: str, value: bytes) -> bytes:
        """The blind index of `value` under `name`, for the look-ups of another room's tables."""
        return self._keeper.tag(name, value)

    def find_step_by(self, name: str, value: bytes, *, session_id: str | None = None) -> str | None:
        """The id of the latest step kept with `index={name: value}`."""
        found = self.find_steps_by(name, value, session_id=session_id, limit=1)
        return found[0] if found else None

    def last_main_step(self, session_id: str) -> KeptStep | None:
        """The latest main-line step of a session."""
        with self.reading() as reading:
            return reading.last_main(session_id)

    def run_steps(self, run_id: str) -> list[KeptStep]:
        """The latest step of a run in each of its sessions (16 at most), latest first."""
        with self.reading() as reading:
            return reading.run_steps(run_id)

    def sessions(self, limit: int = 50, before_ms: int | None = None) -> list[SessionSummary]:
        """A page of sessions, last used first."""
        with self.reading() as reading:
            return reading.sessions(limit, before_ms)

    def session_steps(self, session_id: str) -> list[KeptStep]:
        """All steps of a session in the order in which they were kept."""
        with self.reading() as reading:
            return list(reading.session_steps(session_id))

    def signals(self, steps: Sequence[Step]) -> list[Signal]:
        """The signals that judge these steps, or the runs, sessions and trajectories they belong to."""
        with self.reading() as reading:
            return reading.signals(steps)

    def changes(self, after_seq: int, limit: int) -> list[Change]:
        """Up to `limit` steps and signals kept after `after_seq`, oldest first."""
        with self.reading() as reading:
            return reading.changes(after_seq, limit)

    def get_state(self, name: str) -> bytes | None:
        """A value of `set_state`, whichever process set it; None if it was never set."""
        with self.read() as database:
            return read_state(database, self.keyring, name=name)

    def stats(self) -> PoolStats:
        """Counts and sizes."""
        with self.read() as database:
            counts = count_pool(database)
        return PoolStats(
            encryption=encryption(),
            **counts,
            file_bytes=self.size_bytes(),
            queued=self._writer.queued,
            queued_bytes=self._writer.queued_bytes,
            refused=self._writer.refused + self.gate.refused,
        )

    def size_bytes(self) -> int:
        """How much lies on the disk, the log included."""
        files = [self.folder / f"{DATABASE_NAME}{suffix}" for suffix in ("", "-wal")]
        return sum(path.stat().st_size for path in files if path.exists())

    def step_counts(self) -> list[StepCount]:
        """Steps by kind, app and why nothing may be learned from them; costs the same however many there are."""
        with self.read() as database:
            return read_counts(database, self.keyring)

    def verify(self, *, progress: Progress = in_silence) -> PoolReport:
        """Check the file's integrity, open every sealed byte, rebuild every step and count. Reads all: takes long."""
        with self.read() as database:
            return self.check(database, progress=progress)

    def check(self, database: "Database", *, progress: Progress = in_silence) -> PoolReport:
        """`verify` for a copy of this pool."""
        return verify_pool(database, self.keyring, extra=self._sealed, chained=self._chained, progress=progress)

    def cut_log(self) -> bool:
        """Copy the write-ahead log into the database and cut it to nothing; False if a reader stands in the way."""
        with self._reader() as database, turn(database):
            run = database.conn.execute
            run(f"PRAGMA busy_timeout = {_CUT_WAIT_MS}")  # writers wait meanwhile
            try:
                busy = run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except engine().OperationalError:
                return False
            finally:
                run(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        return not busy

    @contextmanager
    def _reader(self) -> Iterator["Database"]:
        if self._writer.closed:
            raise PoolError("the pool is closed; nothing can be read")
        try:
            database = self._readers.get_nowait()
        except Empty:
            database = open_database(self.folder / DATABASE_NAME, self._file_key, rows_sealed=True)
            # Once a connection: each time it is set, the connection compiles all its statements again.
            database.conn.execute("PRAGMA query_only = ON")
        try:
            yield database
        except BaseException:
            database.close()
            raise
        try:
            self._readers.put_nowait(database)
        except Full:
            database.close()


def _prepare(database: "Database", keys: KeyBundle, *, store: KeyStore) -> tuple[Keyring, bytes]:
    """The pool's keyring and its index key; tables and keys are made if they are not there."""
    migrate(database, schema.NAME, migrations=schema.MIGRATIONS)
    database.conn.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT_BYTES}")
    pool_id: str = database.conn.execute("SELECT pool_id FROM pool").fetchone()[0]
    keyring = Keyring(pool_id, keys.keks, reload=lambda: store.load().keks)
    scopes = "SELECT count(*) FROM keys WHERE scope IN (?, ?)"
    if database.conn.execute(scopes, (POOL_SCOPE, INDEX_SCOPE)).fetchone()[0] < 2:
        with transaction(database):
            database.conn.execute("UPDATE pool SET kek = ?", (max(keys.keks),))
            keyring.ensure(database, POOL_SCOPE)
            keyring.ensure(database, INDEX_SCOPE)
    try:
        index_key = keyring.find(database, INDEX_SCOPE).key
    except StorageError as error:  # where the file is not encrypted as a whole, it is here that a wrong key shows
        raise KeyMissing(f"pool {pool_id} does not open with this key; restore the key it was made with") from error

    def count_kept_steps(database: "Database") -> None:
        count_all(database, keyring, index_key=index_key)

    def chain_kept_changes(database: "Database") -> None:
        chain_changes(database, chain_key_of(index_key))

    migrate(database, schema.NAME, migrations=(*schema.MIGRATIONS, count_kept_steps, chain_kept_changes))
    return keyring, index_key


def _rough_size(kept: KeptStep) -> int:
    """About how many bytes a step holds in memory while it waits, from its lists alone: a token is about 4 bytes of
    text and 8 of list. Exact enough to bound the queue, and free of any walk over the messages."""
    step = kept.step
    return 512 + 16 * len(step.prompt_ids) + 48 * len(step.response_ids) + len(kept.text)
