"""Forgetting at the owner's word: what it takes, what of it had left, and doing it. Format: docs/formats/pool.md.

One transaction takes sessions out of pool and outbox, queues the requests to servers that got anything of them, and
writes down in the audit log how much was forgotten. What remains then is the pool's (`finishing`) and the network's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.pool.finishing import Part, finish
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import SessionSummary
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.audit import FORGET, AuditLog
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.deletions import Deletions, Server
from clawloop_edge.privacy.going import Left, left_sessions, what_left
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from sqlite_utils import Database

_NOWHERE = Server(url="", root_key=b"")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which sessions are meant: those of these ids, or those that were in use between two times (ms since 1970) and are
    of one app, as far as these are given; or `everything`."""

    session_ids: Sequence[str] = ()
    app: str = ""
    since_ms: int = 0
    until_ms: int = 1 << 62
    everything: bool = False

    def takes(self, session: SessionSummary) -> bool:
        """Whether this session is meant."""
        if self.everything:
            return True
        if self.session_ids and session.session_id not in self.session_ids:
            return False
        in_use = session.last_ms >= self.since_ms and session.first_ms <= self.until_ms
        return in_use and self.app in ("", session.app)


class Gone(msgspec.Struct, frozen=True, kw_only=True):
    """What left this device for one server: so many records, the first of them at `since_ms`."""

    server: Server
    records: int
    since_ms: int


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """What would go, and what of it had left."""

    sessions: list[SessionSummary]
    steps: int
    first_ms: int
    last_ms: int
    left: list[Gone]


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What went. `requests` are the deletions that servers are asked for."""

    sessions: int
    steps: int
    signals: int
    size_bytes: int
    requests: list[str]


class Forgetter:
    """Forgets in one pool. `servers` are those that this device knows, the latest first."""

    def __init__(self, pool: Pool, servers: Sequence[Server], *, clock: Callable[[], int] = wall_clock_ms) -> None:
        self._pool, self._servers = pool, servers
        self._consent, self._audit = ConsentLog(pool, clock=clock), AuditLog(pool, clock=clock)
        self.deletions = Deletions(pool, clock=clock)

    def preview(self, wanted: Wanted) -> Preview:
        """What would go now."""
        with self._pool.reading() as reading:
            sessions = _sessions(reading, wanted)
            old = left_sessions(reading.database, self._pool.keyring)
            sessions += [session for session in old if wanted.takes(session)]
            ids = None if wanted.everything else [session.session_id for session in sessions]
            left = what_left(reading.database, self._pool.keyring, session_ids=ids)
        return Preview(
            sessions=sessions,
            steps=sum(session.steps for session in sessions),
            first_ms=min((session.first_ms for session in sessions), default=0),
            last_ms=max((session.last_ms for session in sessions), default=0),
            left=[
                Gone(server=server, records=sum(len(each.names) for each in found), since_ms=found[0].since_ms)
                for server, found in self._by_server(left)
            ],
        )

    def left_named(self, start: str) -> list[str]:
        """The sessions whose ids begin so, that are not kept here any more, and of which something had left."""
        with self._pool.read() as database:
            found = left_sessions(database, self._pool.keyring)
        return [session.session_id for session in found if session.session_id.startswith(start)]

    def forget(self, preview: Preview, *, everything: bool = False, keep_remote: bool = False) -> Done:
        """Forget the sessions that were shown, as they are by now; or everything. `finish` is to be called then.

        `keep_remote`: no server is asked to delete what it got.
        """
        ids = [session.session_id for session in preview.sessions]

        def operation(database: "Database") -> Done:
            left = what_left(database, self._pool.keyring, session_ids=None if everything else ids)
            found = self._pool.forgetting.forget(database, ids, everything=everything)
            requests = [] if keep_remote else self._ask(database, left, everything=everything)
            self._audit.append_in(database, FORGET, size_bytes=found.size_bytes, sha256="", receipt_id="", item_id="")
            return Done(
                sessions=len(found.session_ids),
                steps=len(found.step_ids),
                signals=len(found.signal_ids),
                size_bytes=found.size_bytes,
                requests=requests,
            )

        return self._pool.submit(operation).result()

    def finish(self, progress: Callable[[Part], None] = lambda part: None) -> list[str]:
        """See that no earlier copy of a file brings it back; gives, as sentences, what could not be done now.

        `progress` is told of each part before it is done.
        """
        return finish(self._pool, progress=progress)

    def _ask(self, database: "Database", left: Sequence[Left], *, everything: bool) -> list[str]:
        requests = []
        for server, found in self._by_server(left):
            names = list(dict.fromkeys(name for each in found for name in each.names))
            requests += self.deletions.add_in(database, server, names=names, everything=everything)
        return requests

    def _by_server(self, left: Sequence[Left]) -> list[tuple[Server, list[Left]]]:
        """What left, by the server that the consent to it named."""
        recipients = self._recipients() if left else {}
        found: dict[bytes, tuple[Server, list[Left]]] = {}
        for each in left:
            server = recipients.get(each.receipt_id) or next(iter(self._servers), _NOWHERE)
            found.setdefault(server.root_key, (server, []))[1].append(each)
        return list(found.values())

    def _recipients(self) -> dict[str, Server]:
        """The server of each consent. A consent that cannot be checked must not stand in the way of forgetting."""
        known = {server.root_key: server for server in reversed(self._servers)}
        try:
            receipts = self._consent.receipts()
        except ClawloopError:
            return {}
        named = ((receipt.receipt_id, receipt.recipient) for receipt in receipts)
        return {name: known.get(to.key) or Server(url=to.url, root_key=to.key) for name, to in named}


def _sessions(reading: Reading, wanted: Wanted) -> list[SessionSummary]:
    """The sessions that are meant and kept, last used first."""
    query = "SELECT session_id, steps, trainable, last_ms FROM sessions WHERE last_ms >= ? ORDER BY last_ms DESC"
    rows = reading.database.conn.execute(query, (wanted.since_ms,)).fetchall()
    named = set(wanted.session_ids)
    found = (_summary(reading, row) for row in rows if not named or row[0] in named)
    return [session for session in found if wanted.takes(session)]


def _summary(reading: Reading, row: tuple[str, int, int, int]) -> SessionSummary:
    """A session's line; of a damaged one, which must go as well, what is plain of it."""
    session_id, steps, trainable, last_ms = row
    plain = SessionSummary(
        session_id=session_id,
        app="",
        title="(cannot be read)",
        steps=steps,
        trainable=trainable,
        first_ms=last_ms,
        last_ms=last_ms,
    )
    try:
        return reading.session(session_id) or plain
    except ClawloopError:
        return plain
