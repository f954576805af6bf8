"""One round of the server: what the vault has ready, trained on, judged, and recorded as one transaction.

The database names the state that training goes on from: the checkpoint of the round that made the newest adapter that
was not taken back. A round that was cut off, refused or failed left nothing behind, so it is simply run again or left
out. Knows no process, poll or signal.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from clawloop_server.bases import Base, check_unchanged, find_base
from clawloop_server.config import ServerConfig, load_config
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home
from clawloop_server.release.gate import Decision, GateSettings, Verdict, decide, decide_unevaluated, refuse
from clawloop_server.release.keys import load_master_key
from clawloop_server.release.records import AdapterRecord, AdapterState, Candidate, RoundState
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.base import load_tokenizer
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply, Sampling
from clawloop_server.trainer.guards import unhealthy
from clawloop_server.trainer.judge import Judge
from clawloop_server.trainer.loop import Report, RoundResult, TrainState, run_round
from clawloop_server.trainer.rows import Limits, Sample
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.trainer.tasks import Scores, Task, TemplateRenderer, load_tasks, play
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.store import Vault, lineage_root
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import sha256_file
from clawloop_shared.lora import WEIGHTS_FILE
from clawloop_shared.manifest import Probe
from clawloop_shared.records import Trajectory

_log = logging.getLogger("clawloop.trainer")

PROBE_TEXT = "A probe of sixteen tokens: 0123456789, one sentence that no task needs."
PROBE_TOKENS = 16
KEPT_CHECKPOINTS = 8
START = "start"


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


@dataclass(frozen=True)
class Gate:
    """What candidates are judged with."""

    settings: GateSettings
    tasks: list[Task]
    suite: str
    renderer: TemplateRenderer
    eos_ids: frozenset[int]


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
        if self._newest() is None:
            self._save(START, TrainState())

    @classmethod
    def open(cls, home: Home) -> Worker:
        """The trainer of the server in `home`.

        Raises:
            ConfigError: the settings, the model folder or the gate's tasks are not usable.
            HomeError, KeyMissing, StorageError: the server's keys or database cannot be opened.
        """
        config = load_config(home.config)
        base = find_base(home, config.hub.line)
        folder = check_unchanged(home, base)
        engine, tokenizer = TrainEngine.open(folder, config.train), load_tokenizer(folder)
        judge = Judge.open(config.classifier, tokenizer) if config.classifier.path else None
        database = ServerDatabase.open(home.database, load_master_key(home))
        return cls(
            home=home,
            base=base,
            engine=engine,
            vault=Vault(database, home=home, master_key=load_master_key(home), settings=config.reward),
            judge=judge,
            registry=Registry(database, home.adapters),
            gate=_open_gate(config, home, tokenizer=tokenizer, eos_ids=_eos_ids(engine, tokenizer)),
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
        """How many more rewarded trajectories the next round waits for; 0: it can run."""
        return max(0, self._settings.round_trajectories - self.vault.count_ready(self._base.line_id))

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
        trajectories = self.vault.ready(self._base.line_id, self._settings.round_trajectories)
        if not trajectories:
            raise TrainerError("no rewarded trajectory is ready; a round needs signals such as /v1/feedback")
        self._restore()
        round_id = self._begin(trajectories)
        began(self._began(round_id, trajectories))
        current = self._engine.adapter()
        try:
            result = run_round(self._engine, trajectories, state=self._state, limits=self._limits(), report=report)
        except TrainerError as error:
            result, decision = _no_result(self._state), refuse(str(error))
        else:
            decision = self._judge(result, current=current)
        version, decision = self._record(round_id, trajectories, result=result, decision=decision)
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

    def _began(self, round_id: str, trajectories: Sequence[Trajectory]) -> RoundBegan:
        return RoundBegan(
            round_id=round_id,
            base_version=self._state.version,
            trajectories=len(trajectories),
            steps=sum(len(t.steps) for t in trajectories),
            updates=math.ceil(len(trajectories) / self._settings.batch_trajectories),
        )

    def _limits(self) -> Limits:
        config = self._engine.model.config
        longest = min(self._settings.max_sample_tokens, config.max_position_embeddings)
        return Limits(line_id=self._base.line_id, vocab_size=config.vocab_size, max_tokens=longest)

    # state

    def _newest(self) -> AdapterRecord | None:
        """The adapter that training goes on from."""
        records = self._registry.adapters(line_id=self._base.line_id)
        return next((record for record in records if record.state is not AdapterState.ROLLED_BACK), None)

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
        """Remove checkpoints that nothing goes back to: all but those of the newest adapters."""
        kept = self._registry.adapters(line_id=self._base.line_id)[:KEPT_CHECKPOINTS]
        names = {START, *(record.facts.round_id for record in kept)}
        for path in self._home.trainer.glob("*.safetensors"):
            if path.stem not in names:
                path.unlink()

    # rounds

    def _begin(self, trajectories: Sequence[Trajectory]) -> str:
        """Note that a round runs: the one that was cut off, if there is one, else a new one."""
        running = (r for r in self._registry.rounds() if r.state is RoundState.RUNNING)
        cut_off = next((r.round_id for r in running if r.line_id == self._base.line_id), None)
        return self._registry.start_round(
            self._base.line_id,
            base_version=self._state.version,
            trajectories=len(trajectories),
            steps=sum(len(t.steps) for t in trajectories),
            round_id=cut_off,
        )

    def _record(
        self, round_id: str, trajectories: Sequence[Trajectory], *, result: RoundResult, decision: Decision
    ) -> tuple[int | None, Decision]:
        """Checkpoint first, then all that happened in one transaction; the version of the new adapter, if any, and the
        last word on it."""
        if decision.verdict is not Verdict.REFUSED:
            self._save(round_id, result.state)
        went_on_from, self._loaded, version = self._loaded, None, None
        with self.vault.database.write() as database:
            decision = self._unless_rolled_back(decision, went_on_from)
            refused = decision.verdict is Verdict.REFUSED
            self.vault.consume(round_id, trajectories, database)
            if not refused:
                version = self._registry.record_candidate(self._candidate(round_id, result, decision=decision))
            if version is not None and decision.verdict is Verdict.HELD:
                self._registry.hold(version)
            self._registry.finish_round(
                round_id,
                _round_state(result, decision),
                metrics=_metrics(result, decision),
                version=version,
                reason=decision.reason,
            )
        if version is not None:
            self._state = msgspec.structs.replace(result.state, version=version)
            self._loaded = (round_id, version)
            self._prune()
        return version, decision

    def _unless_rolled_back(self, decision: Decision, went_on_from: tuple[str, int] | None) -> Decision:
        """A refusal if the operator took back, while the round ran, the adapter that it went on from: else it would
        bring back what was taken back."""
        newest = self._newest()
        if went_on_from is None or newest is None or newest.facts.round_id == went_on_from[0]:
            return decision
        return refuse(f"adapter {went_on_from[1]}, which it went on from, was rolled back meanwhile")

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
        return Probe(ids=self._probe_ids, logprobs=self._engine.logprobs([sample])[0])

    # the gate

    def _judge(self, result: RoundResult, *, current: dict[str, Any]) -> Decision:
        broken = unhealthy(result.updates, self._settings)
        if broken:
            return refuse(broken)
        if not self._gate.tasks:
            return decide_unevaluated(self._gate.settings)
        seed = _gate_seed(result, self._gate.settings.seed)
        candidate = self._play(seed)
        with self._engine.with_adapter(current):
            before = self._play(seed)
        return decide(candidate, before, settings=self._gate.settings, suite=self._gate.suite)

    def _play(self, seed: int) -> Scores:
        gate, settings = self._gate, self._gate.settings

        def sample(prompts: Sequence[Sequence[int]], turn: int) -> list[Reply]:
            sampling = Sampling(
                max_tokens=settings.max_tokens,
                eos_ids=gate.eos_ids,
                temperature=settings.temperature,
                seed=seed + turn,
            )
            return self._engine.generate(prompts, sampling=sampling)

        return play(gate.tasks, sample, renderer=gate.renderer, samples=settings.samples)


def _gate_seed(result: RoundResult, seed: int) -> int:
    """Another seed for each round's data, a refused round's too: with one seed for all, a lucky draw of the current
    adapter would refuse one candidate after the other. The same data gives the same seed, so a round can be redone."""
    digest = lineage_root([*result.trajectory_ids, f"gate seed {seed}"])
    return int(digest[:8], 16)


def _round_state(result: RoundResult, decision: Decision) -> RoundState:
    if not result.trajectory_ids:
        return RoundState.FAILED
    return RoundState.REFUSED if decision.verdict is Verdict.REFUSED else RoundState.PASSED


def _no_result(state: TrainState) -> RoundResult:
    return RoundResult(state=state, updates=[], trajectory_ids=[], steps=0, reward=0.0, set_aside={}, rejected_steps={})


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


def _open_gate(config: ServerConfig, home: Home, *, tokenizer: Any, eos_ids: frozenset[int]) -> Gate:
    settings = msgspec.convert(msgspec.structs.asdict(config.gate), GateSettings)
    path = home.folder / settings.tasks
    return Gate(
        settings=settings,
        tasks=load_tasks(path) if settings.tasks else [],
        suite=f"{path.name}@{sha256_file(path)[:12]}" if settings.tasks else "",
        renderer=TemplateRenderer(tokenizer),
        eos_ids=eos_ids,
    )


def _eos_ids(engine: TrainEngine, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply, by the model's generation settings and its tokenizer."""
    found = engine.model.generation_config.eos_token_id
    named = found if isinstance(found, list) else [found]
    return frozenset(token for token in (*named, tokenizer.eos_token_id) if token is not None)


def _probe_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
    return (ids * PROBE_TOKENS)[:PROBE_TOKENS]
