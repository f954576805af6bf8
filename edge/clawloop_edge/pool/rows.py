"""Rows of `steps` opened, and the lists of ids and of texts that they are pieces of. Changes nothing.

One `Rows` is for one snapshot of the database and for one thread; it remembers keys, long texts and the latest lists.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.chain import Link, Tail, rebuild
from clawloop_edge.pool.codec import Talk, Tokens, decode_talk, decode_tokens, join_step
from clawloop_edge.pool.crypt import Keyring, Scope, session_scope
from clawloop_edge.pool.packing import unpack_ints
from clawloop_edge.pool.parts import SHARED_PREFIX, read_part
from clawloop_shared.envelope import Dictionary
from clawloop_shared.records import Step

if TYPE_CHECKING:
    from sqlite_utils import Database

_LISTS_AT_HAND = 16
"""the latest lists: each is the base of the next"""
_DICTIONARIES_AT_HAND = 64
_DICTIONARY_BYTES = 8 << 10
_PLACE = "SELECT seq, step_id, session_id, base, root, shared_tokens, shared_messages"
TALKS = f"{_PLACE}, talk FROM steps"
TOKENS = f"{_PLACE}, x'', tokens FROM steps"
STEPS = f"{_PLACE}, talk, tokens FROM steps"

T = TypeVar("T")


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of `steps` as `STEPS` selects it; of `TALKS` and `TOKENS` the one column or the other is empty."""

    seq: int
    step_id: str
    session_id: str
    base: int | None
    root: int | None
    shared_tokens: int
    shared_messages: int
    talk: bytes
    tokens: bytes = b""


class Rows:
    """Opens rows of one snapshot."""

    def __init__(self, database: "Database", keyring: Keyring) -> None:
        self.database, self._keyring = database, keyring
        self._scopes: dict[str, Scope] = {}
        self._parts: dict[tuple[str, str], bytes] = {}
        self._dictionaries: OrderedDict[int, Dictionary] = OrderedDict()
        self._ids: OrderedDict[int, list[int]] = OrderedDict()
        self._texts: OrderedDict[int, list[bytes]] = OrderedDict()

    def select(self, query: str, parameters: tuple[Any, ...]) -> list[Row]:
        """The rows that a query beginning with `STEPS`, `TALKS` or `TOKENS` gives."""
        return [Row(*columns) for columns in self.database.conn.execute(query, parameters).fetchall()]

    def tokens(self, row: Row) -> Tokens:
        """The column `tokens` of a row."""
        scope = self.scope(row.session_id)
        return decode_tokens(scope.unseal("steps", row.step_id, column="tokens", sealed=row.tokens))

    def talk(self, row: Row) -> Talk:
        """The column `talk` of a row."""
        return decode_talk(self._plain_talk(row))

    def step(self, row: Row, talk: Talk) -> Step:
        """The step of a row of `STEPS`, exactly as it was kept; `talk` is its."""
        tokens = self.tokens(row)
        tail = self._ids_tail(row, tokens)
        ids = self.ids(row.base, tail.reach)
        tail.grow(ids)
        remember(self._ids, row.seq, ids, most=_LISTS_AT_HAND)
        return join_step(tokens, talk, ids=ids, step_id=row.step_id, session_id=row.session_id)

    def said(self, row: Row, talk: Talk) -> list[bytes]:
        """All messages of a row and its reply, as JSON texts; `talk` is its."""
        tail = self._texts_tail(row, talk)
        texts = self.texts(row.base, tail.reach)
        tail.grow(texts)
        remember(self._texts, row.seq, texts, most=_LISTS_AT_HAND)
        return texts

    def own_texts(self, row: Row, talk: Talk) -> list[bytes]:
        """The messages of a row that its base lacks, as JSON texts."""
        return [self.part(row.session_id, part_id) if part_id else text for part_id, text in talk.messages]

    def ids(self, seq: int | None, length: int) -> list[int]:
        """The first `length` ids of the prompt and the response of the step `seq`."""

        def link(name: int) -> Link[int, int]:
            row = self.at(name, TOKENS)
            return Link(row.base, row.shared_tokens, lambda: self._ids_tail(row, self.tokens(row)))

        return rebuild(seq, length, link=link, known=self._ids)

    def texts(self, seq: int | None, length: int) -> list[bytes]:
        """The first `length` of the messages and the reply of the step `seq`, as JSON texts."""

        def link(name: int) -> Link[int, bytes]:
            row = self.at(name, TALKS)
            return Link(row.base, row.shared_messages, lambda: self._texts_tail(row, self.talk(row)))

        return rebuild(seq, length, link=link, known=self._texts)

    def at(self, seq: int, query: str) -> Row:
        """The row of the step `seq`."""
        found = self.select(f"{query} WHERE seq = ?", (seq,))
        if not found:
            raise PoolError(f"step {seq} is missing, and others build on it; run `clawloop-edge pool verify`")
        return found[0]

    def part(self, session_id: str, part_id: str) -> bytes:
        """The text of a part that a session uses."""
        found = self._parts.get((session_id, part_id))
        if found is None:
            names = {"part_id": part_id, "session_id": session_id}
            found = read_part(self.database, self._keyring, **names, scope=self.scope(session_id))
            self._parts[session_id, part_id] = found
        return found

    @property
    def shared_parts(self) -> set[str]:
        """The shared parts that were opened so far."""
        return {part_id for _, part_id in self._parts if part_id.startswith(SHARED_PREFIX)}

    def dictionary(self, root: int) -> Dictionary:
        """What the `talk` of steps whose root is the step `root` is compressed with."""
        found = self._dictionaries.get(root)
        if found is None:
            found = dictionary_of(self._plain_talk(self.at(root, TALKS)))
            remember(self._dictionaries, root, found, most=_DICTIONARIES_AT_HAND)
        return found

    def scope(self, session_id: str) -> Scope:
        """The scope of a session."""
        name = session_scope(session_id)
        if name not in self._scopes:
            self._scopes[name] = self._keyring.find(self.database, name)
        return self._scopes[name]

    def _plain_talk(self, row: Row) -> bytes:
        dictionary = None if row.root is None else self.dictionary(row.root)
        unseal = self.scope(row.session_id).unseal
        return unseal("steps", row.step_id, column="talk", sealed=row.talk, dictionary=dictionary)

    def _ids_tail(self, row: Row, tokens: Tokens) -> Tail[int]:
        opening = [number for part_id in tokens.opening for number in unpack_ints(self.part(row.session_id, part_id))]
        own = [*opening, *unpack_ints(tokens.tail), *unpack_ints(tokens.response)]
        return Tail(row.shared_tokens, own, tokens.copies)

    def _texts_tail(self, row: Row, talk: Talk) -> Tail[bytes]:
        return Tail(row.shared_messages, [*self.own_texts(row, talk), talk.reply], talk.copies)


def dictionary_of(talk: bytes) -> Dictionary:
    """What later steps of a session are compressed with: what its first says last, names of fields and of policies."""
    return Dictionary(talk[-_DICTIONARY_BYTES:])


def remember(known: OrderedDict[int, T], seq: int, value: T, *, most: int) -> None:
    """Put a value among the latest, of which there are at most so many."""
    known[seq] = value
    known.move_to_end(seq)
    while len(known) > most:
        known.popitem(last=False)
