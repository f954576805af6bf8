"""Which of the kept steps and signals may go into outbox items, and what they are there: at `redacted` with secrets
taken out and under other names. Collecting reads one snapshot; making items reads nothing. Writes nothing.

Left out: untrainable steps and steps that break their record's rules (the server could not use them), those that their
owner does not want learned from, signals that judge no step that may leave or one that its owner took out of the
outbox, what its session's level does not allow, and what was in an item before. What its owner said of a step that had
left goes after it, as a mark.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from operator import itemgetter
from typing import NamedTuple, Protocol

import msgspec

from clawloop_edge.pool.curation import Curation, Curations
from clawloop_edge.pool.keeper import TARGET_COLUMNS
from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Change
from clawloop_edge.privacy.consent import Allowance
from clawloop_edge.privacy.ladder import Ladder
from clawloop_edge.privacy.marking import marks_of
from clawloop_shared import wire
from clawloop_shared.errors import RecordError, WireError
from clawloop_shared.levels import Level, lower
from clawloop_shared.records import Mark, Signal, Step, StepBatch, Target, check_step

log = logging.getLogger(__name__)

MAX_RECORDS = 256
MAX_RAW_BYTES = 1_000_000
"""of an item before compression: under the wire format's floor (1 MiB), so that its bound on ratios never refuses it"""
MAX_COLLECTED_BYTES = 4_000_000
"""read at once: a bound on memory, and on how long a snapshot is held"""
BROKEN = "steps that break their record's rules"
TOO_LARGE = "steps too large for any server"
OTHER_LINE = "steps of another model than the one served, so that they cannot be redacted"
NOT_REDACTED = "steps that could not be redacted, or had too little left"
DROPPED = "signals on steps that you took out of the outbox"
NOTHING_LEFT = "steps of which redaction left nothing to learn from"
_PAGE = 32
_TARGETS_ASKED = 64
_OWN_ID = re.compile(r"(?:[a-z]{1,16}[-_])?[0-9A-HJKMNP-TV-Z]{26}")
"""an id that this edge drew at random: a ULID, or the completion id of an API"""


class Redactor(Protocol):
    """Takes secrets and personal data out (privacy/redacting.py)."""

    def learn(self, steps: Iterable[Step]) -> None:
        """Look at steps that will be redacted together: what one gives away is taken out of all of its session."""
        ...

    def step(self, step: Step) -> Step | None:
        """The step without them, token for token; None if that cannot be done, so it must not leave."""
        ...

    def text(self, text: str, *, session_id: str) -> str:
        """The text without them."""
        ...

    def is_clean(self, ids: Sequence[int], *, session_id: str) -> bool:
        """Whether tokens that are no step have nothing in them that would have to be taken out."""
        ...


class LineRedactor(NamedTuple):
    """A redactor and the model line whose tokens it can read: those of another would be other words to it."""

    line: str
    redactor: Redactor


Outgoing = Step | Signal | Mark


@dataclass(frozen=True)
class Source:
    """One record on its way: what it is, whose, and at which level it may leave. A mark names the step as it left.

    `hint_line` is the model whose tokens a signal's hint is made of; empty: there is none, or it is not known.
    """

    record: Outgoing
    session_id: str
    level: Level
    hint_line: str = ""


@dataclass(frozen=True)
class Collected:
    """Records of the changes after `cursor` up to `upto`, marks of the words after `heard` up to `said`, and what they
    were judged by: the ladders, and the words of their owner up to the change `curated`."""

    receipt_id: str
    cursor: int
    upto: int
    heard: int
    said: int
    curated: int
    sources: list[Source]
    apps: dict[str, str]
    ladders: dict[str, Ladder]
    left_out: Counter[str]


@dataclass
class Draft:
    """One item to be: records of one session at one level. `sent_as` are the ids under which the server gets them."""

    session_id: str
    level: Level
    steps: list[Step] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    sent_as: dict[str, str] = field(default_factory=dict)
    raw_bytes: int = 0
    body: bytes = b""

    def fits(self, size: int) -> bool:
        """Whether a record of that size may join."""
        return not self.sent_as or (self.raw_bytes + size <= MAX_RAW_BYTES and len(self.sent_as) < MAX_RECORDS)

    @property
    def redacted_tokens(self) -> int:
        """How many tokens were replaced."""
        return sum(length for step in self.steps for _, length in step.redacted)


