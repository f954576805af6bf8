"""The owner's words on steps, runs and sessions: whether they may be learned from, a quality, tags, a note.

Each word is kept as it was said, sealed with its session's key and part of the chain, and goes with its session. What
holds for a step is what was said last of it, of its run or of its session (`Curations.of`). A tag is found by a blind
index. Knows nothing of those who obey it (`Pool.obeyed_by`). Format: docs/formats/pool.md, "Curation".
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from clawloop_edge.errors import UnknownTarget
from clawloop_edge.pool.crypt import Keyring, session_scope
from clawloop_edge.pool.forgetting import GoesWith, Going
from clawloop_edge.pool.heads import Chained, append, mark_forgotten
from clawloop_edge.pool.verify import SealedColumn
from clawloop_shared.errors import RecordError
from clawloop_shared.ids import new_id
from clawloop_shared.records import Target

if TYPE_CHECKING:
    from sqlite_utils import Database

    from clawloop_edge.pool.store import Pool

T = TypeVar("T")
KIND = "curation"
MAX_QUALITY, MAX_TAGS, MAX_NOTE_CHARS = 5, 32, 4096
TAG_PATTERN = r"^[^\x00-\x20\x7f-\xa0,]{1,64}$"
"""of a tag: no space, comma or control character; the same in Python and in JSON schemas"""
_TAG = re.compile(TAG_PATTERN)
_TAG_BYTES = 16
_AT_ONCE = 256
_TABLES = (
    """CREATE TABLE curations (
        seq INTEGER PRIMARY KEY, curation_id TEXT NOT NULL UNIQUE,
        session_id TEXT NOT NULL REFERENCES sessions DEFERRABLE INITIALLY DEFERRED,
        target TEXT NOT NULL, target_id TEXT NOT NULL, body BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX curations_target ON curations (target, target_id)",
    "CREATE INDEX curations_session ON curations (session_id)",
    """CREATE TABLE curation_tags (
        tag BLOB NOT NULL, target TEXT NOT NULL, target_id TEXT NOT NULL, session_id TEXT NOT NULL,
        PRIMARY KEY (tag, target, target_id, session_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX curation_tags_session ON curation_tags (session_id)",
)
_COLUMNS = {Target.STEP: "step_id", Target.RUN: "run_id", Target.SESSION: "session_id"}
_SELECT = "SELECT seq, session_id, curation_id, body FROM curations"


class Word(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the owner says; None is not said. An empty note takes the note away, `untags` take tags away,
    also those that are given at once."""

    trainable: bool | None = None
    quality: int | None = None
    tags: list[str] = []
    untags: list[str] = []
    note: str | None = None


class Curation(msgspec.Struct, frozen=True, kw_only=True):
    """A word as it is kept: of what it was said, when (ms since 1970), and in which session that is.

    A word on a run is kept once in each session that the run passes through.
    """

    curation_id: str
    session_id: str
    target: Target
    target_id: str
    created_ms: int
    word: Word


class Curated(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for a step. `trainable` is the owner's word alone: None was never said; True makes nothing trainable
    that is not token-exact. `at_ms`: when the last word was said; 0: never."""

    trainable: bool | None = None
    quality: int | None = None
    tags: list[str] = []
    note: str = ""
    at_ms: int = 0


class Adopts(Protocol):
    """A pool that takes another room's tables in."""

    def adopt(
        self,
        name: str,
        migrations: Sequence[Callable[["Database"], None]],
        *,
        sealed: Sequence[SealedColumn] = (),
        chained: Sequence[Chained] = (),
        goes_with: GoesWith | None = None,
    ) -> None: ...


class Obeys(Protocol):
    """Does what words say, in the transaction that keeps them; they are one word in each session it is said of."""

    def __call__(self, database: "Database", said: Sequence[Curation]) -> None: ...


class Tags(Protocol):
    """A pool with blind indexes."""

    def tag(self, name: str, value: bytes) -> bytes: ...


class CuratedPool(Adopts, Tags, Protocol):
    """The part of the pool that curation needs."""

    keyring: Keyring
    chain_key: bytes
    obeyed_by: dict[str, Obeys]

    def submit(self, operation: Callable[["Database"], T]) -> "Future[T]": ...


class Named(Protocol):
    """A step, by all the names that a word may be said of."""

    @property
    def step_id(self) -> str: ...
    @property
    def run_id(self) -> str: ...
    @property
    def session_id(self) -> str: ...


def tables(database: "Database") -> None:
    """A migration: words, and the look-ups of their tags."""
    for statement in _TABLES:
        database.execute(statement)


def prepare(pool: Adopts) -> None:
    """Have these tables in `pool`."""
    sealed = SealedColumn("curations", "body", "curation_id", "'session/' || session_id")
    chained = Chained(KIND, "curations", ("body",), "t.curation_id = c.record_id")
    pool.adopt(KIND, (tables,), sealed=(sealed,), chained=(chained,), goes_with=_go)


def check_word(word: Word) -> Word:
    """Return `word` if it can be kept.

    Raises:
        RecordError: it says nothing, or a quality, tag or note is none.
    """
    if word == Word():
        raise RecordError("nothing is said; give trainable, quality, tags or a note")
    if word.quality is not None and not 0 <= word.quality <= MAX_QUALITY:
        raise RecordError(f"quality {word.quality} is outside 0 to {MAX_QUALITY}")
    wrong = next((tag for tag in (*word.tags, *word.untags) if not _TAG.fullmatch(tag)), None)
    if wrong is not None:
        raise RecordError(f"{wrong[:80]!r} is no tag; a tag is 1 to 64 characters without space and comma")
    if len(word.tags) + len(word.untags) > MAX_TAGS:
        raise RecordError(f"{len(word.tags) + len(word.untags)} tags at once; {MAX_TAGS} at most")
    if word.note is not None and len(word.note) > MAX_NOTE_CHARS:
        raise RecordError(f"a note of {len(word.note)} characters; {MAX_NOTE_CHARS} at most")
    return word


def curate(pool: CuratedPool, target: Target, target_id: str, *, word: Word) -> "Future[list[Curation]]":
    """Keep a word, and have it obeyed; what is kept is told once it is on disk. Errors are those of `say`."""
    now_ms = time.time_ns() // 1_000_000
    return pool.submit(partial(say, pool=pool, word=word, target=target, target_id=target_id, now_ms=now_ms))


def say(
    database: "Database", *, pool: CuratedPool, word: Word, target: Target, target_id: str, now_ms: int
) -> list[Curation]:
    """Keep a word in each session that it is said of; gives what is kept. Needs the writer's transaction.

    Raises:
        RecordError: it cannot be kept.
        UnknownTarget: it is said of what is not here.
    """
    check_word(word)
    sessions = _sessions_of(database, target, target_id)
    if not sessions:
        raise UnknownTarget(f"no {target} {target_id} is kept here; it never was, or was forgotten")
    known = Curations(database, pool.keyring)
    # A clock that was set back, or two words within a millisecond, must not make an earlier word the last one.
    now_ms = max([now_ms, *(known.last_ms(session_id) + 1 for session_id in sessions)])
    said = [
        Curation(
            curation_id=new_id(),
            session_id=session_id,
            target=target,
            target_id=target_id,
            created_ms=now_ms,
            word=word,
        )
        for session_id in sessions
    ]
    for curation in said:
        _insert(database, pool, curation)
    for obey in pool.obeyed_by.values():
        obey(database, said)
    return said


def keep(database: "Database", *, pool: CuratedPool, curation: Curation) -> bool:
    """Keep a word that was said elsewhere; False if it is here already. Needs the writer's transaction.

    Raises:
        RecordError: it cannot be kept.
        UnknownTarget: it is said of what is not in that session here.
    """
    check_word(curation.word)
    known = "SELECT 1 FROM curations WHERE curation_id = ?"
    if database.conn.execute(known, (curation.curation_id,)).fetchone():
        return False
    if curation.session_id not in _sessions_of(database, curation.target, curation.target_id):
        raise UnknownTarget(f"no {curation.target} {curation.target_id} is kept here")
    _insert(database, pool, curation)
    for obey in pool.obeyed_by.values():
        obey(database, [curation])
    return True


def take_over(pool: CuratedPool, other: "Pool") -> None:
    """Keep the words of another pool, whose place this one takes, as far as they are of what is here. Waits."""
    prepare(other)
    after_seq = 0
    while page := _words_after(other, after_seq):
        for _, said in page:
            with contextlib.suppress(UnknownTarget):
                pool.submit(partial(keep, pool=pool, curation=said)).result()
        after_seq = page[-1][0]


def _words_after(pool: "Pool", seq: int) -> list[tuple[int, Curation]]:
    with pool.read() as database:
        return Curations(database, pool.keyring).after(seq, _AT_ONCE)


def _sessions_of(database: "Database", target: Target, target_id: str) -> list[str]:
    column = _COLUMNS.get(target)
    if column is None:
        raise RecordError(f"a word is said of a step, a run or a session, not of a {target}")
    query = f"SELECT DISTINCT session_id FROM steps WHERE {column} = ? ORDER BY session_id"  # noqa: S608
    return [row[0] for row in database.conn.execute(query, (target_id,))]


def _insert(database: "Database", pool: CuratedPool, curation: Curation) -> None:
    run, session_id = database.conn.execute, curation.session_id
    scope = pool.keyring.find(database, session_scope(session_id))
    plain = msgspec.msgpack.encode(curation)
    body = scope.seal("curations", curation.curation_id, column="body", plain=plain)
    seq = append(
        database, pool.chain_key, kind=KIND, record_id=curation.curation_id, session_id=session_id, sealed=(body,)
    )
    insert = "INSERT INTO curations (seq, curation_id, session_id, target, target_id, body) VALUES (?, ?, ?, ?, ?, ?)"
    run(insert, (seq, curation.curation_id, session_id, curation.target, curation.target_id, body))
    place = (curation.target, curation.target_id, session_id)
    for tag in curation.word.tags:
        run("INSERT OR IGNORE INTO curation_tags VALUES (?, ?, ?, ?)", (tag_index(pool, tag), *place))
    for tag in curation.word.untags:
        delete = "DELETE FROM curation_tags WHERE tag = ? AND target = ? AND target_id = ? AND session_id = ?"
        run(delete, (tag_index(pool, tag), *place))


def tag_index(pool: Tags, tag: str) -> bytes:
    """What stands for a tag in look-ups; tells nothing of it without the pool's index key."""
    return pool.tag("curation tag", tag.encode("utf-8", "surrogatepass"))[:_TAG_BYTES]


def _go(database: "Database", going: Going) -> None:
    """Delete the words on sessions that go."""
    wanted = (msgspec.json.encode(going.session_ids).decode(),)
    inside = "session_id IN (SELECT value FROM json_each(?))"
    run = database.conn.execute
    mark_forgotten(database, [row[0] for row in run(f"SELECT seq FROM curations WHERE {inside}", wanted)])  # noqa: S608
    for table in ("curations", "curation_tags"):
        run(f"DELETE FROM {table} WHERE {inside}", wanted)  # noqa: S608


class Curations:
    """Reads the words of one snapshot; for one thread. Remembers those on runs and sessions."""

    def __init__(self, database: "Database", keyring: Keyring) -> None:
        self._run, self._database, self._keyring = database.conn.execute, database, keyring
        self._known: dict[tuple[Target, str], list[Curation]] = {}
        self._none = self._run("SELECT 1 FROM curations LIMIT 1").fetchone() is None

    def of(self, step: Named) -> Curated:
        """What holds for a step."""
        return fold(self.words(step))

    def off(self, step: Named) -> bool:
        """Whether the owner's word is that it must not be learned from."""
        return self.of(step).trainable is False

    def words(self, step: Named) -> list[Curation]:
        """All that was said of a step, its run and its session, first to last."""
        if self._none:
            return []
        found = [
            *self._on(Target.STEP, step.step_id),
            *self._remembered(Target.RUN, step.run_id),
            *self._remembered(Target.SESSION, step.session_id),
        ]
        return sorted(found, key=lambda each: (each.created_ms, each.curation_id))

    def of_session(self, session_id: str) -> list[Curation]:
        """All that was said in a session, in the order in which it was kept."""
        rows = self._run(f"{_SELECT} WHERE session_id = ? ORDER BY seq", (session_id,)).fetchall()
        return [self._open(*row[1:]) for row in rows]

    def after(self, seq: int, limit: int) -> list[tuple[int, Curation]]:
        """Up to `limit` words kept after the change `seq`, each with its own; oldest first."""
        rows = self._run(f"{_SELECT} WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)).fetchall()
        return [(row[0], self._open(*row[1:])) for row in rows]

    def last_seq(self) -> int:
        """The change of the last word; 0 without any."""
        found: int = self._run("SELECT coalesce(max(seq), 0) FROM curations").fetchone()[0]
        return found

    def last_ms(self, session_id: str) -> int:
        """When the last word was said in a session; 0: never."""
        return max((each.created_ms for each in self.of_session(session_id)), default=0)

    def curated_seqs(self, *, before_seq: int, limit: int, tag: bytes | None = None) -> list[int]:
        """Steps that something was said of, or to which a tag was given (`tag_index`) on any of their names, last kept
        first: look them up with `of`, because a tag may have been taken away again."""
        table, which = ("curations", "1") if tag is None else ("curation_tags", "w.tag = ?3")
        parts = (
            f"SELECT s.seq FROM {table} AS w JOIN steps AS s ON s.{column} = w.target_id"  # noqa: S608  # names of ours
            f" WHERE w.target = '{target}' AND {which} AND s.seq < ?1"
            for target, column in _COLUMNS.items()
        )
        query = f"{' UNION '.join(parts)} ORDER BY 1 DESC LIMIT ?2"
        parameters = (before_seq, limit) if tag is None else (before_seq, limit, tag)
        return [row[0] for row in self._run(query, parameters)]

    def on(self, target: Target, target_id: str) -> list[Curation]:
        """All that was said of just that, first to last; of a run as often as it has sessions."""
        return sorted(self._on(target, target_id), key=lambda each: (each.created_ms, each.curation_id))

    def _remembered(self, target: Target, target_id: str) -> list[Curation]:
        key = target, target_id
        if key not in self._known:
            self._known[key] = self._on(*key)
        return self._known[key]

    def _on(self, target: Target, target_id: str) -> list[Curation]:
        rows = self._run(f"{_SELECT} WHERE target = ? AND target_id = ?", (target, target_id)).fetchall()
        return [self._open(*row[1:]) for row in rows]

    def _open(self, session_id: str, curation_id: str, body: bytes) -> Curation:
        scope = self._keyring.find(self._database, session_scope(session_id))
        return msgspec.msgpack.decode(scope.unseal("curations", curation_id, column="body", sealed=body), type=Curation)


def fold(words: Iterable[Curation]) -> Curated:
    """What holds after these words, first to last. Pure."""
    found = Curated()
    for each in words:
        word = each.word
        found = Curated(
            trainable=found.trainable if word.trainable is None else word.trainable,
            quality=found.quality if word.quality is None else word.quality,
            tags=_tags(found.tags, word),
            note=found.note if word.note is None else word.note,
            at_ms=each.created_ms,
        )
    return found


def _tags(before: Sequence[str], word: Word) -> list[str]:
    return sorted({*before, *word.tags} - {*word.untags})


def flat(curation: Curation) -> dict[str, object]:
    """A word without nesting, as it is exported and shown."""
    word = {name: getattr(curation.word, name) for name in Word.__struct_fields__}
    return {name: getattr(curation, name) for name in Curation.__struct_fields__ if name != "word"} | word
