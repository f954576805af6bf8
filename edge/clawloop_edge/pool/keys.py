"""Where the pool's key-encryption key lives: the Keychain, or a file that only its owner can read.

A key is made once, before the pool exists, and never again: a pool without its key is an error, not a reason for a new
key. The Keychain keeps the key from who gets the disk or a backup; it does not keep it from programs of the same user.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Protocol

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.lock import FileLock
from clawloop_shared.envelope import KEY_BYTES
from clawloop_shared.errors import KeyMissing
from clawloop_shared.files import private_folder, sync_folder

DATABASE_NAME = "pool.db"
_USE_A_FILE = "keep the key in a file: give --key-file to setup"
_NO_KEYCHAIN = f"unlock it (a session over ssh or cron has it locked), or {_USE_A_FILE}"


class KeyStore(Protocol):
    """A place for one 256-bit key."""

    def load(self) -> bytes:
        """The key (32 bytes).

        Raises:
            KeyMissing: there is none.
            PoolError: there may be one, but it cannot be had or must not be trusted.
        """
        ...

    def create(self) -> bytes:
        """Make and keep a fresh key (32 bytes).

        Raises:
            PoolError: there is one already, or the place cannot be written.
        """
        ...


class FileKeyStore:
    """A key file of one line of hex: 0600, owned by the user, no link, in a folder that nobody else can write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> bytes:
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise KeyMissing(f"no key file {self.path}; restore it from where you keep it") from error
        except OSError as error:
            raise PoolError(f"key file {self.path}: {error.strerror}; it must be a plain file of yours") from error
        with os.fdopen(handle, "rb") as file:
            self._check(os.fstat(file.fileno()))
            return _parse(file.read(256), str(self.path))

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise PoolError(f"key file {self.path} is no plain file")
        if found.st_uid != os.geteuid():
            raise PoolError(f"key file {self.path} belongs to user {found.st_uid}, not to you")
        if found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise PoolError(f"key file {self.path} has mode {mode:04o}, so others can read it; chmod 600 {self.path}")
        folder = self.path.parent.stat()
        if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
            raise PoolError(f"others can write {self.path.parent}, where the key file is; chmod 700 {self.path.parent}")

    def create(self) -> bytes:
        key = secrets.token_bytes(KEY_BYTES)
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(key.hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, self.path)  # unlike a rename, a link never replaces a key that is there
            sync_folder(self.path.parent)
        except FileExistsError as error:
            raise PoolError(f"key file {self.path} exists already; it is not replaced") from error
        except OSError as error:
            raise PoolError(f"cannot write key file {self.path}: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
        return key


class KeychainKeyStore:
    """A key in the login Keychain (or what `keyring` finds in its place)."""

    def __init__(self, service: str, account: str) -> None:
        self.service, self.account = service, account

    def load(self) -> bytes:
        import keyring
        from keyring.errors import KeyringError

        try:
            text = keyring.get_password(self.service, self.account)
        except KeyringError as error:
            raise PoolError(f"the keychain cannot be read ({type(error).__name__}); {_NO_KEYCHAIN}") from error
        if text is None:
            raise KeyMissing(f"no key {self.service}/{self.account} in the keychain; {_NO_KEYCHAIN}")
        return _parse(text.encode(), f"{self.service}/{self.account} in the keychain")

    def create(self) -> bytes:
        import keyring
        from keyring.errors import KeyringError

        key = secrets.token_bytes(KEY_BYTES)
        try:
            if keyring.get_password(self.service, self.account) is not None:
                raise PoolError(f"the keychain has a key {self.service}/{self.account} already; it is not replaced")
            keyring.set_password(self.service, self.account, key.hex())
        except KeyringError as error:
            raise PoolError(f"the keychain cannot be written ({type(error).__name__}); {_NO_KEYCHAIN}") from error
        if self.load() != key:
            raise PoolError(f"the keychain gave back another key than was put in; {_USE_A_FILE}")
        return key


def open_key(store: KeyStore, folder: Path) -> bytes:
    """The key of the pool in `folder`; made on the very first use, when there is neither key nor pool.

    Raises:
        KeyMissing: a pool is there, and its key is not. Nothing is made or overwritten.
        PoolError: the key cannot be had, or its file can be read by others.
    """
    private_folder(folder)
    with FileLock.acquire(folder / "key.lock", wait=True):
        database = folder / DATABASE_NAME
        try:
            return store.load()
        except KeyMissing as error:
            if database.exists() and database.stat().st_size:
                raise KeyMissing(
                    f"{database} is there, but its key is not ({error}); a new key could not open it, so none is made"
                ) from error
        return store.create()


def _parse(text: bytes, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise PoolError(f"the key {where} is damaged: it must be {2 * KEY_BYTES} hex digits; restore it from a copy")
    return key
