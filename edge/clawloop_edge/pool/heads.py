"""The chain over everything kept: what was sealed leaves a MAC, and each head stands for all changes before it.

    leaf_n = HMAC(chain key, "leaf.v1" | seq | kind | record id | SHA-256 of the sealed bytes)
    head_n = HMAC(chain key, "head.v1" | head_n-1 | leaf_n)

So an old page of the file put in the place of a newer one is seen (`check`), and an old file too by whoever keeps a
head elsewhere (`note`, `head_at`). A forgotten record keeps its place and its leaf, so that the chain stays whole.
Knows no file and nothing of what is sealed. Format: docs/formats/pool.md.
"""

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from clawloop_shared.envelope import derive_key

if TYPE_CHECKING:
    from sqlite_utils import Database

FORGOTTEN = "forgotten"
"""the kind of a change whose record was forgotten; it has no ids any more"""
_START = bytes(32)
_TABLES = (
    "CREATE TABLE chain (seq INTEGER NOT NULL, head BLOB NOT NULL) STRICT",
    "CREATE TABLE heads (seq INTEGER PRIMARY KEY, head BLOB NOT NULL) STRICT",
    # A seq is never given twice, because the chain's end never goes back: so a cursor into the changes stays true.
    """CREATE TABLE changes (
        seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, record_id TEXT NOT NULL, session_id TEXT NOT NULL,
        leaf BLOB NOT NULL
    ) STRICT""",
)


class Head(NamedTuple):
    """The chain after the change `seq` (0: none yet)."""

    seq: int
    head: bytes


class Chained(NamedTuple):
    """Where one kind's records lie: their table `t`, its sealed columns, and the SQL that joins it to a change `c`."""

    kind: str
    table: str
    columns: tuple[str, ...]
    on: str


CHAINED = (
    Chained("step", "steps", ("tokens", "talk"), "t.step_id = c.record_id"),
    Chained("signal", "signals", ("body",), "t.signal_id = c.record_id"),
)


def chain_key_of(index_key: bytes) -> bytes:
    """The key of the chain (32 bytes), from the pool's index key."""
    return derive_key(index_key, "chain")


class Chain:
    """The chain's end while one write transaction adds to it; `write` puts it into the database again."""

    def __init__(self, database: "Database", chain_key: bytes) -> None:
        self._database, self._key = database, chain_key
        self._end = current(database)
        self._changes: list[tuple[int, str, str, str, bytes]] = []

    def append(self, kind: str, record_id: str, *, session_id: str, sealed: Sequence[bytes]) -> int:
        """Note a change and give its place (`seq`) in the order of all."""
        seq = self._end.seq + 1
        leaf = _leaf(self._key, seq, kind=kind, record_id=record_id, sealed=sealed)
        self._changes.append((seq, kind, record_id, session_id, leaf))
        self._end = Head(seq, _next(self._key, self._end.head, leaf=leaf))
        return seq

    def write(self) -> None:
        """Write what was appended."""
        insert = "INSERT INTO changes (seq, kind, record_id, session_id, leaf) VALUES (?, ?, ?, ?, ?)"
        self._database.conn.executemany(insert, self._changes)
        self._database.conn.execute("UPDATE chain SET seq = ?, head = ?", self._end)


def append(
    database: "Database", chain_key: bytes, *, kind: str, record_id: str, session_id: str, sealed: Sequence[bytes]
) -> int:
    """Note a change and give its place (`seq`) in the order of all. Needs the transaction that keeps the record.

    `sealed` are the record's sealed columns, in the order in which `Chained` names them.
    """
    chain = Chain(database, chain_key)
    seq = chain.append(kind, record_id, session_id=session_id, sealed=sealed)
    chain.write()
    return seq


def mark_forgotten(database: "Database", seqs: Iterable[int]) -> None:
    """Take the names off these changes, because their records are forgotten. Needs a write transaction."""
    update = "UPDATE changes SET kind = ?, record_id = '', session_id = '' WHERE seq = ?"
    database.conn.executemany(update, [(FORGOTTEN, seq) for seq in seqs])


def current(database: "Database") -> Head:
    """The chain's end. Costs the same however long the chain is."""
    return Head(*database.conn.execute("SELECT seq, head FROM chain").fetchone())


def note(database: "Database") -> Head:
    """Keep the chain's end, so that `head_at` can tell it later. Needs a write transaction."""
    head = current(database)
    database.conn.execute("INSERT OR IGNORE INTO heads (seq, head) VALUES (?, ?)", head)
    return head


