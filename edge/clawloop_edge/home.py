"""The edge's folder: where each of its files lies. Makes the folder (0700), and nothing else."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from clawloop_edge.config import EdgeConfig
from clawloop_shared import config
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import private_folder, publish_secret

ENVIRONMENT = "CLAWLOOP_EDGE_HOME"


@dataclass(frozen=True)
class EdgeHome:
    """Paths under one folder. Nothing of the edge lies outside it."""

    folder: Path

    @classmethod
    def at(cls, folder: Path | None = None) -> "EdgeHome":
        """The home that was named, or that of the environment, or the platform's own place for such data."""
        chosen = folder or os.environ.get(ENVIRONMENT) or platformdirs.user_data_path("clawloop") / "edge"
        return cls(Path(chosen).expanduser().absolute())

    @property
    def config_file(self) -> Path:
        return self.folder / "config.toml"

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @property
    def key_file(self) -> Path:
        return self.folder / "pool.key"

    @property
    def exists(self) -> bool:
        """Whether `setup` was run here."""
        return self.config_file.is_file()

    def require(self) -> "EdgeHome":
        """This home, if `setup` was run here.

        Raises:
            ConfigError: it was not.
        """
        if not self.exists:
            raise ConfigError(f"no edge at {self.folder}; run `clawloop-edge setup` or name its --home")
        return self

    def make(self) -> None:
        """Make the folder, readable by its owner alone."""
        private_folder(self.folder)

    def load_config(self) -> EdgeConfig:
        """The configuration. Raises ConfigError on an unknown key or a wrong type."""
        return config.load(self.config_file, EdgeConfig)

    def token(self) -> str:
        """The token that agents must send; made on first use.

        Raises:
            ConfigError: its file is empty.
        """
        if not self.token_file.is_file():
            publish_secret(self.token_file, (secrets.token_urlsafe(32) + "\n").encode())
        token = self.token_file.read_text().strip()
        if not token:
            raise ConfigError(f"{self.token_file} is empty; remove it, and a new token is made")
        return token
