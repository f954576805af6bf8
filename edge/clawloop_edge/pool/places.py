"""Where a small secret of this pool lies outside of it: a file that only its owner can read, or the Keychain.

The Keychain keeps it from who gets the disk or a backup; it does not keep it from programs of the same user. Knows
nothing of what the secret is.
"""

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Protocol

from clawloop_edge.errors import PoolError
from clawloop_shared.files import publish_secret, sync_folder

_MAX_BYTES = 64 << 10
_USE_A_FILE = "keep the key in a file: give --key-file to setup"
_NO_KEYCHAIN = f"unlock it (a session over ssh or cron has it locked), or {_USE_A_FILE}"


class Place(Protocol):
    """A place for one small secret; `name` says which, to a person."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes | None:
        """What lies there; None if nothing does.

        Raises:
            PoolError: something may be there, but it cannot be had or must not be trusted.
        """
        ...

    def create(self, data: bytes) -> None:
        """Put `data` there.

        Raises:
            PoolError: something is there already, or the place cannot be written.
        """
        ...

    def replace(self, data: bytes) -> None:
        """Put `data` there, in the place of what may be there: after a crash it is the one or the other.

        Not to be called by two at once.

        Raises:
            PoolError: the place cannot be written, or must not be trusted.
            StorageError: the folder cannot be written.
        """
        ...

    def remove(self) -> None:
        """Have nothing lie there any more.

        Raises:
            PoolError: the place cannot be written.
        """
        ...


class FilePlace:
    """A file: 0600, owned by the user, no link, in a folder that nobody else can write. `what` names it in errors."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    @property
    def name(self) -> str:
        return f"{self.what} {self.path}"

    def read(self) -> bytes | None:
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PoolError(f"{self.name}: {error.strerror}; it must be a plain file of yours") from error
        with os.fdopen(handle, "rb") as file:
            self._check(os.fstat(file.fileno()))
            return file.read(_MAX_BYTES)

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise PoolError(f"{self.name} is no plain file")
        if found.st_uid != os.geteuid():
            raise PoolError(f"{self.name} belongs to user {found.st_uid}, not to you; put a file of yours there")
        if found.st_mode & 0o077:
            mode = stat.S_IMODE(found.st_mode)
            raise PoolError(f"{self.name} has mode {mode:04o}, so others can read it; chmod 600 {self.path}")
        folder = self.path.parent.stat()
        if folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX:
            raise PoolError(
                f"others can write {self.path.parent}, where the {self.what} is; chmod 700 {self.path.parent}"
            )

    def create(self, data: bytes) -> None:
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, self.path)  # unlike a rename, a link never replaces a file that is there
            sync_folder(self.path.parent)
        except FileExistsError as error:
            raise PoolError(f"{self.name} exists already; it is not replaced") from error
        except OSError as error:
            raise PoolError(f"cannot write {self.name}: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)

    def replace(self, data: bytes) -> None:
        self.read()  # refuses a link, and a file that is another's
        publish_secret(self.path, data)
        self._remove_drafts()

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
            self._remove_drafts()
            sync_folder(self.path.parent)
        except OSError as error:
            raise PoolError(f"cannot remove {self.name}: {error.strerror}") from error

    def _remove_drafts(self) -> None:
        """What a process that died while it wrote has left holds secrets of then."""
        draft = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}")
        for path in self.path.parent.iterdir():
            if draft.fullmatch(path.name):
                path.unlink(missing_ok=True)


class KeychainPlace:
    """An item of the login Keychain (or of what `keyring` finds in its place).

    macOS has no way to change an item that `keyring` uses: it deletes the item and adds another. So what is new is put
    into a spare item first, and whoever finds no item reads the spare one.
    """

    def __init__(self, service: str, account: str, *, what: str) -> None:
        self.service, self.account, self.what = service, account, what

    @property
    def name(self) -> str:
        return f"{self.what} {self.service}/{self.account} in the keychain"

    def read(self) -> bytes | None:
        for account in (self.account, self._spare, self.account):  # a replacement may end between the first two
            text = self._get(account)
            if text is not None:
                return text.encode()
        return None

    def create(self, data: bytes) -> None:
        if self.read() is not None:
            raise PoolError(f"there is {self.name} already; it is not replaced")
        self._set(self.account, data.decode())

    def replace(self, data: bytes) -> None:
        spare = self._get(self._spare)
        if spare is not None and self._get(self.account) is None:  # an earlier replacement ended halfway
            self._set(self.account, spare)
        self._set(self._spare, data.decode())
        self._set(self.account, data.decode())
        self._remove(self._spare)

    def remove(self) -> None:
        for account in (self.account, self._spare):
            self._remove(account)

    @property
    def _spare(self) -> str:
        return f"{self.account} (being replaced)"

    def _get(self, account: str) -> str | None:
        import keyring
        from keyring.errors import KeyringError

        try:
            return keyring.get_password(self.service, account)
        except KeyringError as error:
            raise PoolError(f"the keychain cannot be read ({type(error).__name__}); {_NO_KEYCHAIN}") from error

    def _set(self, account: str, text: str) -> None:
        import keyring
        from keyring.errors import KeyringError

        try:
            keyring.set_password(self.service, account, text)
        except KeyringError as error:
            raise PoolError(f"the keychain cannot be written ({type(error).__name__}); {_NO_KEYCHAIN}") from error
        if self._get(account) != text:
            raise PoolError(f"the keychain gave back something else than was put in as {self.name}; {_USE_A_FILE}")

    def _remove(self, account: str) -> None:
        import keyring
        from keyring.errors import KeyringError, PasswordDeleteError

        try:
            keyring.delete_password(self.service, account)
        except PasswordDeleteError:
            if self._get(account) is not None:
                raise PoolError(
                    f"the keychain does not let go of {self.service}/{account}; delete it by hand"
                ) from None
        except KeyringError as error:
            raise PoolError(f"the keychain cannot be written ({type(error).__name__}); {_NO_KEYCHAIN}") from error
