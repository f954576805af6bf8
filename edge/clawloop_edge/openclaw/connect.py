"""`openclaw connect` and `disconnect`: plans a change of OpenClaw's configuration, and makes it.

Nothing is written that was not shown: a plan holds the bytes that were read and the bytes to be written, and is made
only if the file is still the one that was read, after OpenClaw itself has taken the new text. What was changed is
recorded in the edge's home, so that it can be undone: to the former bytes if nobody else has touched the file, else
member by member.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from clawloop_edge.home import EdgeHome
from clawloop_edge.openclaw import entries, json5, shown
from clawloop_edge.openclaw.entries import Change, Edge, Wish
from clawloop_shared.errors import ConfigError, StorageError
from clawloop_shared.files import private_folder, publish, publish_secret, sha256

RECORDS = "openclaw"
"""folder in the edge's home"""
MAX_BYTES = 8 << 20
_READ_ONLY = ("OPENCLAW_CONFIG_READONLY", "OPENCLAW_NIX_MODE")
_MODE_BITS = 0o777
T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was changed in a configuration: its hash when that was done, and the copy of what it was before."""

    config: str
    after: str
    backup: str = ""
    changes: list[Change]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration as it is and as it shall be; `record` is None when nothing of ours will be left in it. `fresh`:
    nothing of ours stands in it now."""

    config: Path
    before: bytes
    after: bytes
    record: Record | None = None
    fresh: bool = False
    remarks: list[str] = []

    @property
    def changed(self) -> bool:
        """Whether there is anything to do."""
        return self.before != self.after

    def diff(self) -> str:
        """What will change, without secrets."""
        return shown.diff(_text(self.before, self.config), _text(self.after, self.config), name=self.config.name)


def config_path(named: Path | None, environment: Mapping[str, str]) -> Path:
    """OpenClaw's configuration: the one that was named, or where OpenClaw itself looks; links are followed.

    Raises:
        ConfigError: there is no such file.
    """
    home = Path(environment.get("OPENCLAW_HOME") or Path.home())
    folder = Path(environment.get("OPENCLAW_STATE_DIR") or home / ".openclaw").expanduser()
    path = named or Path(environment.get("OPENCLAW_CONFIG_PATH") or folder / "openclaw.json")
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"OpenClaw has no configuration at {path}; run `openclaw setup`, or name it with --config")
    return path


def present(config: Path) -> json5.Node:
    """The configuration as it is.

    Raises:
        ConfigError: the file is not JSON5.
        StorageError: it cannot be read.
    """
    return json5.read(_text(_read(config), config))


def plan_connect(home: EdgeHome, config: Path, edge: Edge, wish: Wish) -> Plan:
    """What `connect` would do; nothing, if that is what stands there already.

    Raises:
        ConfigError: the file is not JSON5, or its parts are not what OpenClaw's are.
        StorageError: it cannot be read.
    """
    before = _read(config)
    record = read_record(home, config)
    by_hand = record is None and not entries.is_ours(json5.read(_text(before, config)))
    base = before if by_hand else _undone(before, config, record)
    text = _text(base, config)
    wanted = entries.changes(json5.read(text), edge, wish)
    after = _named(config, lambda: entries.applied(text, wanted)).encode()
    if json5.read(after.decode()).value == json5.read(_text(before, config)).value:
        after = before  # as it stands there, whoever wrote it
    untouched = record.backup if record is not None and sha256(before) == record.after else ""
    kept = Record(config=str(config), after=sha256(after), backup=untouched, changes=wanted)
    remarks = entries.remarks(json5.read(text), wish)
    return Plan(config=config, before=before, after=after, record=kept, fresh=base == before, remarks=remarks)


def plan_disconnect(home: EdgeHome, config: Path) -> Plan:
    """What `disconnect` would do; nothing, if nothing of ours is there.

    Raises:
        ConfigError: the file is not JSON5.
        StorageError: it cannot be read.
    """
    before = _read(config)
    return Plan(config=config, before=before, after=_undone(before, config, read_record(home, config)))


