"""Typed TOML configuration: unknown keys are refused by name, and a missing file means the defaults."""

from pathlib import Path
from typing import TypeVar

import msgspec
import tomli_w

from clawloop_shared.errors import ConfigError
from clawloop_shared.files import publish

T = TypeVar("T", bound=msgspec.Struct)


def load(path: Path, kind: type[T]) -> T:
    """The configuration in `path`, or the defaults of `kind` if there is no such file.

    Raises:
        ConfigError: not TOML, an unknown key, or a value of the wrong type.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return kind()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        return msgspec.toml.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; compare with docs/configuration.md") from error


def save(path: Path, config: msgspec.Struct) -> None:
    """Write `config` as TOML; fields that are None are left out."""
    fields = msgspec.to_builtins(config)
    publish(path, tomli_w.dumps(_without_none(fields)).encode(), mode=0o600)


def _without_none(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in value.items() if v is not None}
