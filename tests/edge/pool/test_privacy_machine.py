"""Whatever is set, kept, filled and sent in whichever order, by two processes: nothing leaves above its level, nothing
from before a consent, nothing from a pause, and nothing twice.

The model knows no ladder: it keeps for each record the most that any decision since it was kept has left it.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clawloop_edge.errors import ConsentError, PoolError
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.batch import LineRedactor
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.limits import Subject
from clawloop_edge.privacy.outbox import Outbox
from clawloop_edge.privacy.policy import VALID_MS
from clawloop_edge.privacy.schema import ItemState
from clawloop_shared import wire
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.levels import Level, lower
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Policy, Sampling, Signal, Step, StepBatch, Target

from .conftest import Acknowledging, Blotter

SECRET = 666
HOLD_MS = 1_000
MEMORY = "/dev/shm"  # where there is one: thousands of commits need not wait for a disk
SESSIONS = {f"session-{number}": ("mail", "code", "talk")[number % 3] for number in range(9)}
levels = st.sampled_from([Level.FULL, Level.REDACTED, Level.FULL, Level.REDACTED, Level.METRICS, Level.OFF])
handles = st.integers(0, 1)
names = st.sampled_from(sorted({*SESSIONS, *SESSIONS.values()}))
moves = st.one_of(
    st.tuples(st.just("level"), st.just(""), levels),
    st.tuples(st.just("limit"), names, levels),
    st.tuples(st.just("pause"), st.just(""), st.sampled_from([0, 0, HOLD_MS // 2, 2 * HOLD_MS])),
    st.tuples(st.just("time"), st.just(""), st.sampled_from([*[HOLD_MS] * 9, VALID_MS])),
)
"""what an owner, or time, may do at any moment"""
Move = tuple[str, str, Any]
interruptions = st.one_of(*[st.none()] * 5, moves)


class Interrupted(Blotter):
    """A redactor in whose time something else happens, once."""

    meanwhile: Callable[[], None] | None = None

    def learn(self, steps: Iterable[Step]) -> None:
        happens, self.meanwhile = self.meanwhile, None
        if happens:
            happens()


@dataclass
class Kept:
    """What the model knows of one record. `target` is the record that it judges, if it is a signal."""

    record_id: str
    session: str
    device: Level
    limits: dict[tuple[Subject, str], Level]
    private: bool
    target: "Kept | None" = None

    @property
    def most(self) -> Level:
        """The most that it may leave at."""
        found = Level.OFF if self.private else self.device
        for level in self.limits.values():
            found = lower(found, level)
        return found if self.target is None else lower(found, self.target.most)


@dataclass
class Model:
    """What was decided, in plain words."""

    now_ms: int = 1_000
    level: Level = Level.OFF
    given_ms: int = 0
    paused_until_ms: int = 0
    limits: dict[tuple[Subject, str], Level] = field(default_factory=dict)
    records: list[Kept] = field(default_factory=list)
    private_sessions: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)

    @property
    def holds(self) -> bool:
        """Whether the consent is younger than a year."""
        return self.now_ms < self.given_ms + VALID_MS

    def of_session(self, session: str) -> dict[tuple[Subject, str], Level]:
        """The limits of a session and its app."""
        names = ((Subject.SESSION, session), (Subject.APP, SESSIONS[session]))
        return {name: self.limits.get(name, Level.FULL) for name in names}

    def level_now(self, session: str) -> Level:
        """What a session may send now."""
        if self.now_ms < self.paused_until_ms or not self.holds:
            return Level.OFF
        found = self.level
        for limit in self.of_session(session).values():
            found = lower(found, limit)
        return found

    def keep(self, record_id: str, session: str, target: Kept | None = None) -> None:
        """Note a record."""
        paused = self.now_ms < self.paused_until_ms
        if paused and target is None:
            self.private_sessions.add(session)
        private = paused or session in self.private_sessions
        self.records.append(Kept(record_id, session, self.level, self.of_session(session), private, target))

    def set_level(self, level: Level, past_after: int | None) -> None:
        """Note a decision; `past_after` counts records."""
        for at, record in enumerate(self.records):
            record.device = lower(record.device, level) if self.holds else Level.OFF
            if past_after is not None and at >= past_after:
                record.device = level
        self.level, self.given_ms = level, self.now_ms

    def set_limit(self, name: tuple[Subject, str], level: Level) -> None:
        """Note a limit."""
        self.limits[name] = level
        for record in self.records:
            if name in record.limits:
                record.limits[name] = lower(record.limits[name], level)


class Privacy(RuleBasedStateMachine):
    """Two processes on one pool."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if Path(MEMORY).is_dir() else None))
        self.model, self.server = Model(), Acknowledging()
        self.pools = [Pool.open(self.folder, KnownKey.of(bytes(32))) for _ in range(2)]
        clock = self.clock
        self.consents = [ConsentLog(pool, clock=clock) for pool in self.pools]
        self.redactor = Interrupted()
        redactor = LineRedactor("line", self.redactor)
        self.outboxes = [
            Outbox(pool, consent, hold_s=HOLD_MS / 1000, hold_redacted_s=0, redactor=redactor, clock=clock)
            for pool, consent in zip(self.pools, self.consents, strict=True)
        ]
        self.left: dict[str, str] = {}

    def clock(self) -> int:
        return self.model.now_ms

    def teardown(self) -> None:
        for pool in self.pools:
            pool.close()
        shutil.rmtree(self.folder)

    @initialize(level=st.sampled_from([Level.REDACTED, Level.FULL]))
    def first_decision(self, level: Level) -> None:
        self._move(0, ("level", "", level))

    @rule(handle=handles, move=moves)
    def decide(self, handle: int, move: Move) -> None:
        self._move(handle, move)

    def _move(self, handle: int, move: Move) -> None:
        kind, name, value = move
        if kind == "level":
            self.consents[handle].set_level(value)
            self.model.set_level(value, None)
        elif kind == "limit":
            self._limit(handle, name, value)
        elif kind == "pause":
            self._pause(handle, value)
        else:
            self.model.now_ms += value

    def _limit(self, handle: int, name: str, level: Level) -> None:
        """A limit of a session or an app; at `full` it is lifted."""
        subject = Subject.SESSION if name in SESSIONS else Subject.APP
        if level is Level.FULL:
            self.consents[handle].lift_limit(subject, name)
        else:
            try:
                self.consents[handle].set_limit(subject, name, level=level)
            except ConsentError:
                assert not self.model.holds or level.rank > self.model.level.rank
                return
        self.model.set_limit((subject, name), level)

    def _pause(self, handle: int, for_ms: int) -> None:
        """A pause; one of no time ends it."""
        self.model.paused_until_ms = self.model.now_ms + for_ms
        if for_ms:
            self.consents[handle].pause(self.model.paused_until_ms)
        else:
            self.consents[handle].resume()

    @rule(handle=handles, level=levels, start=st.integers(0, 30))
    def include_the_past(self, handle: int, level: Level, start: int) -> None:
        after = min(start, len(self.model.records))
        with self.pools[handle].read() as database:
            query = "SELECT seq FROM changes WHERE kind IN ('step', 'signal') ORDER BY seq LIMIT 1 OFFSET ?"
            row = database.conn.execute(query, (after - 1,)).fetchone() if after else None
        self.consents[handle].set_level(level, past_after=row[0] if row else 0)
        self.model.set_level(level, after)

    @rule(
        handle=handles,
        sessions=st.sets(st.sampled_from(sorted(SESSIONS)), min_size=1, max_size=3),
        secret=st.booleans(),
        paused=st.sampled_from([*[False] * 7, True]),
    )
    def keep(self, handle: int, sessions: set[str], secret: bool, paused: bool) -> None:
        if paused:
            self._pause(1 - handle, HOLD_MS)
        for session in sorted(sessions):
            self._keep(handle, session, secret=secret)
        if paused:
            self._pause(handle, 0)

    def _keep(self, handle: int, session: str, *, secret: bool) -> None:
        step = Step(
            step_id=new_step_id(),
            session_id=session,
            run_id=f"run-{session}",
            prompt_ids=[1, SECRET if secret else 2],
            response_ids=[3, 4],
            response_logprobs=[-0.5, -0.25],
            policy=Policy("line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=1,
        )
        reply = {"role": "assistant"}
        kept = KeptStep(step=step, messages=[], reply=reply, app=SESSIONS[session], started_ms=1, finished_ms=2)
        self.pools[handle].keep_step(kept).result()
        self.model.keep(step.step_id, session)

    @precondition(lambda self: any(record.target is None for record in self.model.records))
    @rule(handle=handles, choice=st.integers(0, 100))
    def judge(self, handle: int, choice: int) -> None:
        steps = [record for record in self.model.records if record.target is None]
        target = steps[choice % len(steps)]
        signal = Signal(
            signal_id=new_id(),
            target=Target.STEP,
            target_id=target.record_id,
            source="user",
            value=1.0,
            created_ms=1,
            comment="secret",
        )
        self.pools[handle].keep_signal(signal).result()
        self.model.keep(signal.signal_id, target.session, target)

    @rule(
        handle=handles,
        session=st.sampled_from(sorted(SESSIONS)),
        filling=interruptions,
        sending=interruptions,
        received=st.booleans(),
    )
    def sync(self, handle: int, session: str, filling: Move | None, sending: Move | None, received: bool) -> None:
        """Keep, fill and send, while another process does something in the midst; the server may have it at once."""
        outbox = self.outboxes[handle]
        self._keep(1 - handle, session, secret=True)
        if filling:
            self.redactor.meanwhile = partial(self._move, 1 - handle, filling)
        outbox.fill()
        self.redactor.meanwhile = None
        self.model.now_ms += HOLD_MS
        items, _ = outbox.next_items(1 << 20)
        if sending:
            self._move(1 - handle, sending)
        try:
            outbox.mark_sent([item.item_id for item in items])
        except (ConsentError, PoolError):
            return
        for item in items:
            self._check(handle, item)
        if received:
            sent = [item.item_id for item in outbox.list() if item.state is ItemState.SENT]
            self.server.acknowledge(outbox, sent)

    @rule(handle=handles, choice=st.integers(0, 100), drop=st.booleans())
    def take_out(self, handle: int, choice: int, drop: bool) -> None:
        """The owner drops or approves an item."""
        outbox = self.outboxes[handle]
        waiting = [item for item in outbox.list() if item.state is ItemState.QUEUED]
        if not waiting:
            return
        item_id = waiting[choice % len(waiting)].item_id
        if not drop:
            outbox.approve(item_id)
            return
        batch = wire.decode(outbox.get(item_id).body, StepBatch)
        outbox.drop(item_id)
        self.model.dropped |= {step.step_id for step in batch.steps} | {s.signal_id for s in batch.signals}

    @invariant()
    def what_waits_may_leave_at_its_level(self) -> None:
        known = {record.record_id: record for record in self.model.records}
        for item in self.outboxes[0].list():
            if item.has_bytes and item.state is not ItemState.RECEIVED and self.model.holds:
                limits = self.model.of_session(item.session_id).values()
                assert item.level.rank <= min([self.model.level, *limits], key=lambda level: level.rank).rank
                assert item.session_id in {record.session for record in known.values()}

    def _check(self, handle: int, item: UploadItem) -> None:
        """These bytes go out now."""
        listed = self.outboxes[handle].find(item.item_id)
        known = {record.record_id: record for record in self.model.records}
        assert listed.level.rank <= self.model.level_now(listed.session_id).rank
        batch = wire.decode(item.body, StepBatch)
        for record_id in [step.step_id for step in batch.steps] + [signal.signal_id for signal in batch.signals]:
            record = known[record_id]
            assert record.session == listed.session_id
            assert listed.level.rank <= record.most.rank, (listed.level, record)
            assert record_id not in self.model.dropped
            assert self.left.setdefault(record_id, item.item_id) == item.item_id, "it left in two items"
        if listed.level is Level.REDACTED:
            assert not [step for step in batch.steps if SECRET in step.token_ids]
            assert not [step for step in batch.steps if step.session_id in SESSIONS]
            assert not [signal for signal in batch.signals if "secret" in signal.comment]


TestPrivacy = Privacy.TestCase
TestPrivacy.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
