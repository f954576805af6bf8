"""Full-text search over what was said: an encrypted index beside the pool, made from it. Format: docs/formats/pool.md.

The index is derived: whoever has the pool can make it again, so a lost, old or damaged one is made anew. It keeps no
text, only which words stand where; what is shown of a hit is read from the pool. Each use opens the file under a lock
and closes it again, so that its key can be changed while an edge runs. Keeping a step does not touch it.
"""

import logging
from collections.abc import Callable, Collection
from itertools import islice
from threading import Timer
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from clawloop_edge.errors import QueryError
from clawloop_edge.pool.heads import FORGOTTEN, current
from clawloop_edge.pool.hits import Found, Hit, Within, digest_of, hit_of, walk
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.records import StepLine, Turn
from clawloop_edge.pool.said import said
from clawloop_edge.pool.words import Query, as_fts, indexed, parse_query
from clawloop_shared.database import encrypts, engine, open_database, transaction
from clawloop_shared.errors import KeyMissing, StorageError
from clawloop_shared.files import sync_folder

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

T = TypeVar("T")
log = logging.getLogger(__name__)

SEARCH_SCOPE = "search"
"""the data key that is the index's file key"""
INDEX_NAME, LOCK_NAME = "search.db", "search.lock"
_NEW = ".new"
_NO_BOUND = 1 << 62
LIMIT_S = 2.0
"""how long one search may take"""
BEST_OF = 2_000
"""so many of the newest hits are compared where the best are asked for"""
_VERSION = 1
_TABLES = (
    # Contentless: the words can be looked up, and no text be read from it. All that `indexed` gives beyond ASCII is a
    # letter to the tokenizer `ascii`.
    "CREATE VIRTUAL TABLE words USING fts5(text, content='', contentless_delete=1, tokenize='ascii')",
    "CREATE TABLE sessions (session INTEGER PRIMARY KEY, session_id TEXT NOT NULL UNIQUE, app TEXT NOT NULL) STRICT",
    """CREATE TABLE texts (
        text INTEGER PRIMARY KEY, seq INTEGER NOT NULL, session INTEGER NOT NULL REFERENCES sessions,
        at_ms INTEGER NOT NULL, digest BLOB NOT NULL, UNIQUE (session, digest)
    ) STRICT""",
    # Up to where the pool was read, the leaf of its chain there, and how many of its changes were forgotten by then.
    "CREATE TABLE upto (seq INTEGER NOT NULL, leaf BLOB NOT NULL, forgotten INTEGER NOT NULL) STRICT",
    "INSERT INTO upto VALUES (0, x'', 0)",
    f"PRAGMA user_version = {_VERSION}",
)
_SEARCH = (
    # CROSS JOIN: the words lead, from the newest text back, so that a page is found without looking at all hits.
    "SELECT words.rowid, texts.seq, texts.digest, -bm25(words) FROM words CROSS JOIN texts ON texts.text = words.rowid"
    " CROSS JOIN sessions USING (session) WHERE words MATCH :query AND words.rowid < :before"
    " AND (:app = '' OR sessions.app = :app) AND texts.at_ms >= :since_ms AND texts.at_ms < :until_ms"
    " ORDER BY words.rowid DESC LIMIT :limit"
)
_FORGOTTEN = f"SELECT seq FROM changes WHERE kind = '{FORGOTTEN}'"  # noqa: S608


class _Upto(NamedTuple):
    """How far the index is, or the pool."""

    seq: int
    leaf: bytes
    forgotten: int


class _Outdated(Exception):
    """The file is of no use any more; its text says why."""


