"""Writing the pool's steps, signals and words into a file of their owner's own. Format: docs/formats/export.md.

What is written is not encrypted: whoever calls this says so. One session is in memory at a time.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from clawloop_edge.errors import PoolError
from clawloop_edge.pool import curation, deriving
from clawloop_edge.pool.curation import Curation, Curations
from clawloop_edge.pool.derived import DerivedManifest, beside, write_lines, write_table
from clawloop_edge.pool.export_jsonl import JsonLines
from clawloop_edge.pool.export_parquet import Parquet
from clawloop_edge.pool.exported import FORMAT, Basis, Chosen, Head, Manifest, Record, Sink, fields_of, line_of
from clawloop_edge.pool.picking import Picker, Seen
from clawloop_edge.pool.published import published
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import KeptStep
from clawloop_shared.records import Channel, Signal, Target
from clawloop_shared.signals import DEFAULT_RULES, RewardRules, signals_for

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

_SESSIONS = "SELECT session_id FROM sessions WHERE session_id > ? ORDER BY session_id LIMIT 256"
Progress = Callable[[int], None]


class ExportFormat(StrEnum):
    """What an export is written as."""

    JSONL = "jsonl"
    """lines of JSON; packed if the file's name ends in .zst"""
    PARQUET = "parquet"
    """one table"""
    CHAT = "chat"
    """conversations, one a line: messages and tools"""
    TRL_COMPLETION = "trl-completion"
    """TRL's prompt-completion, conversational: a line a step"""
    TRL_PREFERENCE = "trl-preference"
    """TRL's preference, conversational: a line a pair of answers"""
    VERL = "verl"
    """verl's table of tasks: a row a trajectory"""

    @property
    def is_own(self) -> bool:
        """Whether it has all that is kept, and can be imported."""
        return self in (ExportFormat.JSONL, ExportFormat.PARQUET)

    @property
    def suffix(self) -> str:
        """What the name of such a file ends in."""
        return ".parquet" if self in (ExportFormat.PARQUET, ExportFormat.VERL) else ".jsonl"


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """How what is derived is made: rewards by these rules; answers are a pair if their rewards are `margin` apart.

    `task_of` tells what a trajectory's caller said of its task.
    """

    rules: RewardRules = DEFAULT_RULES
    margin: float = 0.5
    task_of: deriving.TaskOf = deriving.no_task


