"""Who allowed what, and to whom: the level in force, lower ones for an app or a session, and the pause. Read from the
database at each use, so that one process may lower it while another uploads. Format: docs/formats/outbox.md.

Off is the default, and what everything doubtful means: an expired receipt, another server, a changed policy text. A
doubt that was seen is written down, so that it stays off until its owner is asked again, also if the doubt goes away.
"""

import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ConsentError
from clawloop_edge.pool.heads import current
from clawloop_edge.pool.state import read_state, write_state
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.going import goes_with
from clawloop_edge.privacy.items import Items, OutboxItem
from clawloop_edge.privacy.ladder import EVERYTHING, NOTHING, Ladder, Rung
from clawloop_edge.privacy.limits import Limit, Limits, Subject
from clawloop_edge.privacy.policy import DATA, POLICY_VERSION, PURPOSES, VALID_MS, policy_sha256
from clawloop_edge.privacy.receipts import Receipt, ReceiptChain, Recipient, device_key
from clawloop_edge.privacy.schema import prepare, purge_queue, read_cursor, take_back, write_cursor, write_words
from clawloop_shared import signing
from clawloop_shared.errors import SignatureInvalid
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level, lower

if TYPE_CHECKING:
    from sqlite_utils import Database

__all__ = ["Allowance", "ConsentLog", "ConsentState", "Receipt", "Recipient", "device_key", "wall_clock_ms"]

_RECIPIENT = "consent.recipient"


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class ConsentState(msgspec.Struct, frozen=True):
    """What holds now for the whole device. `level` obeys `chosen` unless `reason` tells why it is off.

    `ladder` is what the receipt allows of what was kept when, pauses aside; nothing if the receipt no longer holds.
    """

    level: Level
    chosen: Level
    reason: str
    receipt: Receipt | None
    ladder: Ladder = NOTHING
    paused_until_ms: int = 0