class SearchIndex:
    """The index of one pool. Use it from any thread; only one at a time gets through."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._path, self._lock = pool.folder / INDEX_NAME, pool.folder / LOCK_NAME
        self._known: _Upto | None = None
        pool.adopt("search", (count_forgotten,))

    @property
    def kept(self) -> bool:
        """Whether there is an index; where the engine encrypts no file there is none, and each search reads it all."""
        return encrypts()

    def catch_up(self, steps: int = 64) -> int:
        """Take in up to `steps` steps that the pool has got, and find no more what it has let go of.

        Gives how many of the pool's changes are still to be looked at. Where there is nothing new, no file is opened.

        Raises:
            StorageError: the index cannot be written.
        """
        if not self.kept:
            return 0
        with self._pool.read() as database:
            if _end_of(database) == self._known:
                return 0
        return self._use(lambda database: self._catch_up(database, steps))

    def search(
        self,
        words: str,
        *,
        limit: int = 20,
        before: int | None = None,
        app: str = "",
        since_ms: int = 0,
        until_ms: int | None = None,
        best: bool = False,
    ) -> list[Hit]:
        """The texts that hold all the words, newest first; with `best`, the best of the newest `BEST_OF` first.

        `words`: words, "phrases", beginnings*, and -not before any of these. What the pool has kept since `catch_up`
        is not found.

        Raises:
            QueryError: there is nothing to look for, or it takes longer than `LIMIT_S`.
            StorageError: the index cannot be read.
        """
        query = parse_query(words)
        within = Within(before or _NO_BOUND, app, since_ms, until_ms or _NO_BOUND)
        if not self.kept:
            return list(islice(walk(self._pool, query, within=within), limit))
        most = BEST_OF if best else limit
        found = self._use(lambda database: _look_up(database, query, within=within, limit=most))
        if best:
            found = sorted(found, key=lambda row: -row.rank)[:limit]
        with self._pool.reading() as reading:
            return [hit for row in found if (hit := hit_of(reading, row, query=query)) is not None]

    def forget(self) -> None:
        """Take out all that the pool has forgotten, for good, and change the key. Call it after COMMIT.

        The file is written anew, so that no word of it stays there; whoever has a copy of the old one has no key. Where
        there is no file the key goes all the same, because there may be a copy.

        Raises:
            StorageError: the file cannot be written.
        """
        if self.kept and self._path.exists():
            self._use(self._purge)
            return
        with FileLock.acquire(self._lock, wait=True):
            self._remove()
            self._pool.submit(lambda database: self._pool.keyring.destroy(database, SEARCH_SCOPE)).result()

    def _use(self, work: Callable[["Database"], T]) -> T:
        """What `work` gives. An index that cannot be used is made anew, empty, and `work` begins again."""
        with FileLock.acquire(self._lock, wait=True):
            try:
                return self._run(work)
            except _Outdated as reason:
                log.warning("the search index is made again: %s", reason)
                self._remove()
                return self._run(work)

    def _run(self, work: Callable[["Database"], T]) -> T:
        try:
            database = open_database(self._path, self._key())
            try:
                _prepare(database)
                return work(database)
            finally:
                database.close()
        except KeyMissing as error:
            raise _Outdated("it does not open with its key") from error
        except (StorageError, engine().DatabaseError) as error:
            if _is_damage(error):
                raise _Outdated(f"it is damaged ({error})") from error
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"the search index at {self._path} cannot be used: {error}") from error

    def _key(self) -> bytes:
        keyring = self._pool.keyring
        with self._pool.read() as database:
            known = database.conn.execute("SELECT 1 FROM keys WHERE scope = ?", (SEARCH_SCOPE,)).fetchone()
            if known:
                return keyring.find(database, SEARCH_SCOPE).key
        self._remove()
        return self._pool.submit(lambda db: keyring.ensure(db, SEARCH_SCOPE)).result().key

    def _remove(self) -> None:
        self._known = None
        for suffix in ("", "-wal", "-shm", _NEW):
            self._path.with_name(INDEX_NAME + suffix).unlink(missing_ok=True)

    def _catch_up(self, database: "Database", steps: int) -> int:
        upto = _Upto(*database.conn.execute("SELECT seq, leaf, forgotten FROM upto").fetchone())
        with self._pool.reading() as reading:
            now = _end_of(reading.database)
            if _leaf(reading.database, upto.seq) != upto.leaf:
                raise _Outdated("the pool is not the one that it was made from; was a backup restored?")
            gone = _forgotten(reading.database) if upto.forgotten != now.forgotten else frozenset()
            turns = reading.turns(upto.seq, steps)
            seq = turns[-1].step.seq if len(turns) == steps else now.seq
            reached = _Upto(seq, _leaf(reading.database, seq), now.forgotten)
        with transaction(database):
            if gone:
                _take_out(database, gone)
            for turn in turns:
                _add(database, turn)
            database.conn.execute("UPDATE upto SET seq = ?, leaf = ?, forgotten = ?", reached)
        self._known = reached if reached == now else None
        return now.seq - seq

    def _purge(self, database: "Database") -> None:
        """Write the index anew without what was forgotten, under a new key, and close it."""
        with self._pool.read() as pool_database:
            gone = _forgotten(pool_database)
        with transaction(database):
            _take_out(database, gone)
            database.conn.execute("UPDATE upto SET forgotten = ?", (len(gone),))
        database.conn.execute("INSERT INTO words (words) VALUES ('optimize')")
        keyring, fresh = self._pool.keyring, self._path.with_name(INDEX_NAME + _NEW)

        def change_key(pool_database: "Database") -> bytes:
            keyring.destroy(pool_database, SEARCH_SCOPE)
            return keyring.ensure(pool_database, SEARCH_SCOPE).key

        # Between this and the rename a crash leaves a file that nobody can open: it is made again.
        key = self._pool.submit(change_key).result()
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        database.conn.execute(f"ATTACH ? AS fresh KEY \"x'{key.hex()}'\"", (str(fresh),))
        database.conn.execute("SELECT sqlcipher_export('fresh')").fetchone()
        database.conn.execute(f"PRAGMA fresh.user_version = {_VERSION}")
        database.conn.execute("DETACH fresh")
        database.close()
        fresh.replace(self._path)
        sync_folder(self._path.parent)
        self._known = None


def count_forgotten(database: "Database") -> None:
    """A migration of the pool: how many of its changes were forgotten is counted without reading the others."""
    database.execute(f"CREATE INDEX changes_forgotten ON changes (seq) WHERE kind = '{FORGOTTEN}'")


def _prepare(database: "Database") -> None:
    version = database.conn.execute("PRAGMA user_version").fetchone()[0]
    if version == _VERSION:
        return
    if version:
        raise _Outdated(f"it has layout {version}; this clawloop has {_VERSION}")
    with transaction(database):
        for statement in _TABLES:
            database.conn.execute(statement)


def _end_of(pool_database: "Database") -> _Upto:
    seq = current(pool_database).seq
    forgotten = pool_database.conn.execute(f"SELECT count(*) FROM ({_FORGOTTEN})").fetchone()[0]  # noqa: S608
    return _Upto(seq, _leaf(pool_database, seq), forgotten)


def _forgotten(pool_database: "Database") -> frozenset[int]:
    return frozenset(row[0] for row in pool_database.conn.execute(_FORGOTTEN))


def _leaf(pool_database: "Database", seq: int) -> bytes:
    row = pool_database.conn.execute("SELECT leaf FROM changes WHERE seq = ?", (seq,)).fetchone()
    return row[0] if row else b""


def _add(database: "Database", turn: Turn) -> None:
    """Take in what a step adds to its session. What was said there already, as in a history told again, is not."""
    run = database.conn.execute
    session = None
    insert = "INSERT OR IGNORE INTO texts (seq, session, at_ms, digest) VALUES (?, ?, ?, ?) RETURNING text"
    for one in said(turn):
        session = session or _session(database, turn.step)
        row = run(insert, (turn.step.seq, session, turn.step.at_ms, digest_of(one))).fetchone()
        if row is not None:
            run("INSERT INTO words (rowid, text) VALUES (?, ?)", (row[0], indexed(one.text)))


def _session(database: "Database", step: StepLine) -> int:
    run = database.conn.execute
    row = run("SELECT session FROM sessions WHERE session_id = ?", (step.session_id,)).fetchone()
    if row is None:
        insert = "INSERT INTO sessions (session_id, app) VALUES (?, ?) RETURNING session"
        row = run(insert, (step.session_id, step.app)).fetchone()
    return int(row[0])


def _take_out(database: "Database", seqs: Collection[int]) -> None:
    texts = database.conn.execute("SELECT text, seq FROM texts")
    gone = [(text,) for text, seq in texts if seq in seqs]
    database.conn.executemany("DELETE FROM words WHERE rowid = ?", gone)
    database.conn.executemany("DELETE FROM texts WHERE text = ?", gone)
    database.conn.execute("DELETE FROM sessions WHERE session NOT IN (SELECT session FROM texts)")


def _look_up(database: "Database", query: Query, *, within: Within, limit: int) -> list[Found]:
    asked = {**within._asdict(), "query": as_fts(query), "limit": limit}
    watch = Timer(LIMIT_S, database.conn.interrupt)
    watch.start()
    try:
        return [Found(*row) for row in database.conn.execute(_SEARCH, asked)]
    except engine().OperationalError as error:
        if "interrupted" not in str(error):
            raise StorageError(f"the search index cannot be read: {error}") from error
        raise QueryError(f"this takes longer than {LIMIT_S:g} s; give more words, or a shorter time") from error
    finally:
        watch.cancel()


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is at fault; what the disk or another process does is another class of the engine's."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return type(cause) is engine().DatabaseError
