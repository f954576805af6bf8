"""The log of released adapters: one a model line, append-only, with the heads that were signed over it.

Every manifest becomes an entry in the transaction that releases it. The hashes of complete subtrees are kept, so that
a proof takes O(log n) reads however long the log is. Whether all of it still fits together is `log_check`'s to say.
"""

from __future__ import annotations

import time
from functools import partial

import msgspec

from clawloop_server.errors import ReleaseError
from clawloop_server.vault.database import ServerDatabase
from clawloop_shared import merkle, signing, wire
from clawloop_shared.errors import StorageError
from clawloop_shared.log_head import LogProof, SignedHead, TreeHead, entry_leaf, read_head, sign_head

_VERIFY = "run `clawloop-server log verify`"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One released manifest: its place in the log of its line, its version, and the SHA-256 of its signed body."""

    position: int
    version: int
    manifest_sha256: str
    added_ms: int


class ReleaseLog:
    """The logs of all lines of a server."""

    def __init__(self, database: ServerDatabase) -> None:
        self._database = database

    def append(self, line_id: str, version: int, manifest_sha256: str, *, now_ms: int) -> None:
        """Put a manifest that is being released behind all others. Part of the transaction that is open.

        Raises:
            StorageError: a hash that is needed is gone.
        """
        with self._database.write() as database:
            position = self.size(line_id)
            leaf = entry_leaf(version, manifest_sha256)
            nodes = merkle.appended(position, leaf, partial(self._node, line_id))
            database.run(
                "INSERT INTO log_entries VALUES (?, ?, ?, ?, ?)", [line_id, position, version, manifest_sha256, now_ms]
            )
            database.run_each("INSERT INTO log_nodes VALUES (?, ?, ?, ?)", [(line_id, *node) for node in nodes])

    def size(self, line_id: str) -> int:
        """How many entries the log of a line has."""
        sql = "SELECT max(position) + 1 FROM log_entries WHERE line_id = ?"  # by the key, not one by one
        return self._database.count(sql, [line_id])

    def lines(self) -> list[str]:
        """The lines that have a log."""
        return [row[0] for row in self._database.rows("SELECT DISTINCT line_id FROM log_entries ORDER BY line_id")]

    def entries(self, line_id: str, *, limit: int) -> list[Entry]:
        """The last entries, newest first."""
        rows = self._database.rows(
            "SELECT position, version, manifest_sha256, added_ms FROM log_entries WHERE line_id = ?"
            " ORDER BY position DESC LIMIT ?",
            [line_id, limit],
        )
        return [Entry(**dict(zip(Entry.__struct_fields__, row, strict=True))) for row in rows]

    def root(self, line_id: str, size: int) -> bytes:
        """The root of the first `size` entries.

        Raises:
            StorageError: a hash that is needed is gone.
        """
        return merkle.root(size, partial(self._node, line_id))

    def head(self, line_id: str, *, key_id: str = "") -> SignedHead | None:
        """The head of the longest log that was signed, or that this key signed; None: none was yet."""
        rows = self._database.rows(
            "SELECT head FROM log_heads WHERE line_id = ?1 AND ?2 IN ('', key_id)"
            " AND size = (SELECT max(size) FROM log_heads WHERE line_id = ?1 AND ?2 IN ('', key_id))",
            [line_id, key_id],
        )
        signed = [wire.decode(row[0], SignedHead) for row in rows]
        return max(signed, key=lambda each: read_head(each).at_ms, default=None)

    def sign_head(self, line_id: str, private_key: bytes, *, now_ms: int | None = None) -> SignedHead:
        """The head over all entries, signed by the release key: the one that was signed before, or a new one.

        Raises:
            ReleaseError: a head with another root was signed for that size: the log was changed.
            StorageError: a hash that is needed is gone.
        """
        key = signing.key_id(signing.public_key(private_key))
        with self._database.write() as database:
            size = self.size(line_id)
            root = self.root(line_id, size).hex()
            rows = database.rows("SELECT head FROM log_heads WHERE line_id = ? AND size = ?", [line_id, size])
            signed = [wire.decode(row[0], SignedHead) for row in rows]
            if any(read_head(each).root != root for each in signed):
                raise ReleaseError(
                    f"the log of line {line_id} is not the one that a head was signed for at {size} entries: {_VERIFY}"
                )
            found = next((each for each in signed if each.key_id == key), None)
            if found is None:
                at_ms = now_ms or time.time_ns() // 1_000_000
                found = sign_head(TreeHead(line_id=line_id, size=size, root=root, at_ms=at_ms), private_key)
                values = [line_id, size, key, wire.encode(found)]
                database.run("INSERT INTO log_heads VALUES (?, ?, ?, ?)", values)
        return found

    def sign_heads(self, private_key: bytes) -> None:
        """Sign a head for each line that has none of this key: one whose entries are older than the log, or the key.

        Raises:
            ReleaseError, StorageError: as `sign_head`.
        """
        for line_id in self.lines():
            self.sign_head(line_id, private_key)

    def proof(self, version: int, from_size: int = 0, *, key_id: str = "") -> LogProof | None:
        """That a released version is in the log, and that the log goes on from that of `from_size` entries. None if no
        head was signed yet (by that key, whatever the clock said when another signed). A device that tells of a longer
        log than this gets no proof that it goes on: there is none.

        Raises:
            StorageError: a hash that is needed is gone.
        """
        with self._database.snapshot() as database:
            row = database.row("SELECT line_id, position FROM log_entries WHERE version = ?", [version])
            signed = self.head(row[0], key_id=key_id) if row else None
            if row is None or signed is None:
                return None
            (line_id, index), size = row, read_head(signed).size
            read, known = partial(self._node, line_id), 0 <= from_size <= size
            return LogProof(
                head=signed,
                index=index,
                inclusion=merkle.inclusion_proof(index, size, read),
                from_size=from_size if known else 0,
                consistency=merkle.consistency_proof(from_size, size, read) if known else [],
            )

    def _node(self, line_id: str, level: int, position: int) -> bytes:
        row = self._database.row(
            "SELECT hash FROM log_nodes WHERE line_id = ? AND level = ? AND position = ?", [line_id, level, position]
        )
        if row is None:
            raise StorageError(f"the log of line {line_id} lacks hash {position} of level {level}; {_VERIFY}")
        found: bytes = row[0]
        return found
