"""Filling the outbox: items are built beside the writer and put in by a transaction that checks again what they were
built on, so that a level lowered meanwhile, by whichever process, leaves no item behind. docs/formats/outbox.md.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import RedactionError
from clawloop_edge.pool.crypt import POOL_SCOPE
from clawloop_edge.pool.curation import Curations
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.batch import Collected, Collector, Draft, LineRedactor, Maker
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.items import Facts
from clawloop_edge.privacy.schema import ItemState, item_scope, read_cursor, read_words, write_cursor, write_words
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level

if TYPE_CHECKING:
    from sqlite_utils import Database

KIND = "steps.v1"
_LEFT_OUT = "outbox.left_out"
_PSEUDONYM_BYTES = 16


class Filler:
    """Makes the items of one pool. `hold_ms`: how long an item of a level rests before it may leave by itself."""

    def __init__(
        self,
        pool: Pool,
        consent: ConsentLog,
        *,
        hold_ms: Mapping[Level, int],
        redactor: LineRedactor | None,
        clock: Callable[[], int],
    ) -> None:
        self._pool, self._consent, self._clock = pool, consent, clock
        self._hold_ms, self.redactor = hold_ms, redactor
        self._stopping = threading.Event()

    def fill(self) -> int:
        """Make items of what was kept since the last time; gives how many were made."""
        self._consent.settle()
        made = 0
        while (collected := self._collect()[0]) is not None:
            maker = Maker(self.redactor, self._pseudonym, proceed=self._proceed)
            drafts = maker.drafts(collected.sources)
            left_out = collected.left_out + maker.left_out
            put = partial(self._put, collected=collected, drafts=drafts, left_out=left_out)
            made += self._pool.submit(put).result()
        return made

    def stop(self) -> None:
        """Have a `fill` that runs in another thread end soon, and fail; what it has not put in yet is made again."""
        self._stopping.set()

    def left_out(self) -> dict[str, int]:
        """Why steps that their level would let out stayed at home, with how many."""
        found = self._pool.get_state(_LEFT_OUT)
        return msgspec.msgpack.decode(found, type=dict[str, int]) if found else {}

    def waits_for_redactor(self) -> bool:
        """Whether the next record must be redacted, and there is nothing here to do it with."""
        return self._collect()[1]

    def _collect(self) -> tuple[Collected | None, bool]:
        """What is new and may leave, and whether more waits for a redactor."""
        with self._pool.reading() as reading:
            allowance = self._consent.within(reading.database)
            if not allowance.state.level.sends_steps:
                return None, False
            collector = Collector(reading, allowance, can_redact=self.redactor is not None)
            at = [read(reading.database, self._pool.keyring) for read in (read_cursor, read_words)]
            return collector.collect(*at), collector.stopped

    def _proceed(self) -> None:
        if self._stopping.is_set():
            raise RedactionError("the outbox is not filled any further: the edge is stopping")

    def _pseudonym(self, kind: str, name: str) -> str:
        value = name.encode("utf-8", "surrogatepass")
        return f"{kind}-{self._pool.tag(f'pseudonym/{kind}', value)[:_PSEUDONYM_BYTES].hex()}"

    # Inside a write transaction

    def _put(
        self, database: "Database", *, collected: Collected, drafts: Sequence[Draft], left_out: Counter[str]
    ) -> int:
        """Insert the items and move the cursor, if nothing they were built on has changed; gives items made."""
        if not self._holds(database, collected):
            return 0
        write_cursor(database, self._pool.keyring, seq=collected.upto)
        write_words(database, self._pool.keyring, seq=collected.said)
        forgotten = self._pool.tombstones.forgotten_sessions(database, {draft.session_id for draft in drafts})
        drafts = [draft for draft in drafts if draft.session_id not in forgotten]
        for draft in drafts:
            self._insert(database, draft, collected=collected)
        if left_out:
            found = read_state(database, self._pool.keyring, name=_LEFT_OUT)
            counts = left_out + Counter(msgspec.msgpack.decode(found, type=dict[str, int]) if found else {})
            write_state(database, self._pool.keyring, name=_LEFT_OUT, value=msgspec.msgpack.encode(dict(counts)))
        return len(drafts)

    def _holds(self, database: "Database", collected: Collected) -> bool:
        allowance = self._consent.within(database)
        receipt = allowance.state.receipt
        if receipt is None or receipt.receipt_id != collected.receipt_id or not allowance.state.level.sends_steps:
            return False
        at = [read(database, self._pool.keyring) for read in (read_cursor, read_words)]
        if at != [collected.cursor, collected.heard]:
            return False
        if Curations(database, self._pool.keyring).last_seq() != collected.curated:
            return False
        ladders = collected.ladders.items()
        return all(allowance.ladder(name, app=collected.apps[name]) == ladder for name, ladder in ladders)

    def _insert(self, database: "Database", draft: Draft, *, collected: Collected) -> None:
        keyring, item_id, now_ms = self._pool.keyring, new_id(), self._clock()
        facts = Facts(
            sha256=sha256(draft.body),
            steps=len(draft.steps),
            signals=len(draft.signals),
            marks=len(draft.marks),
            created_ms=now_ms,
            app=collected.apps[draft.session_id],
            redacted=draft.redacted_tokens,
        )
        scope = keyring.find(database, POOL_SCOPE)
        sealed = scope.seal("outbox", item_id, column="facts", plain=msgspec.msgpack.encode(facts))
        body = keyring.ensure(database, item_scope(item_id)).seal("outbox", item_id, column="body", plain=draft.body)
        insert = (
            "INSERT INTO outbox (item_id, session_id, level, state, kind, receipt_id, release_ms, received_ms, size,"
            " facts, body) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?)"
        )
        plain = (item_id, draft.session_id, draft.level, ItemState.QUEUED, KIND, collected.receipt_id)
        release_ms = now_ms + self._hold_ms[draft.level]
        database.conn.execute(insert, (*plain, release_ms, len(draft.body), sealed, body))
        renamed = ((own, item_id, "" if own == sent_as else sent_as) for own, sent_as in draft.sent_as.items())
        query = "INSERT INTO outbox_records (record_id, item_id, sent_as) VALUES (?, ?, ?)"
        database.conn.executemany(query, renamed)
