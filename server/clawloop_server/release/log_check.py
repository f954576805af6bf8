"""Whether the log of released adapters is what it was when each was released: everything is computed anew from the
manifests that the registry keeps, and held against what was written and signed then.

Names the first entries that were removed, changed or put elsewhere. Whoever can write the database and sign with the
release key can make another log that fits together; that one the devices find, which remember the heads they saw.
"""

from __future__ import annotations

import msgspec

from clawloop_server.vault.database import ServerDatabase
from clawloop_shared import merkle, signing, wire
from clawloop_shared.errors import InvalidError
from clawloop_shared.log_head import SignedHead, TreeHead, entry_leaf, open_head, read_head
from clawloop_shared.manifest import SignedManifest, open_manifest

MAX_TROUBLES = 20
"""of a line, as many are named; one that was removed puts all after it in the wrong place"""


class LogReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of the log of one line. `heads`: how many signed heads agree with it; `unchecked`: how many of
    them, and of the manifests, another key than the present release key signed, so that only their hashes are known."""

    line_id: str
    size: int
    root: str
    heads: int
    unchecked: int
    troubles: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.troubles


def check_logs(database: ServerDatabase, release_public: bytes) -> list[LogReport]:
    """A report for each line that has a log, or should have one."""
    with database.snapshot():
        lines = database.rows(
            "SELECT line_id FROM log_entries UNION SELECT line_id FROM log_heads"
            " UNION SELECT line_id FROM adapters WHERE manifest IS NOT NULL ORDER BY 1"
        )
        return [_Check(database, row[0], release_public).report() for row in lines]


class _Check:
    """The check of one line: what was recorded is read once, then walked in order."""

    def __init__(self, database: ServerDatabase, line_id: str, release_public: bytes) -> None:
        self._line_id, self._public = line_id, release_public
        self._key_id = signing.key_id(release_public)
        of_line = [line_id]
        self._entries: dict[int, tuple[int, str]] = {
            position: (version, digest)
            for position, version, digest in database.rows(
                "SELECT position, version, manifest_sha256 FROM log_entries WHERE line_id = ?", of_line
            )
        }
        self._manifests: dict[int, SignedManifest] = {
            version: wire.decode(manifest, SignedManifest)
            for version, manifest in database.rows(
                "SELECT version, manifest FROM adapters WHERE line_id = ? AND manifest IS NOT NULL", of_line
            )
        }
        self._nodes: dict[tuple[int, int], bytes] = {
            (level, position): found
            for level, position, found in database.rows(
                "SELECT level, position, hash FROM log_nodes WHERE line_id = ?", of_line
            )
        }
        self._heads: dict[int, list[SignedHead]] = {}
        for size, head in database.rows("SELECT size, head FROM log_heads WHERE line_id = ? ORDER BY size", of_line):
            self._heads.setdefault(size, []).append(wire.decode(head, SignedHead))
        leaves = [position for level, position in self._nodes if level == 0]
        ends = [*(position + 1 for position in (*self._entries, *leaves)), *self._heads]
        most = len(self._entries) + len(leaves) + len(self._heads)  # a number from the disk, not one to count up to
        self._size = max((end for end in ends if end <= most), default=0)
        self._fresh: dict[tuple[int, int], bytes] = {}
        self._troubles = [f"the log names entry {end - 1}, far beyond its end" for end in ends if not 0 <= end <= most]
        self._agreeing = self._unchecked = 0

    def report(self) -> LogReport:
        """Walk the log from its first entry on."""
        for position in range(self._size):
            known = len(self._troubles)
            leaf = self._leaf(position)
            self._compare_nodes(position, leaf, quiet=len(self._troubles) > known)
            for signed in self._heads.get(position + 1, []):
                self._compare_head(signed, size=position + 1)
        logged = {version for version, _ in self._entries.values()}
        for version in sorted(self._manifests.keys() - logged):
            self._say(f"adapter {version} was released and is not in the log: its entry was removed")
        return LogReport(
            line_id=self._line_id,
            size=self._size,
            root=merkle.root(self._size, self._read).hex(),
            heads=self._agreeing,
            unchecked=self._unchecked,
            troubles=self._troubles[:MAX_TROUBLES],
        )

    def _leaf(self, position: int) -> bytes:
        """The leaf that should be there, from the manifest itself where it is kept."""
        recorded = self._nodes.get((0, position), b"")
        if position not in self._entries:
            self._say(f"entry {position} was removed{self._formerly(recorded)}")
            return recorded
        version, digest = self._entries[position]
        name = f"entry {position} (adapter {version})"
        signed = self._manifests.get(version)
        if signed is None:
            self._say(f"{name}: its manifest was removed from the registry")
            return entry_leaf(version, digest)
        leaf = entry_leaf(version, signed.sha256)
        if leaf != recorded:
            self._say(f"{name} {self._what_happened(leaf, recorded)}")
        elif signed.sha256 != digest:
            self._say(f"{name} was changed: it names another manifest than the registry keeps")
        self._check_manifest(signed, version, name=name)
        return leaf

    def _what_happened(self, leaf: bytes, recorded: bytes) -> str:
        """Why the leaf of an entry is not the one that was recorded in its place."""
        places = [place for (level, place), found in self._nodes.items() if level == 0 and found == leaf]
        if places:
            return f"was put elsewhere: it was entry {places[0]}{self._formerly(recorded)}"
        return f"was changed after it was released{self._formerly(recorded)}"

    def _formerly(self, recorded: bytes) -> str:
        for version, signed in self._manifests.items():
            if entry_leaf(version, signed.sha256) == recorded:
                return f"; adapter {version} was released in its place"
        return ""

    def _check_manifest(self, signed: SignedManifest, version: int, *, name: str) -> None:
        if signed.key_id != self._key_id:
            self._unchecked += 1
            return
        try:
            manifest = open_manifest(signed, self._public)
        except InvalidError as error:
            self._say(f"{name} was changed: {error}")
            return
        if manifest.version != version:
            self._say(f"{name} was changed: its manifest is of adapter {manifest.version}")

    def _compare_nodes(self, position: int, leaf: bytes, *, quiet: bool) -> None:
        """Put the leaf behind those before it, and hold the subtrees that it completes against those recorded."""
        for level, place, found in merkle.appended(position, leaf, self._read):
            self._fresh[level, place] = found
            if level and not quiet and not self._troubles and self._nodes.get((level, place)) != found:
                span = f"{place << level} to {position}"
                self._say(f"the hash that was kept over entries {span} is gone or was changed")

    def _compare_head(self, signed: SignedHead, *, size: int) -> None:
        what = f"the head signed at {size} entries"
        try:
            head = self._opened(signed)
        except InvalidError as error:
            self._say(f"{what} was changed: {error}")
            return
        if (head.line_id, head.size) != (self._line_id, size):
            self._say(f"{what} was changed: it is of line {head.line_id} at {head.size}")
        elif head.root != merkle.root(size, self._read).hex():
            if not self._troubles:  # what put it out is named already
                self._say(f"{what} has another root: entry {size - 1} or one before it was changed, removed or moved")
        else:
            self._agreeing += 1

    def _opened(self, signed: SignedHead) -> TreeHead:
        if signed.key_id == self._key_id:
            return open_head(signed, self._public)
        self._unchecked += 1
        return read_head(signed)

    def _read(self, level: int, position: int) -> bytes:
        return self._fresh[level, position]

    def _say(self, trouble: str) -> None:
        self._troubles.append(trouble)
