"""Taking an export into the pool: all of the file is checked before anything is kept. Format: docs/formats/export.md.

What is here already stays as it is, and what was forgotten stays forgotten.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_edge.errors import ExportInvalid, UnknownTarget
from clawloop_edge.pool import curation
from clawloop_edge.pool.curation import Curation, check_word
from clawloop_edge.pool.export_jsonl import JsonLinesContent
from clawloop_edge.pool.export_parquet import MAGIC, ParquetContent
from clawloop_edge.pool.exported import FORMAT, Content, Head, Manifest, Record
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.errors import RecordError, StorageError
from clawloop_shared.records import Signal, check_signal, check_step

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

_WAITING, _WAITING_BYTES = 256, 8 << 20
"""so many records, or so many bytes of their lines, wait for the disk at a time"""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an import: steps, signals and words that are kept now, and records that are not.

    `known` were here already, `forgotten` once were, `loose` are signals and words on what is not here.
    """

    steps: int = 0
    signals: int = 0
    curations: int = 0
    known: int = 0
    forgotten: int = 0
    loose: int = 0


def is_export(path: Path) -> bool:
    """Whether a file begins as an export of a pool does.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        _open(path)
    except ExportInvalid:
        return False
    return True


def check_export(path: Path, *, progress: Callable[[int], None] = lambda _: None) -> tuple[Head, Manifest]:
    """Read a file from end to end against its manifest and the rules of records; `progress` is told how many were read.

    Raises:
        ExportInvalid: it is no export that this clawloop knows, is cut off, was changed, or a record breaks its rules.
        StorageError: it cannot be read.
    """
    digest, counts, sessions, last = hashlib.sha256(), Counter[type](), 0, ""
    try:
        content = _open(path)
        for number, (record, line) in enumerate(content, 1):
            digest.update(line)
            counts[type(record)] += 1
            if isinstance(record, KeptStep):
                sessions, last = sessions + (record.step.session_id != last), record.step.session_id
            _check(record)
            progress(number)
    except (ExportInvalid, RecordError) as error:
        raise ExportInvalid(f"{path} cannot be taken in: {error}") from error
    if content.manifest is None:
        raise ExportInvalid(f"{path} is cut off: its manifest is missing")
    told = content.manifest
    found = (counts[KeptStep], counts[Signal], counts[Curation], sessions, digest.hexdigest())
    if found != (told.steps, told.signals, told.curations, told.sessions, told.sha256):
        raise ExportInvalid(f"{path} was changed since it was written: it is not what its manifest says")
    return content.head, told


def _open(path: Path) -> Content:
    try:
        with path.open("rb") as file:
            is_table = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    content: Content = ParquetContent(path) if is_table else JsonLinesContent(path)
    if content.head.format != FORMAT:
        raise ExportInvalid(f"its format is {content.head.format!r}, and this clawloop reads {FORMAT!r}")
    return content


def _check(record: Record) -> None:
    if isinstance(record, Signal):
        check_signal(record)
    elif isinstance(record, Curation):
        check_word(record.word)
    elif record.step.trainable:
        check_step(record.step)


def import_export(pool: "Pool", path: Path, *, progress: Callable[[int], None] = lambda _: None) -> Imported:
    """Keep what a file that was checked holds and the pool does not; `progress` is told how many were looked at.

    Raises:
        StorageError: the disk does not take it. What was kept stays, and importing again goes on from there.
    """
    curation.prepare(pool)
    counts = Counter[str]()
    waiting: list[tuple[str, Future[Any]]] = []
    size = 0
    for number, (record, line) in enumerate(_open(path), 1):
        reason = _not_kept(pool, record)
        if reason:
            counts[reason] += 1
        elif isinstance(record, Signal):
            waiting.append(("signals", pool.keep_signal(record)))
        elif isinstance(record, Curation):
            waiting.append(("curations", pool.submit(partial(curation.keep, pool=pool, curation=record))))
        else:
            waiting.append(("steps", pool.keep_step(record)))
        size += len(line)
        if size > _WAITING_BYTES or len(waiting) >= _WAITING:
            counts.update(map(_outcome, waiting))
            waiting, size = [], 0
        progress(number)
    counts.update(map(_outcome, waiting))
    return Imported(**counts)


def _outcome(kept: tuple[str, Future[Any]]) -> str:
    outcome, future = kept
    try:
        future.result()
    except UnknownTarget:
        return "loose"
    return outcome


def _not_kept(pool: "Pool", record: Record) -> str:
    """Why a record is not kept; empty if it is."""
    with pool.read() as database:
        run = database.conn.execute
        if isinstance(record, Signal):
            known = run("SELECT 1 FROM signals WHERE signal_id = ?", (record.signal_id,)).fetchone()
            forgotten = pool.tombstones.forgot(database, signal=record.signal_id)
        elif isinstance(record, Curation):
            known = run("SELECT 1 FROM curations WHERE curation_id = ?", (record.curation_id,)).fetchone()
            forgotten = pool.tombstones.forgot(database, session=record.session_id)
        else:
            step = record.step
            known = run("SELECT 1 FROM steps WHERE step_id = ?", (step.step_id,)).fetchone()
            forgotten = pool.tombstones.forgot(database, step=step.step_id, session=step.session_id)
            forgotten = forgotten or pool.tombstones.forgot(database, step=step.parent_id)
    return "known" if known else "forgotten" if forgotten else ""