class ConsentLog:
    """The owner's decisions in a pool, and what follows from them. What writes waits for the disk."""

    def __init__(self, pool: Pool, *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._clock = pool, clock
        self._receipts, self._limits, self._items = ReceiptChain(pool), Limits(pool), Items(pool.keyring)
        prepare(pool)
        pool.forgetting.goes_with("privacy", partial(goes_with, pool=pool))

    def level(self) -> Level:
        """What may leave now. Cheap; reads the database each time."""
        return self.state().level

    def state(self) -> ConsentState:
        """What may leave now, and why."""
        with self._pool.read() as database:
            return self.state_in(database)

    def state_in(self, database: "Database") -> ConsentState:
        """The same inside a transaction or snapshot.

        Raises:
            SignatureInvalid: the latest receipt is not one that this device signed; nothing may leave.
        """
        receipt = self._receipts.latest(database)
        if receipt is None:
            return ConsentState(Level.OFF, Level.OFF, "never asked", None)
        reason = self._doubt(receipt, database)
        if reason:
            return ConsentState(Level.OFF, receipt.chosen, reason, receipt)
        pause = self._limits.find(database, Subject.PAUSE)
        until_ms = pause.until_ms if pause and self._clock() < pause.until_ms else 0
        if until_ms and receipt.level is not Level.OFF:
            reason = f"everything is paused until {datetime.fromtimestamp(until_ms / 1000):%Y-%m-%d %H:%M}"
        level = Level.OFF if reason else receipt.level
        return ConsentState(level, receipt.level, reason, receipt, receipt.ladder, until_ms)

    def within(self, database: "Database", *, supposed: Ladder | None = None) -> "Allowance":
        """What may leave of single sessions, as this transaction or snapshot sees it; `supposed` the device's owner
        had allowed that.
        """
        state = self.state_in(database)
        if supposed is not None:
            state = msgspec.structs.replace(state, ladder=supposed)
        return Allowance(database, state, limits=self._limits)

    def limits(self) -> list[Limit]:
        """The limits of apps and sessions that are in force, by name."""
        with self._pool.read() as database:
            found = [limit for limit in self._limits.all(database) if limit.subject is not Subject.PAUSE]
        return sorted((limit for limit in found if limit.level is not Level.FULL), key=lambda x: (x.subject, x.name))

    def set_level(self, level: Level, *, past_after: int | None = None) -> Receipt:
        """Write down the owner's decision. It holds at once: what waits in the outbox and may no longer leave is
        destroyed, and what was kept before more may leave stays at home. With `past_after`, what was kept after that
        change may leave as well.
        """
        private = device_key(self._pool)

        def operation(database: "Database") -> Receipt:
            return self._decide(database, level, past_after=past_after, private=private)

        return self._pool.submit(operation).result()

    def set_limit(self, subject: Subject, name: str, *, level: Level) -> Limit:
        """Let at most `level` leave of an app or a session. A lower limit destroys what waits of it; a higher one holds
        for what comes after.

        Raises:
            ConsentError: `level` is above the device's own, so it would allow what its owner did not.
        """

        def operation(database: "Database") -> Limit:
            device = self.state_in(database).ladder.latest
            if level.rank > device.rank:
                raise ConsentError(
                    f"{subject} {name}: {level} is above this device's level {device}, and a limit can only be lower; "
                    f"raise the device's level first (privacy set {level}), or choose at most {device} here"
                )
            return self._limit(database, subject, name, level=level)

        return self._pool.submit(operation).result()

    def lift_limit(self, subject: Subject, name: str) -> None:
        """Let the device's level hold again for an app or a session, for what comes after."""
        self._pool.submit(lambda database: self._limit(database, subject, name, level=Level.FULL)).result()

    def pause(self, until_ms: int) -> None:
        """Let nothing leave until then, and never what is kept meanwhile. What waits, waits on."""

        def operation(database: "Database") -> None:
            self._settle(database)
            ladder = self._pause_ladder(database)
            if ladder.latest is not Level.OFF:
                ladder = ladder.followed_by(Level.OFF, after_seq=current(database).seq)
            self._put(database, Subject.PAUSE, "", ladder=ladder, until_ms=until_ms)

        self._pool.submit(operation).result()

    def resume(self) -> bool:
        """End a pause now; whether there was one that was not over yet."""

        def operation(database: "Database") -> bool:
            lasts = self._ended(database, now=True) and not self._ended(database)
            self._settle(database, now=True)
            return lasts

        return self._pool.submit(operation).result()

    def settle(self) -> None:
        """Write down what has come about without its owner's word: a pause that is over (what is kept after this may
        leave again), and a doubt (nothing leaves any more until its owner is asked again).
        """
        with self._pool.read() as database:
            ended, doubtful = self._ended(database), self._doubted(database) is not None
        if ended:
            self._pool.submit(self._settle).result()
        if doubtful:
            self._pool.submit(partial(self._withdraw, private=device_key(self._pool))).result()

    def set_recipient(self, recipient: Recipient) -> None:
        """Name the server that this device has joined. A receipt that names another one no longer holds."""
        private, value = device_key(self._pool), msgspec.msgpack.encode(recipient)

        def operation(database: "Database") -> None:
            write_state(database, self._pool.keyring, name=_RECIPIENT, value=value)
            self._withdraw(database, private=private)

        self._pool.submit(operation).result()

    def receipts(self) -> list[Receipt]:
        """All receipts, oldest first, after checking signatures and chain.

        Raises:
            SignatureInvalid: a receipt was not signed by this device.
            ConsentError: a receipt is missing from the chain.
        """
        with self._pool.read() as database:
            return list(self._receipts.all(database))

    # Inside a write transaction

    def _decide(self, database: "Database", level: Level, *, past_after: int | None, private: bytes) -> Receipt:
        before = self.state_in(database).ladder if self._checked(database) else NOTHING
        last = current(database).seq
        ladder = before.lowered(level)
        if past_after is not None or ladder.latest is not level:
            ladder = ladder.followed_by(level, after_seq=last if past_after is None else min(past_after, last))
        receipt = self._receipt(database, ladder, private=private)
        self._receipts.append(database, receipt, private=private)
        write_words(database, self._pool.keyring, seq=0)
        if not before.latest.sends_items:
            purge_queue(database, self._pool.keyring)
        self._purge(database)
        if past_after is not None:
            back_to = min(past_after, read_cursor(database, self._pool.keyring))
            write_cursor(database, self._pool.keyring, seq=back_to)
        return receipt

    def _withdraw(self, database: "Database", *, private: bytes) -> None:
        """Write down that the latest receipt holds no more, if it does not, and take back what waits."""
        found = self._doubted(database)
        if found is None:
            return
        receipt, doubt = found
        withdrawn = self._receipt(database, NOTHING, private=private)
        withdrawn = msgspec.structs.replace(withdrawn, doubt=doubt, doubted=receipt.level)
        self._receipts.append(database, withdrawn, private=private)
        purge_queue(database, self._pool.keyring)

    def _receipt(self, database: "Database", ladder: Ladder, *, private: bytes) -> Receipt:
        *earlier, last = ladder.rungs
        return Receipt(
            receipt_id=new_id(),
            level=last.level,
            device_key=signing.public_key(private),
            recipient=self._recipient(database),
            purposes=PURPOSES[last.level],
            data=DATA[last.level],
            policy_version=POLICY_VERSION,
            policy_sha256=policy_sha256(last.level),
            given_ms=self._clock(),
            expires_ms=self._clock() + VALID_MS,
            after_seq=last.after_seq,
            previous_sha256=self._receipts.last_sha256(database),
            earlier=[] if earlier == [Rung(0, Level.OFF)] else earlier,
        )

    def _limit(self, database: "Database", subject: Subject, name: str, *, level: Level) -> Limit:
        found = self._limits.find(database, subject, name=name)
        ladder = (found.ladder if found else EVERYTHING).lowered(level)
        if ladder.latest is not level:
            ladder = ladder.followed_by(level, after_seq=current(database).seq)
        limit = self._put(database, subject, name, ladder=ladder)
        self._purge(database)
        return limit

    def _purge(self, database: "Database") -> None:
        """Destroy what waits in the outbox above the level that its session has now. A pause destroys nothing."""
        device = self.state_in(database).ladder.latest
        allowance = self.within(database)
        gone = [
            item.item_id
            for item in self._items.waiting(database)
            if item.level.rank > lower(device, allowance.limit_of(item)).rank
        ]
        take_back(database, self._pool.keyring, item_ids=gone)

    def _put(self, database: "Database", subject: Subject, name: str, *, ladder: Ladder, until_ms: int = 0) -> Limit:
        limit = Limit(subject=subject, name=name, ladder=ladder, set_ms=self._clock(), until_ms=until_ms)
        self._limits.put(database, limit)
        write_words(database, self._pool.keyring, seq=0)
        return limit

    def _settle(self, database: "Database", *, now: bool = False) -> None:
        if self._ended(database, now=now):
            ladder = self._pause_ladder(database).followed_by(Level.FULL, after_seq=current(database).seq)
            self._put(database, Subject.PAUSE, "", ladder=ladder)

    # Inside any transaction or snapshot

    def _ended(self, database: "Database", *, now: bool = False) -> bool:
        """Whether there is a pause that is over, or is to be over now, and not yet written down as that."""
        pause = self._limits.find(database, Subject.PAUSE)
        return pause is not None and pause.level is Level.OFF and (now or self._clock() >= pause.until_ms)

    def _pause_ladder(self, database: "Database") -> Ladder:
        pause = self._limits.find(database, Subject.PAUSE)
        return pause.ladder if pause else EVERYTHING

    def _doubted(self, database: "Database") -> tuple[Receipt, str] | None:
        """The latest receipt and why it no longer holds, if that was not written down yet."""
        receipt = self._checked(database)
        if receipt is None or receipt.level is Level.OFF:
            return None
        doubt = self._doubt(receipt, database)
        return (receipt, doubt) if doubt else None

    def _checked(self, database: "Database") -> Receipt | None:
        """The latest receipt; None also for one that this device did not sign: it allows nothing, and must not keep its
        owner from deciding anew."""
        try:
            return self._receipts.latest(database)
        except (ConsentError, SignatureInvalid):
            return None

    def _doubt(self, receipt: Receipt, database: "Database") -> str:
        """Why a receipt no longer holds; empty if it does."""
        if receipt.level is Level.OFF:
            return receipt.doubt
        if self._clock() >= receipt.expires_ms:
            return "the consent is over a year old"
        if receipt.recipient.key != self._recipient(database).key:
            return "the consent was given for another server"
        if receipt.policy_sha256 != policy_sha256(receipt.level):
            return "what the level means has changed"
        return ""

    def _recipient(self, database: "Database") -> Recipient:
        found = read_state(database, self._pool.keyring, name=_RECIPIENT)
        return msgspec.msgpack.decode(found, type=Recipient) if found else Recipient()


class Allowance:
    """What may leave of single sessions, as one transaction or snapshot sees it; each fact is read once.

    An item without a session (made before items knew theirs) may be of any: the lowest limit there is holds for it.
    """

    def __init__(self, database: "Database", state: ConsentState, *, limits: Limits) -> None:
        self._database, self.state, self._limits = database, state, limits
        self._found: dict[tuple[Subject, str], Limit | None] = {}
        self._apps: dict[str, frozenset[str]] = {}

    def level(self, session_id: str, *, app: str) -> Level:
        """The level of a session now: the device's, or a lower one of its app or its own."""
        return lower(self.state.level, self.limit(session_id, app=app))

    def limit(self, session_id: str, *, app: str) -> Level:
        """The lower of the limits of a session and its app; `full` if there is none."""
        if not session_id:
            found = [limit.level for limit in self._limits.all(self._database) if limit.subject is not Subject.PAUSE]
            return min(found, key=lambda level: level.rank, default=Level.FULL)
        return self._cap(session_id, app).latest

    def limit_of(self, item: OutboxItem) -> Level:
        """The lowest limit of what an item is of: its session, or all those that a delta was learned from."""
        if item.delta is None:
            return self.limit(item.session_id, app=item.app)
        # The apps of a session are looked up where any app has a limit, so theirs need not be known here.
        found = [self.limit(session_id, app="") for session_id in item.sessions]
        return min(found, key=lambda level: level.rank, default=Level.OFF)

    def lets_out(self, item: OutboxItem) -> bool:
        """Whether an item may leave as far as levels go."""
        return item.level.rank <= lower(self.state.level, self.limit_of(item)).rank

    def ladder(self, session_id: str, *, app: str) -> Ladder:
        """What may leave of a session, of what was kept when.

        What was kept in a pause never leaves, nor what follows it in the same session: later prompts repeat it.
        """
        found = self.state.ladder.least(self._cap(session_id, app))
        pause = self._limit(Subject.PAUSE, "")
        if pause is None:
            return found
        touched_seq = self._first_pause_of(session_id, pause.ladder)
        found = found.least(pause.ladder)
        return found if touched_seq is None else found.followed_by(Level.OFF, after_seq=touched_seq)

    def _cap(self, session_id: str, app: str) -> Ladder:
        """The least of a session's limit and those of `app` and of every app that has spoken in it."""
        apps = sorted({app, *self._apps_in(session_id)})
        found = EVERYTHING
        for limit in (self._limit(Subject.SESSION, session_id), *(self._limit(Subject.APP, name) for name in apps)):
            found = found.least(limit.ladder) if limit else found
        return found

    def _apps_in(self, session_id: str) -> frozenset[str]:
        if session_id not in self._apps:
            self._apps[session_id] = self._limits.apps_in(self._database, session_id)
        return self._apps[session_id]

    def _limit(self, subject: Subject, name: str) -> Limit | None:
        if (subject, name) not in self._found:
            self._found[subject, name] = self._limits.find(self._database, subject, name=name)
        return self._found[subject, name]

    def _first_pause_of(self, session_id: str, pauses: Ladder) -> int | None:
        """The change before the first pause in which a session went on; None if there is none."""
        query = "SELECT 1 FROM steps WHERE session_id = ? AND seq > ? AND seq <= ? LIMIT 1"
        ends = [*(rung.after_seq for rung in pauses.rungs[1:]), 1 << 62]
        for rung, end in zip(pauses.rungs, ends, strict=True):
            parameters = (session_id, rung.after_seq, end)
            if rung.level is Level.OFF and self._database.conn.execute(query, parameters).fetchone():
                return rung.after_seq
        return None
