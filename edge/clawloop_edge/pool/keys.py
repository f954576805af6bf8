"""The pool's keys and where they are kept: the Keychain, a file that only its owner can read, or behind a passphrase.

Keys are made once, before the pool exists, and never again: a pool without its keys is an error, not a reason for new
ones. Format: docs/formats/pool.md.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.lock import FileLock
from clawloop_edge.pool.places import FilePlace, KeychainPlace, Place
from clawloop_shared.envelope import KEY_BYTES, derive_key
from clawloop_shared.errors import KeyMissing, StorageError
from clawloop_shared.files import private_folder

DATABASE_NAME = "pool.db"
KEY_LOCK_NAME = "key.lock"
"""held while keys are made or changed"""
_HEX_DIGITS = 2 * KEY_BYTES
_Hex = Annotated[str, Meta(pattern=f"^[0-9a-f]{{{_HEX_DIGITS}}}$")]


@dataclass(frozen=True)
class KeyBundle:
    """All that opens a pool. `keks` are its key-encryption keys by version: one, or two while the key is rotated.

    All keys are 32 bytes. `file_key` is SQLCipher's and stays what it is when the key is rotated.
    """

    file_key: bytes = field(repr=False)
    keks: Mapping[int, bytes] = field(repr=False)

    @classmethod
    def new(cls) -> "KeyBundle":
        """Fresh keys."""
        return cls(os.urandom(KEY_BYTES), {1: os.urandom(KEY_BYTES)})

    @classmethod
    def of(cls, kek: bytes) -> "KeyBundle":
        """The keys of a pool that was made with one key (32 bytes) for everything."""
        return cls(derive_key(kek, "clawloop pool file v1"), {1: kek})

    def encode(self) -> bytes:
        """One line of JSON."""
        keks = {version: key.hex() for version, key in self.keks.items()}
        return msgspec.json.encode(_Written(file=self.file_key.hex(), keks=keks)) + b"\n"

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> "KeyBundle":
        """What `encode` gave, or the one line of hex that a single key is.

        Raises:
            PoolError: it is neither; the text names `where` it came from, and nothing of it.
        """
        line = data.strip()
        if b"clawloop-sealed-keys" in line:
            raise PoolError(f'a passphrase seals the {where}; set `key = "passphrase"` in [pool]')
        try:
            if len(line) == _HEX_DIGITS:
                return cls.of(bytes.fromhex(line.decode("ascii")))
            found = msgspec.json.decode(line, type=_Written)
        except (ValueError, msgspec.DecodeError):
            raise PoolError(f"the {where} is damaged: it holds no keys of a pool; restore it from a copy") from None
        return cls(bytes.fromhex(found.file), {version: bytes.fromhex(key) for version, key in found.keks.items()})


class _Written(msgspec.Struct, frozen=True, tag_field="is", tag="clawloop-pool-keys.v1", forbid_unknown_fields=True):
    file: _Hex
    keks: Annotated[dict[Annotated[int, Meta(ge=1)], _Hex], Meta(min_length=1, max_length=8)]


class KeyStore(Protocol):
    """A place for the keys of one pool, and beside it one for its anchor (`anchor.py`); None: no anchor is kept."""

    @property
    def anchor(self) -> Place | None: ...

    @property
    def name(self) -> str:
        """Where the keys are, to a person."""
        ...

    def load(self) -> KeyBundle:
        """The keys.

        Raises:
            KeyMissing: there are none.
            PoolError: there may be some, but they cannot be had or must not be trusted.
        """
        ...

    @property
    def holds(self) -> bool:
        """Whether anything is there. Raises PoolError: that cannot be known, or it must not be trusted."""
        ...

    def create(self) -> KeyBundle:
        """Make and keep fresh keys.

        Raises:
            PoolError: there are some already, or the place cannot be written.
        """
        ...

    def put(self, bundle: KeyBundle) -> None:
        """Keep these keys where there are none.

        Raises:
            PoolError: there are some already, or the place cannot be written.
        """
        ...

    def remove(self) -> None:
        """Let go of keys and anchor for good. Raises PoolError: the place cannot be written."""
        ...

    def replace(self, bundle: KeyBundle) -> None:
        """Keep these keys in the place of those that are there: after a crash it is the ones or the others.

        Raises:
            PoolError, StorageError: the place cannot be written.
        """
        ...


class PlainKeyStore:
    """Keys as they are, in a place that keeps them from others."""

    def __init__(self, place: Place, anchor: Place) -> None:
        self._place, self.anchor = place, anchor

    @property
    def name(self) -> str:
        return self._place.name

    def load(self) -> KeyBundle:
        data = self._place.read()
        if data is None:
            raise KeyMissing(f"there is no {self.name}; restore it from where you keep it")
        return KeyBundle.decode(data, where=self.name)

    @property
    def holds(self) -> bool:
        return self._place.read() is not None

    def create(self) -> KeyBundle:
        bundle = KeyBundle.new()
        self.put(bundle)
        return bundle

    def put(self, bundle: KeyBundle) -> None:
        self._place.create(bundle.encode())

    def remove(self) -> None:
        self._place.remove()
        self.anchor.remove()

    def replace(self, bundle: KeyBundle) -> None:
        self._place.replace(bundle.encode())


class FileKeyStore(PlainKeyStore):
    """Keys in a file (`FilePlace`), the anchor in another beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(FilePlace(path, "key file"), anchor_file(path))


