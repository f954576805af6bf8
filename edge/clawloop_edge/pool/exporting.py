"""Writing the pool's steps and signals into a file of their owner's own. Format: docs/formats/export.md.

What is written is not encrypted: whoever calls this says so. One session is in memory at a time.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool.export_jsonl import JsonLines
from clawloop_edge.pool.export_parquet import Parquet
from clawloop_edge.pool.exported import FORMAT, Chosen, Head, Manifest, Record, Sink, fields_of, line_of
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.errors import StorageError
from clawloop_shared.files import sync_folder
from clawloop_shared.records import Signal
from clawloop_shared.signals import signals_for

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

_SESSIONS = "SELECT session_id FROM sessions WHERE session_id > ? ORDER BY session_id LIMIT 256"


class ExportFormat(StrEnum):
    """What an export is written as."""

    JSONL = "jsonl"
    """lines of JSON; packed if the file's name ends in .zst"""
    PARQUET = "parquet"
    """one table"""


def export_pool(
    pool: "Pool",
    path: Path,
    chosen: Chosen,
    *,
    form: ExportFormat = ExportFormat.JSONL,
    replace: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write what is `chosen` to `path` (0600): the whole file, or none. `progress` is told the steps written so far.

    Raises:
        PoolError: there is a file already, and `replace` was not said.
        StorageError: it cannot be written.
        ConfigError: a library that the format needs is not installed.
    """
    if not replace and path.exists():
        raise PoolError(f"{path} is there already; give --force to replace it, or another name")
    head = Head(
        format=FORMAT,
        pool_id=pool.keyring.pool_id,
        exported_ms=time.time_ns() // 1_000_000,
        clawloop=version("clawloop"),
        chosen=chosen,
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            sink = Parquet(file, head) if form is ExportFormat.PARQUET else _lines(file, head, path)
            manifest = _write(sink, records(pool, chosen), text=chosen.text, progress=progress)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            draft.replace(path)
        else:
            os.link(draft, path)  # unlike a rename, a link never replaces what came meanwhile
        sync_folder(path.parent)
    except FileExistsError as error:
        raise PoolError(f"{path} is there already; give --force to replace it, or another name") from error
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; check that its folder is yours") from error
    finally:
        draft.unlink(missing_ok=True)
    return manifest


def _lines(file: BinaryIO, head: Head, path: Path) -> JsonLines:
    return JsonLines(file, head, packed=path.suffix == ".zst")


def _write(sink: Sink, found: Iterator[Record], *, text: bool, progress: Callable[[int], None]) -> Manifest:
    digest, steps, signals = hashlib.sha256(), 0, 0
    for record in found:
        fields = fields_of(record, text=text)
        line = line_of(fields)
        digest.update(line)
        sink.write(fields, line)
        if isinstance(record, Signal):
            signals += 1
        else:
            steps += 1
            progress(steps)
    manifest = Manifest(steps=steps, signals=signals, sha256=digest.hexdigest())
    sink.finish(manifest)
    return manifest


def records(pool: "Pool", chosen: Chosen) -> Iterator[Record]:
    """The chosen steps session by session, in the order in which they were kept, and behind each session's steps the
    signals on them. Each session is read as it is when its turn comes.

    Raises:
        PoolError: a session that was named is not here.
    """
    for session_id in chosen.sessions or _all_sessions(pool):
        with pool.reading() as reading:
            if chosen.sessions and reading.session(session_id) is None:
                raise PoolError(f"no session {session_id} is kept here")
            named = []
            for kept in reading.session_steps(session_id):
                if _is_within(kept, chosen):
                    named.append(msgspec.structs.replace(kept.step, prompt_ids=[], response_ids=[]))
                    yield kept
            yield from signals_for(named, reading.session_signals(session_id))


def _is_within(kept: KeptStep, chosen: Chosen) -> bool:
    before = chosen.until_ms is None or kept.started_ms < chosen.until_ms
    return before and kept.started_ms >= chosen.since_ms


def _all_sessions(pool: "Pool") -> Iterator[str]:
    last = ""
    while True:
        with pool.read() as database:
            page = [row[0] for row in database.conn.execute(_SESSIONS, (last,))]
        yield from page
        if not page:
            return
        last = page[-1]