def carry_out(
    plan: Plan, home: EdgeHome, *, now: datetime, check: Callable[[Path], None] | None, environment: Mapping[str, str]
) -> Path:
    """Write what was planned, after `check` has taken it; the backup that was made.

    Raises:
        ConfigError: it is not to be written, has changed since it was read, or was not taken by `check`.
        StorageError: it could not be written.
    """
    mode = stat.S_IMODE(plan.config.stat().st_mode) & _MODE_BITS
    _check_writable(plan.config, mode, environment)
    if check is not None:
        _try_out(plan, check)
    if _read(plan.config) != plan.before:
        raise ConfigError(f"{plan.config} was changed meanwhile; nothing was written, run the command again")
    backup = _free(plan.config, f"before-clawloop-{now:%Y%m%d-%H%M%S}")
    publish_secret(backup, plan.before)
    if plan.record is not None:
        first = plan.record.backup or (str(backup) if plan.fresh else "")
        _write_record(home, msgspec.structs.replace(plan.record, backup=first))
    publish(plan.config, plan.after, mode=mode)
    if plan.record is None:
        forget_record(home, plan.config)
    return backup


def read_record(home: EdgeHome, config: Path) -> Record | None:
    """What this edge changed in that configuration, or None.

    Raises:
        ConfigError: the record cannot be read.
    """
    path = _record_path(home, config)
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged; remove it, and `openclaw disconnect` goes by names") from error


def keep_record(home: EdgeHome, plan: Plan) -> None:
    """Remember what stands there already."""
    if plan.record is not None and read_record(home, plan.config) is None:
        _write_record(home, plan.record)


def forget_record(home: EdgeHome, config: Path) -> None:
    """Nothing of ours is left in that configuration."""
    _record_path(home, config).unlink(missing_ok=True)


def recorded(home: EdgeHome) -> list[Path]:
    """The configurations that this edge has changed."""
    files = sorted((home.folder / RECORDS).glob("*.json"))
    return [Path(msgspec.json.decode(file.read_bytes(), type=Record).config) for file in files]


def _undone(before: bytes, config: Path, record: Record | None) -> bytes:
    """The file without what is ours."""
    if record is not None and sha256(before) == record.after and record.backup and Path(record.backup).is_file():
        return Path(record.backup).read_bytes()
    text = _text(before, config)
    made = record.changes if record is not None else _named(config, lambda: entries.traces(json5.read(text)))
    return _named(config, lambda: entries.undone(text, made)).encode()


def _read(config: Path) -> bytes:
    try:
        if config.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{config} is larger than {MAX_BYTES >> 20} MiB, which is no configuration of OpenClaw's")
        return config.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {config}: {error.strerror}") from error


def _text(data: bytes, config: Path) -> str:
    """The file as JSON5; an empty one says nothing."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{config} is not UTF-8 (byte {error.start}); mend it, or restore a backup of it") from error
    if not text.strip():
        return "{}\n"
    _named(config, lambda: json5.read(text))
    return text


def _named(config: Path, act: Callable[[], T]) -> T:
    """What `act` gives; an error of it names the file."""
    try:
        return act()
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}; mend it, then run the command again") from error


def _check_writable(config: Path, mode: int, environment: Mapping[str, str]) -> None:
    named = next((name for name in _READ_ONLY if environment.get(name) == "1"), "")
    if named or not mode & stat.S_IWUSR:
        why = f"{named}=1 is set" if named else f"its mode is {mode:o}"
        raise ConfigError(
            f"{config} is kept read-only ({why}); put the shown lines in where it is managed, or make it writable"
        )


def _try_out(plan: Plan, check: Callable[[Path], None]) -> None:
    """Have the new text checked under another name beside, so that what it includes is found and no daemon sees it."""
    draft = _free(plan.config, f"clawloop-{os.getpid()}")
    publish_secret(draft, plan.after)
    try:
        check(draft)
    finally:
        draft.unlink()


def _free(config: Path, ending: str) -> Path:
    names = [config.with_name(f"{config.name}.{ending}{again}") for again in ("", *(f"-{n}" for n in range(2, 100)))]
    return next(path for path in names if not path.exists())


def _record_path(home: EdgeHome, config: Path) -> Path:
    return home.folder / RECORDS / f"{sha256(str(config).encode())[:16]}.json"


def _write_record(home: EdgeHome, record: Record) -> None:
    path = _record_path(home, Path(record.config))
    private_folder(path.parent)
    publish_secret(path, msgspec.json.encode(record))