class _Judged(NamedTuple):
    """A step that a signal is about."""

    seq: int
    step_id: str
    run_id: str
    session_id: str


class Collector:
    """Reads what is new from one snapshot."""

    def __init__(self, reading: Reading, allowance: Allowance, *, can_redact: bool = True) -> None:
        """Without `can_redact` it stops before the first record that would have to be redacted."""
        self._reading, self._allowance, self._can_redact = reading, allowance, can_redact
        self.apps: dict[str, str] = {}
        self.ladders: dict[str, Ladder] = {}
        self.left_out: Counter[str] = Counter()
        self.stopped = False
        self._curations = Curations(reading.database, reading.keyring)

    def collect(self, cursor: int, heard: int) -> Collected | None:
        """Records after `cursor` and marks of words after `heard`; None if there is nothing that could be looked at.

        The two are apart because words are looked at again when more may leave, also those on what left long ago.
        """
        receipt, sends_after = self._allowance.state.receipt, self._allowance.state.ladder.sends_after
        if receipt is None or sends_after is None:
            return None
        sources: list[Source] = []
        size, upto, said = 0, cursor, heard
        curated = self._curations.last_seq()
        for seq, change in merge(self._changes(max(cursor, sends_after)), self._words(heard), key=itemgetter(0)):
            found = [*self._sources(change)]
            if not self._can_redact and any(source.level is Level.REDACTED for source in found):
                self.stopped = True
                break
            size += sum(len(msgspec.msgpack.encode(source.record)) for source in found)
            if sources and size > MAX_COLLECTED_BYTES:
                break
            sources += found
            upto, said = (upto, seq) if isinstance(change, Curation) else (seq, said)
        if (upto, said) == (cursor, heard):
            return None
        return Collected(
            receipt_id=receipt.receipt_id,
            cursor=cursor,
            upto=upto,
            heard=heard,
            said=said,
            curated=curated,
            sources=sources,
            apps=self.apps,
            ladders=self.ladders,
            left_out=self.left_out,
        )

    def _changes(self, after_seq: int) -> Iterator[tuple[int, Change | Curation]]:
        while page := self._reading.changes(after_seq, _PAGE):
            yield from ((change.seq, change) for change in page)
            after_seq = page[-1].seq

    def _words(self, after_seq: int) -> Iterator[tuple[int, Change | Curation]]:
        """What was said since the outbox last looked, also while no step could leave: it is of what left before."""
        while page := self._curations.after(after_seq, _PAGE):
            yield from page
            after_seq = page[-1][0]

    def _sources(self, change: Change | Curation) -> Iterator[Source]:
        if isinstance(change, Curation):
            yield from self._marks(change)
        elif (found := self._source(change)) is not None:
            yield found

    def _marks(self, said: Curation) -> Iterator[Source]:
        """They leave at the level at which their steps did, and not above what their session has now."""
        for mark, left_at in marks_of(self._reading.database, said):
            level = lower(left_at, self.ladder(said.session_id).latest)
            if level.sends_steps and not self._was_queued(mark.mark_id):
                yield Source(mark, said.session_id, level)

    def _source(self, change: Change) -> Source | None:
        if change.step is not None:
            return self._step(change.step, change.seq)
        return self._signal(change.signal, change.seq) if change.signal is not None else None

    def _step(self, step: Step, seq: int) -> Source | None:
        level = self.ladder(step.session_id).at(seq)
        if not step.trainable or not level.sends_steps or self._was_queued(step.step_id):
            return None
        if self._curations.off(step):
            return None
        try:
            check_step(step)
        except RecordError as error:
            log.warning("not put into the outbox: %s", error)
            self.left_out[BROKEN] += 1
            return None
        return Source(step, step.session_id, level)

    def _signal(self, signal: Signal, seq: int) -> Source | None:
        """A signal goes where its judged steps go, at the higher of their levels and not above its own."""
        run = self._reading.database.conn.execute
        row = run("SELECT session_id FROM signals WHERE signal_id = ?", (signal.signal_id,)).fetchone()
        column = TARGET_COLUMNS[signal.target]
        query = f"SELECT seq, step_id, run_id, session_id FROM steps WHERE {column} = ? AND trainable"  # noqa: S608
        rows = run(f"{query} ORDER BY seq DESC LIMIT ?", (signal.target_id, _TARGETS_ASKED))
        judged = [step for step in (_Judged(*row) for row in rows) if self._goes(step)]
        levels = [self.ladder(step.session_id).at(step.seq) for step in judged]
        best = max(levels, key=lambda level: level.rank, default=Level.OFF)
        level = lower(best, self.ladder(row[0]).at(seq))
        if not level.sends_steps or self._was_queued(signal.signal_id):
            return None
        if self._was_dropped(column, signal.target_id):
            self.left_out[DROPPED] += 1
            return None
        return Source(signal, row[0], level, self._hint_line(signal))

    def _hint_line(self, signal: Signal) -> str:
        step = self._reading.step(signal.hint.step_id) if signal.hint else None
        return step.policy.line if step else ""

    def _goes(self, step: _Judged) -> bool:
        """Whether the server has a step or may get it, as far as its owner's word goes. One that a delta was learned
        from has left with that, or will, and in no other way."""
        query = "SELECT 1 FROM outbox_records WHERE record_id = ? AND sent_as = item_id LIMIT 1"
        if self._reading.database.conn.execute(query, (step.step_id,)).fetchone() is not None:
            return False
        return not self._curations.off(step) or self._was_queued(step.step_id)

    def ladder(self, session_id: str) -> Ladder:
        """What may leave of a session."""
        if session_id not in self.ladders:
            known = self._reading.session(session_id)
            self.apps[session_id] = known.app if known else ""
            self.ladders[session_id] = self._allowance.ladder(session_id, app=self.apps[session_id])
        return self.ladders[session_id]

    def _was_dropped(self, column: str, name: str) -> bool:
        """Whether the owner took any of the steps of that name out of the outbox: what is said of them stays too."""
        query = (
            "SELECT 1 FROM steps JOIN outbox_records ON record_id = step_id JOIN outbox USING (item_id)"  # noqa: S608
            f" WHERE steps.{column} = ? AND state = 'dropped' LIMIT 1"
        )
        return self._reading.database.conn.execute(query, (name,)).fetchone() is not None

    def _was_queued(self, record_id: str) -> bool:
        query = "SELECT 1 FROM outbox_records WHERE record_id = ? LIMIT 1"
        return self._reading.database.conn.execute(query, (record_id,)).fetchone() is not None