def head_at(database: "Database", seq: int) -> bytes | None:
    """The head after the change `seq`, if that is the last one or was noted; None if it is not known."""
    head = current(database)
    if head.seq == seq:
        return head.head
    row = database.conn.execute("SELECT head FROM heads WHERE seq = ?", (seq,)).fetchone()
    return row[0] if row else None


def check(database: "Database", chain_key: bytes, *, chained: Sequence[Chained] = CHAINED) -> Iterator[str]:
    """What is wrong with the chain: computed anew from its leaves, and each leaf from its record. Reads everything."""
    query = "SELECT seq, leaf, noted.head FROM changes LEFT JOIN heads AS noted USING (seq) ORDER BY seq"
    last, head = 0, _START
    for seq, leaf, noted in database.conn.execute(query):
        if seq != last + 1:
            yield f"changes {last + 1} to {seq - 1} are missing; restore a backup"
        last, head = seq, _next(chain_key, head, leaf=leaf)
        if noted is not None and noted != head:
            yield f"change {seq}: the chain up to here is not the one that was noted; restore a backup"
    if current(database) != (last, head):
        yield f"the chain ends at change {current(database).seq} with another head than its {last} changes give"
    for place in chained:
        yield from _check_records(database, chain_key, place=place)


def _check_records(database: "Database", chain_key: bytes, *, place: Chained) -> Iterator[str]:
    columns = ", ".join(f"t.{column}" for column in place.columns)
    run = database.conn.execute
    changes = run(
        f"SELECT c.seq, c.record_id, c.leaf, {columns} FROM changes AS c"  # noqa: S608  # names of ours
        f" LEFT JOIN {place.table} AS t ON {place.on} WHERE c.kind = ? ORDER BY c.seq",
        (place.kind,),
    )
    found = 0
    for row in changes:
        problem = _check_record(chain_key, row, kind=place.kind)
        found += row[3] is not None
        if problem:
            yield problem
    kept = run(f"SELECT count(*) FROM {place.table}").fetchone()[0]  # noqa: S608
    if kept != found:
        yield f"{place.table} has {kept} rows, and the chain tells of {found}"


def _check_record(chain_key: bytes, row: Sequence[Any], *, kind: str) -> str:
    seq, record_id, leaf, *sealed = row
    if sealed[0] is None:
        return f"change {seq}: {kind} {record_id} is missing, and was not forgotten"
    if _leaf(chain_key, seq, kind=kind, record_id=record_id, sealed=sealed) != leaf:
        return f"change {seq}: {kind} {record_id} is not what was kept then"
    return ""


def chain_changes(database: "Database", chain_key: bytes) -> None:
    """A migration: the chain's tables, and the changes that were noted before there was a chain taken into it."""
    run = database.conn.execute
    run("ALTER TABLE changes RENAME TO unchained_changes")
    for table in _TABLES:
        run(table)
    run("INSERT INTO chain (seq, head) VALUES (0, ?)", (_START,))
    older = run(
        "SELECT c.seq, c.kind, c.record_id, c.session_id, s.tokens, s.talk, g.body FROM unchained_changes AS c"
        " LEFT JOIN steps AS s ON s.step_id = c.record_id LEFT JOIN signals AS g ON g.signal_id = c.record_id"
        " ORDER BY c.seq"
    )
    for seq, kind, record_id, session_id, *columns in older:
        while current(database).seq < seq - 1:
            append(database, chain_key, kind=FORGOTTEN, record_id="", session_id="", sealed=())
        sealed = [column for column in columns if column is not None]
        names = (kind, record_id, session_id) if sealed else (FORGOTTEN, "", "")
        append(database, chain_key, kind=names[0], record_id=names[1], session_id=names[2], sealed=sealed)
    run("DROP TABLE unchained_changes")


def _leaf(chain_key: bytes, seq: int, *, kind: str, record_id: str, sealed: Sequence[bytes]) -> bytes:
    content = hashlib.sha256(_framed(sealed)).digest()
    place = seq.to_bytes(8, "big") + _framed((kind.encode(), record_id.encode()))
    return hmac.digest(chain_key, b"leaf.v1" + place + content, "sha256")


def _next(chain_key: bytes, head: bytes, *, leaf: bytes) -> bytes:
    return hmac.digest(chain_key, b"head.v1" + head + leaf, "sha256")


def _framed(parts: Sequence[bytes]) -> bytes:
    """The parts in one, behind their number and their lengths, so that no others give the same bytes."""
    lengths = [len(part).to_bytes(8, "big") for part in parts]
    return b"".join([len(parts).to_bytes(8, "big"), *lengths, *parts])
