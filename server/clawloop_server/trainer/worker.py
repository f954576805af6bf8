"""One round of the server: what the vault has ready, trained on, judged, and recorded as one transaction.

The database names the state that training goes on from: the checkpoint of the round that made the newest adapter that
was not taken back. A round that was refused or failed left nothing behind; one that was cut off is gone on with
(`running`). Knows no process, poll or signal.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from clawloop_server.bases import Base, check_unchanged, find_base
from clawloop_server.config import load_config
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home
from clawloop_server.release.gate import Decision, Verdict, decide, decide_unevaluated, refuse
from clawloop_server.release.keys import load_master_key
from clawloop_server.release.records import AdapterRecord, AdapterState, Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.base import load_tokenizer
from clawloop_server.trainer.checkpoint import remove_drafts
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.judge import Judge
from clawloop_server.trainer.loop import NothingFinite, Plan, Report, RoundResult, TrainState
from clawloop_server.trainer.running import RUNNING_FILE, LessonsLost, NothingLeft, RunningRound
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.trainer.trial import Gate
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.store import Vault, lineage_root
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.manifest import Probe
from clawloop_shared.rows import Limits, Sample

_log = logging.getLogger("clawloop.trainer")

PROBE_TEXT = "A probe of sixteen tokens: 0123456789, one sentence that no task needs."
PROBE_TOKENS = 16
KEPT_CHECKPOINTS = 8
START = "start"
OpenEngine = Callable[[Path, TrainSettings], TrainEngine]
RESTS_S = 3600.0
"""how long training waits after a round that failed for a reason that is not its data's fault"""
NOTHING_LEARNED = "nothing was learned from: all of it was forgotten meanwhile, or set aside"


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a checkpoint: what training remembers, and what the adapter's numbers mean."""

    state: TrainState
    line_id: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]


