"""Long texts, stored once: for all sessions what agents say in each of them (system prompts, tools, the ids that these
begin with), for one session what is said in it again and again. Named by blind indexes. Format: docs/formats/pool.md.

A shared part has a key of its own and goes with the last session that uses it. Knows nothing of steps.
"""

from typing import TYPE_CHECKING

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.chain import ID_BYTES
from clawloop_edge.pool.crypt import Keyring, Scope, blind
from clawloop_edge.pool.packing import ids_to_seal

if TYPE_CHECKING:
    from sqlite_utils import Database

SHARED_BYTES = 1024
"""what is said in all sessions is a part from this size on; under it, naming it would save little"""
OWN_BYTES = 4096
"""what is said in one session, where it is rarely stored again"""
BLOCK_BYTES = 2048 * ID_BYTES
"""a prompt's first ids are shared in blocks of 2,048"""
SHARED_PREFIX = "part/"
"""of the ids of shared parts, which are the names of their scopes"""


class SessionParts:
    """Stores the texts of one session. Needs a write transaction, the one that it lasts for."""

    def __init__(self, database: "Database", keyring: Keyring, *, index_key: bytes, session_id: str, scope: Scope):
        """`scope` is the session's."""
        self._database, self._keyring, self._index_key = database, keyring, index_key
        self._session_id, self._scope = session_id, scope
        self._used: set[str] = set()
        self.size = 0
        """bytes of the session's own parts that were stored"""
        self.own_bytes = 0
        """what was stored for this session alone"""

    def message(self, text: bytes, *, standing: bool) -> str:
        """The id of the part that holds a message; empty: it is better kept where it stands.

        `standing`: an agent says it in all of its sessions.
        """
        if standing and len(text) >= SHARED_BYTES:
            return self._keep_shared(text)
        return self._keep_own(text) if len(text) >= OWN_BYTES else ""

    def tools(self, text: bytes) -> str:
        """The id of the part that holds a list of tools."""
        return self._keep_shared(text) if len(text) >= SHARED_BYTES else self._keep_own(text)

    def opening(self, ids: bytes) -> list[str]:
        """The parts that hold the first ids of a prompt (`BLOCK_BYTES` each), as far as other sessions begin with them.

        What nobody has begun with is only noted, so that a prompt of its own kind costs nothing: the first session
        leaves a use without a part, the second makes the parts, all later ones find them.
        """
        found: list[str] = []
        noted = False
        for start in range(0, len(ids) - BLOCK_BYTES + 1, BLOCK_BYTES):
            block = ids_to_seal(ids[start : start + BLOCK_BYTES])
            part_id = self._name(block)
            if not (noted or _stored(self._database, part_id)):
                noted = is_used(self._database, part_id)
                if not noted:
                    self._use(part_id)
                    break
            found.append(self._keep_shared(block))
        return found

    def _keep_shared(self, text: bytes) -> str:
        part_id = self._name(text)
        if self._use(part_id) and not _stored(self._database, part_id):
            body = self._keyring.ensure(self._database, part_id).seal(
                "shared_parts", part_id, column="body", plain=text
            )
            insert = "INSERT INTO shared_parts (part_id, size, body) VALUES (?, ?, ?)"
            self._database.conn.execute(insert, (part_id, len(body), body))
        return part_id

    def _keep_own(self, text: bytes) -> str:
        part_id = blind(self._index_key, f"part/{self._session_id}", value=text)[:16].hex()
        run, names = self._database.conn.execute, (self._session_id, part_id)
        if run("SELECT 1 FROM parts WHERE session_id = ? AND part_id = ?", names).fetchone() is None:
            body = self._scope.seal("parts", part_id, column="body", plain=text)
            insert = "INSERT INTO parts (session_id, part_id, size, body) VALUES (?, ?, ?, ?)"
            run(insert, (*names, len(body), body))
            self.size += len(body)
            self.own_bytes += len(body)
        return part_id

    def _name(self, text: bytes) -> str:
        return SHARED_PREFIX + blind(self._index_key, "part", value=text)[:16].hex()

    def _use(self, part_id: str) -> bool:
        """Note that the session uses a part; False if it did so before in this transaction."""
        if part_id in self._used:
            return False
        self._used.add(part_id)
        insert = "INSERT OR IGNORE INTO part_refs (session_id, part_id) VALUES (?, ?)"
        self._database.conn.execute(insert, (self._session_id, part_id))
        return True


def read_part(database: "Database", keyring: Keyring, *, part_id: str, session_id: str, scope: Scope) -> bytes:
    """The text of a part that a session uses, whose scope this is.

    Raises:
        PoolError: it is not there.
    """
    shared = part_id.startswith(SHARED_PREFIX)
    table, where = ("shared_parts", "?2 = part_id") if shared else ("parts", "session_id = ?1 AND part_id = ?2")
    query = f"SELECT body FROM {table} WHERE {where}"  # noqa: S608  # names of ours
    row = database.conn.execute(query, (session_id, part_id)).fetchone()
    if row is None:
        raise PoolError(f"part {part_id} of session {session_id} is missing; run `clawloop-edge pool verify`")
    found = keyring.find(database, part_id) if shared else scope
    return found.unseal(table, part_id, column="body", sealed=row[0])


def release_parts(database: "Database", keyring: Keyring, session_id: str) -> int:
    """Let go of the shared parts of a session that goes: those that no other uses are destroyed with their keys.

    Needs the transaction that deletes the session, before its row is deleted. Gives the bytes of what was destroyed.
    """
    run, used = database.conn.execute, used_parts(database, session_id)
    run("DELETE FROM part_refs WHERE session_id = ?", (session_id,))
    freed = 0
    for part_id in used:
        if is_used(database, part_id):
            continue
        row = run("DELETE FROM shared_parts WHERE part_id = ? RETURNING size", (part_id,)).fetchone()
        freed += row[0] if row else 0
        keyring.destroy(database, part_id)
    return freed


def used_parts(database: "Database", session_id: str) -> list[str]:
    """The shared parts that a session uses, or has only noted."""
    query = "SELECT part_id FROM part_refs WHERE session_id = ?"
    return [row[0] for row in database.conn.execute(query, (session_id,)).fetchall()]


def is_used(database: "Database", part_id: str) -> bool:
    """Whether any session uses a shared part, or has only noted it."""
    return database.conn.execute("SELECT 1 FROM part_refs WHERE part_id = ?", (part_id,)).fetchone() is not None


def _stored(database: "Database", part_id: str) -> bool:
    return database.conn.execute("SELECT 1 FROM shared_parts WHERE part_id = ?", (part_id,)).fetchone() is not None