class Maker:
    """Makes items of what was collected. `rename(kind, name)` gives what stands for a name that a caller chose.

    Without a redactor nothing may have been collected that must be redacted.
    """

    def __init__(
        self, redactor: LineRedactor | None, rename: Callable[[str, str], str], *, proceed: Callable[[], None]
    ) -> None:
        """`proceed` is called before each record, and raises where this shall not go on."""
        self._redactor, self._rename, self._proceed = redactor, rename, proceed
        self.left_out: Counter[str] = Counter()

    def drafts(self, sources: list[Source]) -> list[Draft]:
        """Items in the order of their first records, each with its bytes."""
        self._learn(sources)
        drafts: list[Draft] = []
        open_ones: dict[tuple[str, Level], Draft] = {}
        for source in sources:
            self._proceed()
            record = self._outgoing(source)
            if record is None:
                continue
            key, size = (source.session_id, source.level), len(msgspec.msgpack.encode(record))
            draft = open_ones.get(key)
            if draft is None or not draft.fits(size):
                draft = open_ones[key] = Draft(*key)
                drafts.append(draft)
            _add(draft, record, source=source.record, size=size)
        for draft in drafts:
            draft.body = self._encoded(draft)
        return [draft for draft in drafts if draft.body]

    def _learn(self, sources: list[Source]) -> None:
        steps = (s.record for s in sources if s.level is Level.REDACTED and isinstance(s.record, Step))
        if self._redactor is not None:
            line, redactor = self._redactor
            redactor.learn(step for step in steps if step.policy.line == line)

    def _outgoing(self, source: Source) -> Outgoing | None:
        """The record as it leaves; None if it must not."""
        record = source.record
        if source.level is Level.FULL:
            return record
        if isinstance(record, Mark):
            return msgspec.structs.replace(record, mark_id=self._own("mark", record.mark_id))
        assert self._redactor is not None, "collected what only a redactor may let out"
        line, redactor = self._redactor
        if isinstance(record, Signal):
            readable = source.hint_line == line
            return self._signal(record, redactor, session_id=source.session_id, readable=readable)
        if record.policy.line != line:
            self.left_out[OTHER_LINE] += 1
            return None
        return self._step(record, redactor)

    def _step(self, step: Step, redactor: Redactor) -> Step | None:
        found = redactor.step(step)
        if found is None:
            self.left_out[NOT_REDACTED] += 1
            return None
        try:
            check_step(found)
        except RecordError:
            self.left_out[NOTHING_LEFT] += 1
            return None
        return msgspec.structs.replace(
            found,
            step_id=self._own("step", found.step_id),
            parent_id=self._own("step", found.parent_id),
            session_id=self._named("session", found.session_id),
            run_id=self._named("run", found.run_id),
            trajectory_id=self._named("trajectory", found.trajectory_id),
            group_id=self._named("group", found.group_id),
        )

    def _signal(self, signal: Signal, redactor: Redactor, *, session_id: str, readable: bool) -> Signal:
        """The signal without secrets; `readable`: its hint's tokens are those of the redactor's model."""
        named = self._own if signal.target is Target.STEP else self._named
        hint = signal.hint if readable else None
        if hint is not None and not redactor.is_clean(hint.token_ids, session_id=session_id):
            hint = None  # of a hint with a hole nothing can be learned
        return msgspec.structs.replace(
            signal,
            signal_id=self._own("signal", signal.signal_id),
            target_id=named(str(signal.target), signal.target_id),
            source=redactor.text(signal.source, session_id=session_id),
            comment=redactor.text(signal.comment, session_id=session_id),
            evidence=redactor.text(signal.evidence, session_id=session_id),
            hint=msgspec.structs.replace(hint, step_id=self._own("step", hint.step_id)) if hint else None,
        )

    def _named(self, kind: str, name: str) -> str:
        return self._rename(kind, name) if name else ""

    def _own(self, kind: str, record_id: str) -> str:
        """An id that was drawn at random tells nothing; one that was computed from tokens could confirm a guess."""
        return record_id if _OWN_ID.fullmatch(record_id) else self._named(kind, record_id)

    def _encoded(self, draft: Draft) -> bytes:
        """The item's bytes; none for a single record so large and so repetitive that no server would unpack it."""
        body = wire.encode(StepBatch(steps=draft.steps, signals=draft.signals, marks=draft.marks))
        if draft.raw_bytes > MAX_RAW_BYTES:
            try:
                wire.decode(body, StepBatch)
            except WireError as error:
                log.warning("step %s is not put into the outbox: %s", draft.steps[0].step_id, error)
                self.left_out[TOO_LARGE] += 1
                return b""
        return body


def _add(draft: Draft, record: Outgoing, *, source: Outgoing, size: int) -> None:
    draft.raw_bytes += size
    if isinstance(record, Step):
        draft.steps.append(record)
    elif isinstance(record, Signal):
        draft.signals.append(record)
    else:
        draft.marks.append(record)
    draft.sent_as[_id_of(source)] = _id_of(record)


def _id_of(record: Outgoing) -> str:
    if isinstance(record, Mark):
        return record.mark_id
    return record.step_id if isinstance(record, Step) else record.signal_id
