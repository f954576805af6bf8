"""The server's own keys: the master key of everything at rest, the root key, and the key that signs adapters.

Each is 32 raw bytes in a file that only its owner can read. A lost key is never replaced by a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from clawloop_server.errors import HomeError
from clawloop_server.home import Home, read_secret
from clawloop_shared import signing
from clawloop_shared.envelope import KEY_BYTES, new_data_key
from clawloop_shared.errors import KeyMissing
from clawloop_shared.files import publish_secret
from clawloop_shared.membership import RELEASE as RELEASE_PURPOSE
from clawloop_shared.membership import KeyStatement, sign_statement
from clawloop_shared.messages import SignedAnswer

MASTER, ROOT, RELEASE = "master.key", "root.key", "release.key"
_DAY_MS = 86_400_000
_STATEMENT_BEFORE_MS, _STATEMENT_FOR_MS = 2 * _DAY_MS, 365 * _DAY_MS


@dataclass(frozen=True)
class ServerKeys:
    """The private keys of a server."""

    master: bytes = field(repr=False)
    root: bytes = field(repr=False)
    release: bytes = field(repr=False)

    @property
    def root_public(self) -> bytes:
        """The key by which devices know this server."""
        return signing.public_key(self.root)

    def release_statement(self, *, now_ms: int) -> SignedAnswer:
        """The root key's word for the release key: from two days ago, for clocks that differ, for a year."""
        statement = KeyStatement(
            key=self.release_public,
            purpose=RELEASE_PURPOSE,
            not_before_ms=now_ms - _STATEMENT_BEFORE_MS,
            expires_ms=now_ms + _STATEMENT_FOR_MS,
        )
        return sign_statement(statement, self.root)

    @property
    def release_public(self) -> bytes:
        """The key by which devices check adapters."""
        return signing.public_key(self.release)


def create_keys(home: Home) -> ServerKeys:
    """Make the keys that are missing, unless there is a database that needs the old ones.

    Raises:
        KeyMissing: server.db is there but the master key is not.
    """
    if home.database.exists() and not (home.keys / MASTER).exists():
        raise KeyMissing(f"{home.database} is here but {home.keys / MASTER} is not; restore the key from your backup")
    for name, make in ((MASTER, new_data_key), (ROOT, signing.new_key), (RELEASE, signing.new_key)):
        if not (home.keys / name).exists():
            publish_secret(home.keys / name, make())
    return load_keys(home)


def load_keys(home: Home) -> ServerKeys:
    """Read the keys.

    Raises:
        HomeError: one is missing or readable by others.
        KeyMissing: one is damaged.
    """
    return ServerKeys(*(_load(home, name) for name in (MASTER, ROOT, RELEASE)))


def load_master_key(home: Home) -> bytes:
    """The master key alone, for the parts that must not be able to sign.

    Raises:
        HomeError: it is missing or readable by others.
        KeyMissing: it is damaged.
    """
    return _load(home, MASTER)


def _load(home: Home, name: str) -> bytes:
    path = home.keys / name
    if not path.exists():
        raise HomeError(f"{path} is missing; restore it from your backup, or run `clawloop-server init` in a new home")
    key = read_secret(path)
    if len(key) != KEY_BYTES:
        raise KeyMissing(f"{path} has {len(key)} bytes, not {KEY_BYTES}; restore it from your backup")
    return key
