"""Opening what a home holds: its key, its pool, its model folder. Shared by `serve` and the other commands."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.home import EdgeHome
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from clawloop_edge.config import EdgeConfig, PoolConfig
    from clawloop_edge.engine.protocol import Engine, TextEngine
    from clawloop_edge.learn.job import Learner
    from clawloop_edge.pool.keys import KeyStore
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.redacting import Redactor

KEYCHAIN_SERVICE = "clawloop-edge"
PASSPHRASE = "CLAWLOOP_EDGE_PASSPHRASE"
"""environment variable that may hold the passphrase, where nobody is there to be asked"""


def key_store(home: EdgeHome, settings: PoolConfig) -> KeyStore:
    """Where this home's pool key is kept, as its configuration's `[pool]` says.

    Raises:
        ConfigError: an unknown kind of key store.
    """
    from clawloop_edge.pool.keys import FileKeyStore, KeychainKeyStore
    from clawloop_edge.pool.passphrase import PassphraseKeyStore

    path = Path(settings.key_file) if settings.key_file else home.key_file
    if settings.key == "file":
        return FileKeyStore(path)
    if settings.key == "passphrase":
        return PassphraseKeyStore(path, ask_passphrase)
    if settings.key == "keychain":
        return KeychainKeyStore(KEYCHAIN_SERVICE, str(home.folder))
    raise ConfigError(f"[pool] key = {settings.key!r} in {home.config_file}; it is `keychain`, `file` or `passphrase`")


def ask_passphrase(
    *, new: bool, what: str = "the pool's key", otherwise: str = "", environment: str | None = None
) -> str:
    """The passphrase of `what`: from the environment, else from whoever sits at the terminal (a `new` one twice).

    `otherwise` is an option that gives it too, if there is one; `environment` what is taken in its variable's place.

    Raises:
        ConfigError: there is no terminal, or the two differ.
    """
    found = os.environ.get(PASSPHRASE) if environment is None else environment
    if found:
        return found
    if not sys.stdin.isatty():
        ways = " or ".join(
            ([f"set {PASSPHRASE}"] if environment is None else []) + ([f"give {otherwise}"] if otherwise else [])
        )
        raise ConfigError(f"a passphrase opens {what}, and there is no terminal to ask at; {ways}")
    passphrase = getpass.getpass(f"{'New passphrase' if new else 'Passphrase'} for {what}: ")
    if new and getpass.getpass("Again: ") != passphrase:
        raise ConfigError("the two passphrases differ; nothing was made")
    return passphrase


def open_pool(home: EdgeHome, *, writer: bool, store: KeyStore | None = None) -> Pool:
    """The pool of this home; `writer` is for `serve`, which holds it for itself. `store` has its keys, if not as usual.

    Raises:
        KeyMissing: there is a pool, and its key is not there. No new one is made.
        PoolError: another edge serves from this home.
    """
    from clawloop_edge.pool.store import Pool

    pool = Pool.open(home.folder, store or key_store(home, home.load_config().pool), writer=writer)
    _prepare_gateway(pool)  # whichever process forgets a session, these rows go with it
    return pool


def prepare_rooms(pool: Pool) -> None:
    """Have the tables of all rooms in `pool`, so that they are verified with the rest."""
    from clawloop_edge.privacy import returning

    _prepare_gateway(pool)
    returning.adopt(pool)


def _prepare_gateway(pool: Pool) -> None:
    from clawloop_edge.gateway.schema import prepare_draws, prepare_trajectories
    from clawloop_edge.learn import runs
    from clawloop_edge.privacy import curating
    from clawloop_edge.signals import docket

    runs.prepare(pool)
    prepare_trajectories(pool)
    prepare_draws(pool)
    curating.adopt(pool)
    docket.prepare(pool)


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


def open_redactor(
    home: EdgeHome, config: EdgeConfig, *, engine: Engine | TextEngine, loop: AbstractEventLoop
) -> Redactor | None:
    """What redacts the steps of this edge; None before a server of texts, of which no step may be learned from.

    Its process is started with the first step; `close` ends it.

    Raises:
        ConfigError: the model's folder is not there.
    """
    from clawloop_edge.engine.protocol import TextEngine
    from clawloop_edge.privacy.redact_worker import Plan, RedactWorker
    from clawloop_edge.privacy.redacting import Redactor, rescore_with
    from clawloop_edge.privacy.second_opinion import SecondOpinion

    if isinstance(engine, TextEngine):
        return None
    settings = config.privacy
    plan = Plan(
        folder=str(model_folder(config.model.path)),
        home=str(home.folder),
        strict=settings.strict_lengths,
    )
    opinion = SecondOpinion(engine, loop) if settings.second_opinion else None
    return Redactor(RedactWorker(plan), rescore=rescore_with(engine, loop), opinion=opinion)


def own_learner() -> Learner:
    """What learns at home: in MLX, in a process of its own, which is started for each task."""
    from clawloop_edge.learn.learner import MlxLearner

    return MlxLearner()


def read_script(path: Path) -> list[str]:
    """The replies of a drill: a JSON list of texts.

    Raises:
        ConfigError: no such file, or another shape.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"script {path}: {error}; it is a JSON list of replies") from error
