"""Opening what a home holds: its key, its pool, its model folder. Shared by `serve` and the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.home import EdgeHome
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.config import EdgeConfig, PoolConfig
    from clawloop_edge.engine.protocol import Engine, TextEngine
    from clawloop_edge.pool.keys import KeyStore
    from clawloop_edge.pool.store import Pool

KEYCHAIN_SERVICE = "clawloop-edge"


def key_store(home: EdgeHome, settings: PoolConfig) -> KeyStore:
    """Where this home's pool key is kept, as its configuration's `[pool]` says.

    Raises:
        ConfigError: an unknown kind of key store.
    """
    from clawloop_edge.pool.keys import FileKeyStore, KeychainKeyStore

    if settings.key == "file":
        return FileKeyStore(Path(settings.key_file) if settings.key_file else home.key_file)
    if settings.key == "keychain":
        return KeychainKeyStore(KEYCHAIN_SERVICE, str(home.folder))
    raise ConfigError(f"[pool] key = {settings.key!r} in {home.config_file}; it is `keychain` or `file`")


def open_pool(home: EdgeHome, *, writer: bool) -> Pool:
    """The pool of this home; `writer` is for `serve`, which holds it for itself.

    Raises:
        KeyMissing: there is a pool, and its key is not there. No new one is made.
        PoolError: another edge serves from this home.
    """
    from clawloop_edge.pool.keys import open_key
    from clawloop_edge.pool.store import Pool

    key = open_key(key_store(home, home.load_config().pool), home.folder)
    return Pool.open(home.folder, key, writer=writer)


def model_folder(name: str) -> Path:
    """The folder of a model given as a path or a hub id; a hub id is fetched into the hub's own cache.

    Raises:
        ConfigError: no such folder, or the hub does not give it.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.absolute()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"{name} is no model folder; name a folder with config.json, or a hub id like owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"cannot get the model {name} from the hub: {type(error).__name__}; give a folder") from error


async def open_engine(config: EdgeConfig) -> Engine | TextEngine:
    """The engine that the configuration names, with its model loaded.

    Raises:
        ConfigError: an unknown kind of engine, or no model.
    """
    if config.model.kind == "upstream":
        from clawloop_edge.engine.upstream_open import open_upstream

        known = model_folder(config.model.path) if config.model.path else None
        return await open_upstream(config.upstream, folder=known, keep_versions=config.engine.keep_versions)
    folder = model_folder(config.model.path)
    if config.model.kind == "mlx":
        from clawloop_edge.engine.mlx import MlxEngine

        return await MlxEngine.open(folder, config.engine)
    if config.model.kind == "scripted":
        from clawloop_edge.engine.scripted import ScriptedEngine

        return ScriptedEngine(folder, read_script(Path(config.model.script)))
    raise ConfigError(f"[model] kind = {config.model.kind!r}; it is `mlx`, `upstream` or `scripted`")


def read_script(path: Path) -> list[str]:
    """The replies of a drill: a JSON list of texts.

    Raises:
        ConfigError: no such file, or another shape.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"script {path}: {error}; it is a JSON list of replies") from error
