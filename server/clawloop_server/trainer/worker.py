"""One round of the server: what the vault has ready, trained on, joined, judged, and recorded as one transaction.

It goes on from the state that the database names (`saves`), through trajectories (`running`), and what devices learned
at home (`joining`); each may be there without the other. Knows no process, poll or signal.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.bases import Base, check_unchanged, find_base
from clawloop_server.config import load_config
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home
from clawloop_server.release.gate import Decision, Verdict, decide, decide_unevaluated, refuse
from clawloop_server.release.keys import load_master_key
from clawloop_server.release.records import Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.base import load_tokenizer
from clawloop_server.trainer.cohorting import Cohorting, Heard
from clawloop_server.trainer.conflicts import Conflict, by_device, conflict
from clawloop_server.trainer.delta_round import DeltaRound
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.joining import Joining, Waiting, join_seed
from clawloop_server.trainer.judge import Judge
from clawloop_server.trainer.loop import NothingFinite, Plan, Report, RoundResult, TrainState
from clawloop_server.trainer.parting import begin_apart
from clawloop_server.trainer.reports import (
    NOTHING_LEARNED,
    AnyRound,
    RoundBegan,
    RoundReport,
    began_of,
    metrics_of,
    no_result,
    nothing_joined,
    round_state,
)
from clawloop_server.trainer.running import RUNNING_FILE, LessonsLost, NothingLeft, RunningRound
from clawloop_server.trainer.saves import START, Named, Saves
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.trainer.trial import Gate
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.store import Vault, lineage_root
from clawloop_shared.errors import ClawloopError
from clawloop_shared.manifest import Probe
from clawloop_shared.rows import Limits, Sample

_log = logging.getLogger("clawloop.trainer")

PROBE_TEXT = "A probe of sixteen tokens: 0123456789, one sentence that no task needs."
PROBE_TOKENS = 16
OpenEngine = Callable[[Path, TrainSettings], TrainEngine]
RESTS_S = 3600.0
"""how long training waits after a round that failed for a reason that is not its data's fault"""


class _Began(NamedTuple):
    """A round that runs, the adapter that it began with, and where that is from."""

    running: AnyRound
    current: dict[str, Tensor]
    went_on_from: Named
    cohort: str


class _Turn(NamedTuple):
    """What the next round of a cohort waits for: so many trajectories more, unless enough `deltas` wait."""

    cohort: str
    missing: int
    deltas: bool

    @property
    def alone(self) -> bool:
        """Whether it would be of deltas alone."""
        return self.deltas and self.missing > 0

    @property
    def ready(self) -> bool:
        """Whether it can run."""
        return self.deltas or not self.missing