class KeychainKeyStore(PlainKeyStore):
    """Keys and anchor in two items of the login Keychain (`KeychainPlace`)."""

    def __init__(self, service: str, account: str) -> None:
        keys = KeychainPlace(service, account, what="pool key")
        super().__init__(keys, KeychainPlace(service, f"{account} (anchor)", what="anchor"))


class KnownKey:
    """Keys that are at hand: those of a backup that is looked into, or of a test. Keeps no anchor."""

    anchor = None
    name = "memory"
    holds = True

    def __init__(self, bundle: KeyBundle) -> None:
        self._bundle = bundle

    @classmethod
    def of(cls, kek: bytes) -> "KnownKey":
        """`KeyBundle.of(kek)`, at hand."""
        return cls(KeyBundle.of(kek))

    def load(self) -> KeyBundle:
        return self._bundle

    def create(self) -> KeyBundle:
        raise PoolError("these keys are at hand already; none are made")

    def put(self, bundle: KeyBundle) -> None:
        raise PoolError("there are keys at hand already")

    def remove(self) -> None:
        raise PoolError("these keys are at hand only; there is nothing to remove")

    def replace(self, bundle: KeyBundle) -> None:
        self._bundle = bundle


def anchor_file(key_file: Path) -> FilePlace:
    """The place of the anchor beside a key file."""
    return FilePlace(key_file.with_name(f"{key_file.name}.anchor"), "anchor file")


def key_lock(folder: Path) -> FileLock:
    """Wait for, and take, the right to make or change the keys of the pool in `folder`."""
    return FileLock.acquire(folder / KEY_LOCK_NAME, wait=True)


def open_keys(store: KeyStore, folder: Path) -> KeyBundle:
    """The keys of the pool in `folder`; made on the very first use, when there are neither keys nor a pool.

    Raises:
        KeyMissing: a pool is there, and its keys are not. Nothing is made or overwritten.
        PoolError: the keys cannot be had, or their file can be read by others.
        StorageError: the folder cannot be made.
    """
    try:
        private_folder(folder)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}; choose another --home") from error
    try:
        return store.load()
    except KeyMissing:
        pass  # looked for again below, where nobody else makes it
    with key_lock(folder):
        database = folder / DATABASE_NAME
        try:
            return store.load()
        except KeyMissing as error:
            if database.exists() and database.stat().st_size:
                raise KeyMissing(
                    f"{database} is there, but its key is not ({error}); a new key could not open it, so none is made"
                ) from error
        return store.create()