def export_pool(
    pool: "Pool",
    path: Path,
    chosen: Chosen,
    *,
    form: ExportFormat = ExportFormat.JSONL,
    basis: Basis = Basis(),  # noqa: B008  # frozen
    derived: Derived = Derived(),  # noqa: B008  # frozen
    replace: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest | DerivedManifest:
    """Write what is `chosen` to `path` (0600): the whole file, or none. `progress` is told the steps written so far.

    A derived format has its manifest beside it, leaves out what its owner took out of training, and is of the channel
    `train` if none is chosen.

    Raises:
        PoolError: there is a file already, and `replace` was not said.
        StorageError: it cannot be written.
        ConfigError: a library that the format needs is not installed.
    """
    curation.prepare(pool)
    if not form.is_own:
        chosen = msgspec.structs.replace(chosen, channel=chosen.channel or Channel.TRAIN)
    head = Head(
        format=FORMAT if form.is_own else form.value,
        pool_id=pool.keyring.pool_id,
        exported_ms=time.time_ns() // 1_000_000,
        clawloop=version("clawloop"),
        chosen=chosen,
        consent=basis,
        reward=derived.rules,
    )
    sessions = picked_sessions(pool, chosen, rules=derived.rules)
    if not form.is_own:
        return _derive(pool, path, sessions, head=head, form=form, derived=derived, replace=replace, progress=progress)
    with published(path, replace=replace) as file:
        sink = Parquet(file, head) if form is ExportFormat.PARQUET else _lines(file, head, path)
        return _write(sink, records(sessions), text=chosen.text, progress=progress)


def _lines(file: BinaryIO, head: Head, path: Path) -> JsonLines:
    return JsonLines(file, head, packed=path.suffix == ".zst")


def _write(sink: Sink, found: Iterator[Record], *, text: bool, progress: Progress) -> Manifest:
    digest, counts, sessions, last = hashlib.sha256(), Counter[type](), 0, ""
    for record in found:
        fields = fields_of(record, text=text)
        line = line_of(fields)
        digest.update(line)
        sink.write(fields, line)
        counts[type(record)] += 1
        if isinstance(record, KeptStep):
            sessions, last = sessions + (record.step.session_id != last), record.step.session_id
            progress(counts[KeptStep])
    manifest = Manifest(
        steps=counts[KeptStep],
        signals=counts[Signal],
        curations=counts[Curation],
        sessions=sessions,
        sha256=digest.hexdigest(),
    )
    sink.finish(manifest)
    return manifest


def _derive(
    pool: "Pool",
    path: Path,
    sessions: "Iterator[deriving.Session]",
    *,
    head: Head,
    form: ExportFormat,
    derived: Derived,
    replace: bool,
    progress: Progress,
) -> DerivedManifest:
    tally = deriving.Tally(progress)
    counted = tally.count(sessions)
    if form is ExportFormat.CHAT:
        rows = deriving.chats(counted)
    elif form is ExportFormat.TRL_COMPLETION:
        rows = deriving.completions(counted)
    elif form is ExportFormat.TRL_PREFERENCE:
        rows = deriving.preferences(pool, counted, margin=derived.margin, tally=tally)
    else:
        rows = deriving.tasks(counted, task_of=derived.task_of, tally=tally)
    details = {"margin": derived.margin} if form is ExportFormat.TRL_PREFERENCE else {}
    with published(beside(path), replace=replace) as note:
        with published(path, replace=replace) as file:
            written = (write_table if form is ExportFormat.VERL else write_lines)(file, rows)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest = DerivedManifest(
            head=head,
            file=path.name,
            rows=written,
            steps=tally.steps,
            sessions=tally.sessions,
            signals=tally.signals,
            left_out=dict(+tally.left_out),
            details=details,
            size_bytes=size,
            sha256=digest,
        )
        note.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    return manifest


def picked_sessions(pool: "Pool", chosen: Chosen, *, rules: RewardRules) -> "Iterator[deriving.Session]":
    """The sessions that have chosen steps, each as it is when its turn comes, with what is known of those steps.

    Raises:
        PoolError: a session that was named is not here.
    """
    for session_id in chosen.sessions or _all_sessions(pool):
        with pool.reading() as reading:
            if chosen.sessions and reading.session(session_id) is None:
                raise PoolError(f"no session {session_id} is kept here")
            picker = Picker(reading, chosen, rules=rules)
            lines = reading.session_lines(session_id)
            seen = {line.step_id: found for line in lines if (found := picker.look(line)) is not None}
            if seen:
                yield deriving.Session(session_id, reading, lines, seen)


def records(sessions: "Iterator[deriving.Session]") -> Iterator[Record]:
    """The chosen steps session by session, in the order in which they were kept, and behind each session's steps the
    signals on them, then the words of their owner."""
    for session in sessions:
        named = []
        for kept in session.kept():
            named.append(msgspec.structs.replace(kept.step, prompt_ids=[], response_ids=[]))
            yield kept
        yield from signals_for(named, session.reading.session_signals(session.session_id))
        yield from _words(session.reading, session.session_id, session.seen)


def _words(reading: Reading, session_id: str, seen: dict[str, Seen]) -> Iterator[Curation]:
    """What was said of a session, and of those of its steps and runs that are there."""
    runs = {each.line.run_id for each in seen.values()}
    there = {Target.STEP: seen.keys(), Target.RUN: runs, Target.SESSION: {session_id}}
    for said in Curations(reading.database, reading.keyring).of_session(session_id):
        if said.target_id in there[said.target]:
            yield said


def _all_sessions(pool: "Pool") -> Iterator[str]:
    last = ""
    while True:
        with pool.read() as database:
            page = [row[0] for row in database.conn.execute(_SESSIONS, (last,))]
        yield from page
        if not page:
            return
        last = page[-1]