class RoundBegan(msgspec.Struct, frozen=True, kw_only=True):
    """What a round starts with; one line of the trainer's output. `updates` is what it will be unless groups or what is
    set aside make it another number; each update says it."""

    round_id: str
    base_version: int
    trajectories: int
    steps: int
    updates: int
    done: int = 0
    """updates that were made before a crash"""
    learned: int = 0
    """trajectories that these learned from"""


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a round came to; one line of the trainer's output."""

    round_id: str
    state: RoundState
    verdict: str
    reason: str
    version: int | None
    trajectories: int
    steps: int
    updates: int
    reward: float
    evaluated: float
    evaluated_before: float
    set_aside: int
    seconds: float


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
    ) -> None:
        self.vault, self._judges = vault, judge
        self._home, self._base, self._engine, self._registry, self._gate = home, base, engine, registry, gate
        self._probe_ids = probe_ids
        self._state = TrainState()
        self._loaded: tuple[str, int] | None = None
        self._row_tokens, self._rests_until_s = engine.row_tokens, -math.inf
        remove_drafts(home.trainer)
        registry.remove_drafts()
        self._prune()
        if self._newest() is None:
            self._save(START, TrainState())

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
        )

    def close(self) -> None:
        """Close the database."""
        self.vault.close()

    def judge(self) -> int:
        """Have the classifier look at some answers that it has not seen; how many. 0 also without a classifier."""
        return self._judges.judge(self.vault, self._base.line_id) if self._judges else 0

    @property
    def missing(self) -> int:
        """How many more rewarded trajectories the next round waits for; 0: it can run, or go on."""
        line_id = self._base.line_id
        cut_off = self._registry.under_way(line_id)
        if cut_off and any(not pin.lost for pin in self.vault.pins.of(cut_off.round_id)):
            return 0
        return max(0, self._settings.round_trajectories - self.vault.count_ready(line_id))

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
        """Run a round on what is ready, oldest first, at most as many as a round takes. `began` hears of it before its
        first update, `report` of each.

        Raises:
            TrainerError: nothing is ready.
        """
        started = clock()
        self._engine.row_tokens = self._row_tokens  # what an earlier round had less, it had for itself
        while True:
            try:
                round_id, result, version, decision = self._run(report, began=began, clock=clock)
                break
            except LessonsLost as error:
                _log.warning("%s", error)
            except NothingLeft as error:
                round_id, result, version, decision = self._nothing_left(error)
                break
        evaluation = decision.evaluation
        return RoundReport(
            round_id=round_id,
            state=_round_state(result, decision),
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
        )

    def _run(
        self, report: Report, *, began: Callable[[RoundBegan], None], clock: Callable[[], float]
    ) -> tuple[str, RoundResult, int | None, Decision]:
        """Go from the newest adapter through the round; its id, its result, the version that it made, the last word.

        Raises:
            LessonsLost: it is to be made anew.
        """
        self._restore()
        current, went_on_from, self._loaded = self._engine.adapter(), self._loaded, None
        running = RunningRound(
            engine=self._engine,
            vault=self.vault,
            registry=self._registry,
            folder=self._home.trainer,
            line_id=self._base.line_id,
            state=self._state,
            limits=self._limits(),
            clock=clock,
        )
        began(_began(running))
        try:
            result, decision = self._learn(running, report, current=current)
            version, decision = self._record(running, result, decision=decision, went_on_from=went_on_from)
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
        decision, result = refuse(str(error)), _no_result(self._state, Plan(batches=[]))
        metrics = _metrics(result, decision)
        self._registry.finish_round(error.round_id, RoundState.FAILED, metrics=metrics, reason=decision.reason)
        (self._home.trainer / RUNNING_FILE).unlink(missing_ok=True)
        return error.round_id, result, None, decision

    def _learn(self, running: RunningRound, report: Report, *, current: dict[str, Any]) -> tuple[RoundResult, Decision]:
        nothing = _no_result(running.progress.state, running.plan)
        if running.given_up:
            return nothing, refuse(running.given_up)
        try:
            result = running.run(report)
        except LessonsLost:
            raise
        except NothingFinite as error:
            running.given_up = str(error)
            return nothing, refuse(running.given_up)
        except TrainerError as error:
            return nothing, refuse(str(error))
        if not result.trajectory_ids:
            return result, refuse(NOTHING_LEARNED)
        return result, self._judge(result, current=current)

    def _limits(self) -> Limits:
        config = self._engine.model.config
        longest = min(self._settings.max_sample_tokens, config.max_position_embeddings)
        return Limits(
            line_id=self._base.line_id, vocab_size=config.vocab_size, max_tokens=longest, rules=self.vault.rules
        )

    # state

    def _newest(self) -> AdapterRecord | None:
        """The adapter that training goes on from: not one that the operator took back, and not a mere copy."""
        records = self._registry.adapters(line_id=self._base.line_id)
        gone_on_from = (r for r in records if r.state is not AdapterState.ROLLED_BACK and not r.facts.copy_of)
        return next(gone_on_from, None)

    def _restore(self) -> None:
        """Make engine and state those that the database names, unless they are."""
        newest = self._newest()
        named = (newest.facts.round_id, newest.version) if newest else (START, 0)
        if self._loaded == named:
            return
        checkpoint = self._checkpoint(named[0])
        if newest is None or checkpoint.exists():
            saved = msgspec.json.decode(self._engine.load_state(checkpoint), type=Saved)
        else:
            saved = self._start_from(newest)
        mine = self._saved(saved.state)
        if saved != mine:
            raise ConfigError(
                f"training goes on from rank {saved.rank}, alpha {saved.alpha:g}, {len(saved.target_modules)} targets"
                f" of line {saved.line_id}, but [train] says rank {mine.rank}, alpha {mine.alpha:g},"
                f" {len(mine.target_modules)} targets of line {mine.line_id}; change the settings back"
            )
        self._state = msgspec.structs.replace(saved.state, version=named[1])
        self._loaded = named

    def _start_from(self, adapter: AdapterRecord) -> Saved:
        """Go on from an adapter whose checkpoint was pruned (the operator went back further than they reach): its
        weights are among its files; optimizer, learning rate and baseline begin anew."""
        facts = adapter.facts
        _log.warning("round %s has no checkpoint any more; going on from the files of its adapter", facts.round_id)
        self._engine.start_from(self._registry.files(adapter.version)[WEIGHTS_FILE])
        return Saved(
            state=TrainState(),
            line_id=adapter.line_id,
            rank=facts.rank,
            alpha=facts.alpha,
            target_modules=tuple(sorted(facts.target_modules)),
        )

    def _saved(self, state: TrainState) -> Saved:
        settings = self._settings
        return Saved(
            state=state,
            line_id=self._base.line_id,
            rank=settings.rank,
            alpha=settings.alpha,
            target_modules=tuple(sorted(settings.target_modules)),
        )

    def _checkpoint(self, name: str) -> Path:
        return self._home.trainer / f"{name}.safetensors"

    def _save(self, name: str, state: TrainState) -> None:
        self._engine.save_state(self._checkpoint(name), text=msgspec.json.encode(self._saved(state)).decode())

    def _prune(self) -> None:
        """Remove checkpoints that nothing goes back to: all but those of the newest adapters. One of a round that did
        not pass may have learned from what was forgotten since."""
        line_id, records = self._base.line_id, [r for r in self._registry.adapters() if not r.facts.copy_of]
        kept = [r for r in records if r.line_id == line_id][:KEPT_CHECKPOINTS]
        kept += [r for r in records if r.line_id != line_id]
        names = {START, *(record.facts.round_id for record in kept)}
        for path in self._home.trainer.glob("*.safetensors"):
            if path.stem not in names and path.name != RUNNING_FILE:
                path.unlink()

    # rounds

    def _record(
        self,
        running: RunningRound,
        result: RoundResult,
        *,
        decision: Decision,
        went_on_from: tuple[str, int] | None,
    ) -> tuple[int | None, Decision]:
        """Checkpoint first, then all that happened in one transaction; the version of the new adapter, if any, and the
        last word on it.

        Raises:
            LessonsLost: it learned from what was forgotten meanwhile; nothing is recorded.
        """
        round_id, version, candidate = running.round_id, None, None
        if decision.verdict is not Verdict.REFUSED:
            self._save(round_id, result.state)
            candidate = self._candidate(round_id, result, decision=decision)
        try:
            with self.vault.database.write():
                if candidate and (rolled_back := self._rolled_back(went_on_from)):
                    decision = refuse(rolled_back)
                elif candidate:
                    running.check()
                    version = self._registry.record_candidate(candidate)
                if running.given_up or (candidate and version is None):
                    running.release()
                else:
                    running.consume()
                if version is not None and decision.verdict is Verdict.HELD:
                    self._registry.hold(version)
                self._registry.finish_round(
                    round_id,
                    _round_state(result, decision),
                    metrics=_metrics(result, decision),
                    version=version,
                    reason=decision.reason,
                )
        except LessonsLost:
            self._checkpoint(round_id).unlink(missing_ok=True)
            raise
        if version is not None:
            self._state = msgspec.structs.replace(result.state, version=version)
            self._loaded = (round_id, version)
        return version, decision

    def _rolled_back(self, went_on_from: tuple[str, int] | None) -> str:
        """Why it is refused, if the operator took back, while the round ran, the adapter that it went on from: else it
        would bring back what was taken back. Its data are not at fault."""
        newest = self._newest()
        if went_on_from is None or newest is None or newest.facts.round_id == went_on_from[0]:
            return ""
        return f"adapter {went_on_from[1]}, which it went on from, was rolled back meanwhile; its data wait for another"

    def _candidate(self, round_id: str, result: RoundResult, *, decision: Decision) -> Candidate:
        return Candidate(
            round_id=round_id,
            line=self._base.line,
            files=self._engine.adapter_files(),
            rank=self._settings.rank,
            alpha=self._settings.alpha,
            target_modules=sorted(self._settings.target_modules),
            probe=self._probe(),
            evaluation=decision.evaluation,
            lineage_root=lineage_root(result.trajectory_ids),
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

    def _judge(self, result: RoundResult, *, current: dict[str, Any]) -> Decision:
        broken = unhealthy(result.updates, self._settings)
        if broken:
            return refuse(broken)
        if not self._gate.tasks:
            return decide_unevaluated(self._gate.settings)
        seed = self._gate.seed(result.trajectory_ids)
        candidate = self._gate.play(self._engine, seed)
        with self._engine.with_adapter(current):
            before = self._gate.play(self._engine, seed)
        return decide(candidate, before, settings=self._gate.settings, suite=self._gate.suite)


def _round_state(result: RoundResult, decision: Decision) -> RoundState:
    if not result.trajectory_ids:
        return RoundState.FAILED
    return RoundState.REFUSED if decision.verdict is Verdict.REFUSED else RoundState.PASSED


def _began(running: RunningRound) -> RoundBegan:
    return RoundBegan(
        round_id=running.round_id,
        base_version=running.under_way.base_version,
        trajectories=running.under_way.trajectories,
        steps=running.under_way.steps,
        updates=len(running.plan.batches),
        done=running.progress.at_update,
        learned=len(running.progress.learned),
    )


def _no_result(state: TrainState, plan: Plan) -> RoundResult:
    return RoundResult(
        state=state,
        updates=[],
        trajectory_ids=[],
        steps=0,
        reward=0.0,
        set_aside=plan.set_aside,
        rejected_steps=plan.rejected_steps,
    )


def _metrics(result: RoundResult, decision: Decision) -> dict[str, Any]:
    """What the database keeps of a round."""
    return {
        "verdict": decision.verdict,
        "evaluation": msgspec.structs.asdict(decision.evaluation),
        "reward": result.reward,
        "updates": result.updates,
        "set_aside": result.set_aside,
        "rejected_steps": result.rejected_steps,
    }


def _probe_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return (ids * PROBE_TOKENS)[:PROBE_TOKENS]
