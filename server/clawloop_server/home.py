"""The folder that holds all of a server's state: where each thing lies, and who may read it.

    config.toml  server.db  admin.token
    keys/      master.key root.key release.key and the TLS files, 0700
    keys/devices/  the devices' keys in the vault, each under the master key, 0700
    base/      <line_id>/ the model, <line_id>.json its line
    adapters/  <version>/ the files of an adapter and its manifest.bin
    trainer/ flower/ logs/   0700, each written by its own part
    blobs/ sums/   0700, made when needed: parts of large items, totals of secure sums

Knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from clawloop_server.errors import HomeError
from clawloop_shared.files import private_folder

VARIABLE = "CLAWLOOP_SERVER_HOME"


@dataclass(frozen=True)
class Home:
    """The paths of one server."""

    folder: Path

    @property
    def config(self) -> Path:
        """Settings, `config.ServerConfig` as TOML."""
        return self.folder / "config.toml"

    @property
    def database(self) -> Path:
        """Everything that is not a file of its own: devices, what they sent, rounds, releases."""
        return self.folder / "server.db"

    @property
    def admin_token(self) -> Path:
        """The bearer token of the admin API (0600)."""
        return self.folder / "admin.token"

    @property
    def keys(self) -> Path:
        """Private keys and the TLS files (0700)."""
        return self.folder / "keys"

    @property
    def device_keys(self) -> Path:
        """The devices' wrapped keys by id (0700)."""
        return self.keys / "devices"

    @property
    def bases(self) -> Path:
        """Model lines by id."""
        return self.folder / "base"

    @property
    def adapters(self) -> Path:
        """Adapters by version."""
        return self.folder / "adapters"

    @property
    def trainer(self) -> Path:
        """The trainer's checkpoints."""
        return self.folder / "trainer"

    @property
    def flower(self) -> Path:
        """Flower's own home and state."""
        return self.folder / "flower"

    @property
    def logs(self) -> Path:
        """Logs of the server and its children."""
        return self.folder / "logs"

    def folders(self) -> list[Path]:
        """Every folder of the home, itself first."""
        return [
            self.folder, self.keys, self.device_keys, self.bases, self.adapters, self.trainer, self.flower, self.logs
        ]  # fmt: skip


def default_folder() -> Path:
    """CLAWLOOP_SERVER_HOME, else the user's data folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return platformdirs.user_data_path("clawloop") / "server"


def create(folder: Path) -> Home:
    """Make the folders of a home (0700 each); those that exist are tightened.

    Raises:
        HomeError: `folder` is a file or belongs to someone else.
    """
    home = Home(folder.absolute())
    try:
        for path in home.folders():
            private_folder(path).chmod(0o700)
    except OSError as error:
        raise HomeError(f"cannot make {error.filename or folder}: {error.strerror}; give a folder of yours") from error
    return home


def open_home(folder: Path) -> Home:
    """An initialised home.

    Raises:
        HomeError: there is none, it belongs to another user, or others may write to it.
    """
    home = Home(folder.absolute())
    try:
        found = home.keys.stat()
    except OSError as error:
        raise HomeError(f"{folder} holds no server; run `clawloop-server init --home {folder}` first") from error
    if found.st_uid != os.geteuid():
        raise HomeError(f"{home.keys} belongs to user {found.st_uid}; run as the user who made it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise HomeError(f"{home.keys} is open to others ({stat.filemode(found.st_mode)}); run: chmod 700 {home.keys}")
    return home


def read_secret(path: Path) -> bytes:
    """The bytes of a private file, which must be a plain file of ours that no one else can read.

    Raises:
        HomeError: it is missing, a link, of another owner, or readable by others.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HomeError(f"cannot read {path}: {error.strerror}; restore it from your backup") from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise HomeError(f"{path} must be a file of yours that nobody else can read; run: chmod 600 {path}")
        return file.read()
