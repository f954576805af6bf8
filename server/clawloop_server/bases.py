"""The model lines that this server trains: each a folder in base/, with its line and sizes beside it as JSON.

Knows no tensor library; the folder is taken as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec

from clawloop_server.errors import HomeError
from clawloop_server.home import Home
from clawloop_server.trainer.base_config import read_trainable
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import publish, sha256_file, sync_folder
from clawloop_shared.lora import ModelShape
from clawloop_shared.model_line import ModelLine, read_line, read_shape

PARTS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What is copied of a model folder; never code."""


class Base(msgspec.Struct, frozen=True):
    """A model line that is on disk: its name, its hashes, its sizes.

    `config_sha256` is of config.json, whose numbers (rope, experts a token) are in no hash of the line; empty in a
    record that is older than it.
    """

    line: ModelLine
    shape: ModelShape
    size_bytes: int
    config_sha256: str = ""

    @property
    def line_id(self) -> str:
        """The short name of the line."""
        return self.line.line_id


def base_folder(home: Home, line_id: str) -> Path:
    """Where the model of a line lies."""
    return home.bases / line_id


def import_base(home: Home, folder: Path, *, link: bool = False) -> Base:
    """Copy (or link) a model folder into the home. Importing it again changes nothing.

    Raises:
        ConfigError: it is no model folder, or one that cannot be trained.
    """
    source = folder.expanduser().resolve()
    read_trainable(source)
    base = Base(
        line=read_line(source),
        shape=read_shape(source),
        size_bytes=_size_bytes(source),
        config_sha256=sha256_file(source / "config.json"),
    )
    target = base_folder(home, base.line_id)
    if not target.exists():
        if link:
            target.symlink_to(source, target_is_directory=True)
        else:
            _copy(source, target)
        sync_folder(home.bases)
    publish(home.bases / f"{base.line_id}.json", msgspec.json.encode(base, order="sorted"))
    return base


def check_unchanged(home: Home, base: Base) -> Path:
    """The folder of a base, if it is what was imported. Reads all of it once, in blocks, some 0.5 to 2 s a gigabyte.

    A linked folder may have been exported anew, a copied one damaged; adapters of it would be refused by every edge.

    Raises:
        ConfigError: it is not; the message names the parts.
    """
    folder = base_folder(home, base.line_id)
    then, now = msgspec.structs.asdict(base.line), msgspec.structs.asdict(read_line(folder))
    changed = [name.removesuffix("_sha256") for name in then if then[name] != now[name]]
    if base.config_sha256 not in ("", sha256_file(folder / "config.json")):
        changed.append("config.json")
    if changed:
        raise ConfigError(
            f"{folder} has changed since it was imported ({', '.join(changed)}), so what is trained on it would fit no"
            " device; put the old files back, or import the new folder with `clawloop-server base import`"
        )
    return folder


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _copy(source: Path, target: Path) -> None:
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        for path in sorted({path for part in PARTS for path in source.glob(part) if path.is_file()}):
            shutil.copyfile(path, draft / path.name)
        draft.replace(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise HomeError(f"cannot copy {source} to {target}: {error.strerror}; check free disk space") from error


def list_bases(home: Home) -> list[Base]:
    """Every model line of the server, by id.

    Raises:
        ConfigError: a record in base/ cannot be read.
    """
    found = []
    for path in sorted(home.bases.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Base))
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"{path}: {error}; import the model again with `clawloop-server base import`") from error
    return found


def find_base(home: Home, line_id: str = "") -> Base:
    """The line of that id, or the only one if none is named.

    Raises:
        ConfigError: there is none, or several and none is named.
    """
    bases = list_bases(home)
    chosen = [base for base in bases if line_id in ("", base.line_id)]
    if len(chosen) == 1:
        return chosen[0]
    known = ", ".join(base.line_id for base in bases) or "none"
    if not chosen:
        raise ConfigError(f"model line {line_id or '(any)'} is not here (known: {known}); run: base import DIR")
    raise ConfigError(f"several model lines are here ({known}); name one as [hub] line in config.toml")