class Worker:
    """The trainer of one model line of one server."""

    def __init__(
        self,
        *,
        home: Home,
        base: Base,
        engine: TrainEngine,
        vault: Vault,
        registry: Registry,
        gate: Gate,
        probe_ids: list[int],
        judge: Judge | None = None,
        federate: FederateSettings | None = None,
    ) -> None:
        self.vault, self._judges = vault, judge
        self._home, self._base, self._engine, self._registry, self._gate = home, base, engine, registry, gate
        self._probe_ids = probe_ids
        self._state = TrainState()
        self._loaded: Named | None = None
        self._row_tokens, self._rests_until_s = engine.row_tokens, -math.inf
        own: dict[str, Any] = {"engine": engine, "registry": registry, "line_id": base.line_id}
        self._saves = Saves(home.trainer, **own)
        federate = federate or FederateSettings()
        self._joining = Joining(vault=vault, settings=federate, **own)
        self._cohorts = Cohorting(vault.database, line_id=base.line_id, settings=federate)
        self._served: dict[str, int] = {}
        self._saves.begin()

    @classmethod
    def open(cls, home: Home, *, open_engine: OpenEngine | None = None) -> Worker:
        """The trainer of the server in `home`. `open_engine`: where it is not an engine of this process alone.

        Raises:
            ConfigError: the settings, the model folder or the gate's tasks are not usable.
            HomeError, KeyMissing, StorageError: the server's keys or database cannot be opened.
        """
        config = load_config(home.config)
        base = find_base(home, config.hub.line)
        folder = check_unchanged(home, base)
        engine, tokenizer = (open_engine or TrainEngine.open)(folder, config.train), load_tokenizer(folder)
        judge = Judge.open(config.classifier, tokenizer) if config.classifier.path else None
        database = ServerDatabase.open(home.database, load_master_key(home))
        return cls(
            home=home,
            base=base,
            engine=engine,
            vault=Vault(database, home=home, master_key=load_master_key(home), settings=config.reward),
            judge=judge,
            registry=Registry(database, home.adapters),
            gate=Gate.open(config, home, engine=engine, tokenizer=tokenizer),
            probe_ids=_probe_ids(tokenizer),
            federate=config.federate,
        )

    def close(self) -> None:
        """Close the database."""
        self.vault.close()

    def judge(self) -> int:
        """Have the classifier look at some answers that it has not seen; how many. 0 also without a classifier."""
        return self._judges.judge(self.vault, self._base.line_id) if self._judges else 0

    @property
    def missing(self) -> int:
        """How many more rewarded trajectories the next round waits for; 0: it can run, or go on, if only with what
        devices learned at home."""
        turn = self._turn()
        return 0 if turn.ready else turn.missing

    def _turn(self) -> _Turn:
        """Whose round is next: the one that was cut off; of the cohorts that have enough, the one that waited longest;
        else the one that lacks least."""
        cut_off = self._registry.under_way(self._base.line_id)
        if cut_off and any(not pin.lost for pin in self.vault.pins.of(cut_off.round_id)):
            return _Turn(cut_off.cohort, 0, deltas=False)
        turns = [self._turn_of(cohort) for cohort in self._cohorts.names()]
        return min(turns, key=lambda t: (not t.ready, self._served.get(t.cohort, 0) if t.ready else t.missing))

    def _turn_of(self, cohort: str) -> _Turn:
        ready = self.vault.count_ready(self._base.line_id, cohort=cohort)
        missing = max(0, self._settings.round_trajectories - ready)
        deltas = missing > 0 and self._joining.ready(lambda: self._saves.newest(cohort), cohort=cohort)
        return _Turn(cohort, missing, deltas)

    @property
    def resting(self) -> bool:
        """Whether training waits, since a round failed through no fault of its data. A restart ends the wait."""
        return time.monotonic() < self._rests_until_s

    @property
    def _settings(self) -> TrainSettings:
        return self._engine.settings

    def run(
        self,
        report: Report = lambda metrics: None,
        *,
        began: Callable[[RoundBegan], None] = lambda round: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> RoundReport:
        """Run a round on what is ready, oldest first, at most as many as a round takes, and on the deltas that wait.
        With too few trajectories and enough deltas it is of these alone. `began` hears of it before its first update,
        `report` of each.

        Raises:
            TrainerError: nothing is ready.
        """
        started = clock()
        self._engine.row_tokens = self._row_tokens  # what an earlier round had less, it had for itself
        self._joining.forget_losses()
        turn = self._turn()
        self._served[turn.cohort] = 1 + max(self._served.values(), default=0)
        while True:
            try:
                self._restore(turn.cohort)
                begun = self._begin(turn, clock=clock)
                began(began_of(begun.running, deltas=len(self._waiting(turn.cohort))))
                round_id, result, version, decision = self._run(begun, report)
                break
            except LessonsLost as error:
                _log.warning("%s", error)
            except NothingLeft as error:
                round_id, result, version, decision = self._nothing_left(error)
                break
        evaluation = decision.evaluation
        return RoundReport(
            round_id=round_id,
            state=round_state(result, decision),
            verdict=decision.verdict,
            reason=decision.reason,
            version=version,
            trajectories=len(result.trajectory_ids),
            steps=result.steps,
            updates=len(result.updates),
            reward=result.reward,
            evaluated=evaluation.reward,
            evaluated_before=evaluation.reward_before,
            set_aside=len(result.set_aside),
            seconds=clock() - started,
            deltas=len(result.joined_ids),
        )

    def _waiting(self, cohort: str) -> list[Waiting]:
        """The deltas that a round of a cohort may join."""
        return self._joining.taken(self._saves.newest(cohort), cohort=cohort)

    def _begin(self, turn: _Turn, *, clock: Callable[[], float]) -> _Began:
        """The round that was cut off, or a new one.

        Raises:
            NothingLeft: the one that was cut off has nothing any more.
            TrainerError: nothing is ready.
        """
        went_on_from = self._loaded or self._saves.named(turn.cohort)
        current, self._loaded = self._engine.adapter(), None
        if turn.alone:
            return _Began(self._delta_round(turn.cohort), current, went_on_from, turn.cohort)
        running = RunningRound(
            engine=self._engine,
            vault=self.vault,
            registry=self._registry,
            folder=self._home.trainer,
            line_id=self._base.line_id,
            state=self._state,
            limits=self._limits(),
            cohort=turn.cohort,
            clock=clock,
        )
        return _Began(running, current, went_on_from, turn.cohort)

    def _delta_round(self, cohort: str) -> DeltaRound:
        return DeltaRound(
            vault=self.vault,
            registry=self._registry,
            line_id=self._base.line_id,
            state=self._state,
            waiting=self._waiting(cohort),
            cohort=cohort,
        )

    def _run(self, begun: _Began, report: Report) -> tuple[str, RoundResult, int | None, Decision]:
        """Go through the round; its id, its result, the version that it made, the last word.

        Raises:
            LessonsLost: it is to be made anew.
        """
        running = begun.running
        try:
            result, decision = self._learn(begun, report)
            version, result, decision = self._record(begun, result, decision=decision)
        except LessonsLost:
            running.begin_again()
            raise
        except (ClawloopError, KeyboardInterrupt):
            running.rest()
            raise
        running.ended()
        self._prune()
        if running.given_up:
            _log.error("training waits %.0f s or for a restart: %s", RESTS_S, running.given_up)
            self._rests_until_s = time.monotonic() + RESTS_S
        return running.round_id, result, version, decision

    def _nothing_left(self, error: NothingLeft) -> tuple[str, RoundResult, int | None, Decision]:
        """Note that a round that nothing is left of has ended."""
        decision, result = refuse(str(error)), no_result(self._state, Plan(batches=[]))
        metrics = metrics_of(result, decision)
        self._registry.finish_round(error.round_id, RoundState.FAILED, metrics=metrics, reason=decision.reason)
        (self._home.trainer / RUNNING_FILE).unlink(missing_ok=True)
        return error.round_id, result, None, decision

    def _learn(self, begun: _Began, report: Report) -> tuple[RoundResult, Decision]:
        running = begun.running
        nothing = no_result(running.progress.state, running.plan)
        if running.given_up:
            return nothing, refuse(running.given_up)
        conflict = self._conflict(begun)
        try:
            result = running.run(report)
        except LessonsLost:
            raise
        except NothingFinite as error:
            running.given_up = str(error)
            return nothing, refuse(running.given_up)
        except TrainerError as error:
            return nothing, refuse(str(error))
        result = msgspec.structs.replace(result, conflict=conflict)
        if isinstance(running, RunningRound):
            if not result.trajectory_ids:
                return result, refuse(NOTHING_LEARNED)
            if broken := unhealthy(result.updates, self._settings):
                return result, refuse(broken)
        if running.may_join:
            result = self._join(begun, result)
        if not result.lineage:
            return result, refuse(nothing_joined(result))
        return result, self._judge(result, current=begun.current)

    def _conflict(self, begun: _Began) -> Conflict:
        """Who of the devices whose trajectories the round has pulls which way: asked where the engine is still at the
        adapter that the round begins with, and only where a split could come of it."""
        running = begun.running
        if isinstance(running, DeltaRound) or running.progress.at_update:
            return {}
        if not self._cohorts.could_split(begun.cohort):
            return {}
        running.begins()
        ids = (trajectory_id for batch in running.plan.batches for trajectory_id in batch)
        read = self.vault.pins.read(ids, unreadable={})  # its update names what cannot be read
        return conflict(self._engine, by_device(read), version=self._state.version, limits=self._limits())

    def _join(self, begun: _Began, result: RoundResult) -> RoundResult:
        """Let what devices learned at home into the engine; the result with what became of it."""
        running = begun.running
        waiting = running.waiting if isinstance(running, DeltaRound) else self._waiting(begun.cohort)
        seed = join_seed(self._settings.seed, running.progress.state.rounds)
        return self._joining.into(result, waiting, before=begun.current, seed=seed)

    def _limits(self) -> Limits:
        config = self._engine.model.config
        longest = min(self._settings.max_sample_tokens, config.max_position_embeddings)
        return Limits(
            line_id=self._base.line_id, vocab_size=config.vocab_size, max_tokens=longest, rules=self.vault.rules
        )

    # state

    def _restore(self, cohort: str = "") -> None:
        """Make engine and state those that the database names for a cohort, unless they are."""
        if self._loaded != self._saves.named(cohort):
            self._state, self._loaded = self._saves.restore(cohort)

    def _prune(self) -> None:
        self._saves.prune()

    # rounds

    def _record(
        self, begun: _Began, result: RoundResult, *, decision: Decision
    ) -> tuple[int | None, RoundResult, Decision]:
        """Checkpoint first, then all that happened in one transaction; the version of the new adapter, if any, the
        result with the cohorts that came of it, and the last word on it.

        Raises:
            LessonsLost: it learned from what was forgotten meanwhile; nothing is recorded.
        """
        running, version, candidate = begun.running, None, None
        round_id = running.round_id
        if decision.verdict is not Verdict.REFUSED:
            self._saves.save(round_id, result.state)
            candidate = self._candidate(round_id, result, decision=decision, cohort=begun.cohort)
        heard = self._hear(begun, result)
        try:
            with self.vault.database.write():
                if candidate and (unwanted := self._saves.unwanted(begun.went_on_from, begun.cohort)):
                    decision = refuse(unwanted)
                elif candidate:
                    running.check()
                    self._joining.check(result)
                    version = self._registry.record_candidate(candidate)
                if running.given_up or (candidate and version is None):
                    running.release()
                else:
                    running.consume()
                    self._joining.settle(round_id, result, refused="" if version else decision.reason)
                if version is not None and decision.verdict is Verdict.HELD:
                    self._registry.hold(version)
                result = self._part(begun, result, heard)
                self._registry.finish_round(
                    round_id,
                    round_state(result, decision),
                    metrics=metrics_of(result, decision),
                    version=version,
                    reason=decision.reason,
                )
        except LessonsLost:
            self._saves.path(round_id).unlink(missing_ok=True)
            raise
        if version is not None and not result.split:
            self._state = msgspec.structs.replace(result.state, version=version)
            self._loaded = (round_id, version)
        return version, result, decision

    def _hear(self, begun: _Began, result: RoundResult) -> Heard | None:
        """What the round told of who agrees with whom."""
        conflicts = result.conflict, result.joined.get("conflict", {})
        return self._cohorts.hear(begun.cohort, *conflicts, version=begun.went_on_from[1])

    def _part(self, begun: _Began, result: RoundResult, heard: Heard | None) -> RoundResult:
        """Keep what was heard; the result with the cohorts that part. Part of the transaction that records it."""
        split = self._cohorts.part(heard) if heard else []
        if split:
            begin_apart(
                self._registry,
                line_id=self._base.line_id,
                cohort=begun.cohort,
                parted=[one["cohort"] for one in split],
                since=split[0]["since"],
                back=split[0]["back"],
                bare=self._bare,
            )
        return msgspec.structs.replace(result, split=split)

    def _bare(self, cohort: str) -> Candidate:
        """An adapter that leaves the model as it is, for training to begin with."""
        self._engine.load_state(self._saves.path(START))
        nothing = no_result(TrainState(), Plan(batches=[]))
        return self._candidate(START, nothing, decision=decide_unevaluated(self._gate.settings), cohort=cohort)

    def _candidate(self, round_id: str, result: RoundResult, *, decision: Decision, cohort: str) -> Candidate:
        return Candidate(
            round_id=round_id,
            line=self._base.line,
            files=self._engine.adapter_files(),
            rank=self._settings.rank,
            alpha=self._settings.alpha,
            target_modules=sorted(self._settings.target_modules),
            probe=self._probe(),
            evaluation=decision.evaluation,
            lineage_root=lineage_root(result.lineage),
            cohort=cohort,
        )

    def _probe(self) -> Probe:
        """Fixed ids and what this adapter makes of them, for a device to check that it computes the same."""
        size = len(self._probe_ids)
        sample = Sample(
            step_id="probe",
            trajectory=0,
            token_ids=self._probe_ids,
            trained=range(1, size),
            logprobs=[0.0] * (size - 1),
            advantages=[0.0] * (size - 1),
        )
        return Probe(ids=self._probe_ids, logprobs=self._engine.logprobs([sample], in_float32=True)[0])

    # the gate

    def _judge(self, result: RoundResult, *, current: dict[str, Tensor]) -> Decision:
        if not self._gate.tasks:
            return decide_unevaluated(self._gate.settings)
        seed = self._gate.seed(result.lineage)
        candidate = self._gate.play(self._engine, seed)
        with self._engine.with_adapter(current):
            before = self._gate.play(self._engine, seed)
        return decide(candidate, before, settings=self._gate.settings, suite=self._gate.suite)


def _probe_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return (ids * PROBE_TOKENS)[:PROBE_TOKENS]
