"""Typed TOML configuration: unknown keys are refused by name, and a missing file means the defaults."""

import re
import tomllib
from collections.abc import Mapping
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
        raise ConfigError(f"{path}: {_told(error)}; compare with docs/configuration.md") from error


def _told(error: Exception) -> str:
    """What is wrong with a file, in our words where tomllib shows Python's: a table that stands in it twice."""
    twice = re.fullmatch(r"Cannot declare \((.*?),?\) twice (\(at line \d+).*", str(error))
    if twice is None:
        return str(error)
    table = ".".join(name.strip().strip("'") for name in twice[1].split(","))
    return f"the table [{table}] is there already {twice[2]}); change that one"


def save(path: Path, config: msgspec.Struct) -> None:
    """Write `config` as TOML; fields that are None are left out."""
    fields = msgspec.to_builtins(config)
    publish(path, tomli_w.dumps(_without_none(fields)).encode(), mode=0o600)


def change(path: Path, table: str, *, values: Mapping[str, str]) -> None:
    """Set texts in one table of the file, and leave every other line as it is, comments too.

    Raises:
        ConfigError: the file is written in a way in which that cannot be done by itself; the text says what to write.
    """
    try:
        text = path.read_text()
        wanted = tomllib.loads(text)
        changed = _changed(text, table, values=values)
        wanted[table] = {**wanted.get(table, {}), **values}
        done = tomllib.loads(changed) == wanted
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be changed: {error}") from error
    if not done:
        lines = "; ".join(f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items())
        raise ConfigError(f"{path} cannot be changed by itself; write into its [{table}]: {lines}; then do this again")
    publish(path, changed.encode(), mode=0o600)


def _changed(text: str, table: str, *, values: Mapping[str, str]) -> str:
    lines = text.splitlines()
    heads = [at for at, line in enumerate(lines) if re.fullmatch(rf"\s*\[\s*{table}\s*\]\s*(#.*)?", line)]
    if not heads:
        lines += ["", f"[{table}]"]
        heads = [len(lines) - 1]
    for key, value in values.items():
        line = f"{key} = {msgspec.json.encode(value).decode()}"
        tail = lines[heads[0] + 1 :]
        end = next((at for at, each in enumerate(tail) if each.lstrip().startswith("[")), len(tail))
        known = [at for at, each in enumerate(tail[:end]) if re.match(rf"\s*{key}\s*=", each)]
        if known:
            lines[heads[0] + 1 + known[0]] = line
        else:
            lines.insert(heads[0] + 1, line)
    return "\n".join(lines) + "\n"


def _without_none(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in value.items() if v is not None}
