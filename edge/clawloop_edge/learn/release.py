"""From what was learned to what may leave: an item of the outbox, noised first where the level says so.

The release of a noised delta is counted in the transaction that begins its run, before anything is learned, and given
back in the one that ends the run without it, or that takes the item back before it left. What happens between is
computed anew after a crash and is in no item, so nothing leaves twice. Knows no schedule and no learner.
docs/formats/deltas.md.
"""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from clawloop_edge.errors import ConsentError, NotLearnable
from clawloop_edge.learn import noise
from clawloop_edge.learn.choosing import Chosen
from clawloop_edge.learn.job import Learned
from clawloop_edge.learn.runs import Outcome, Run, Runs, begin_run, drop_run, end_in, run_in
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog, wall_clock_ms
from clawloop_edge.privacy.deltas import DeltaDraft, check_sources, put_delta, seal_body
from clawloop_edge.privacy.items import DeltaFacts, Items
from clawloop_edge.privacy.ledger import Ledger, epsilon_of, sigma_for
from clawloop_edge.privacy.schema import ItemState, take_back
from clawloop_shared import wire
from clawloop_shared.deltas import DELTA_KIND, LearnTask, LoraDelta, delta_tensors
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.records import Policy

if TYPE_CHECKING:
    from sqlite_utils import Database

MAX_CLIP = 100.0
"""the largest norm that this device lets a noised delta have, whatever the server asks for"""
MAX_BODY_BYTES = 256 << 20
"""of an item: what is sealed at once"""
BEHIND = 4
"""versions, as many as a server takes deltas from ([federate] max_staleness), after which a sum has no use for one"""
HALF_ERROR = 1e-3
"""the relative error (L2, of each factor) up to which 16 bits are enough: less than the server's own cut by far"""
Arrays = dict[str, NDArray[np.float32]]


class Releaser:
    """Begins runs in one pool, and puts what they learned into its outbox."""

    def __init__(
        self,
        pool: Pool,
        consent: ConsentLog,
        ledger: Ledger,
        *,
        shape: ModelShape,
        settings: LearnSettings,
        hold_ms: dict[Level, int],
        clock: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._pool, self._consent, self._ledger, self._runs = pool, consent, ledger, Runs(pool)
        self._shape, self._settings, self._hold_ms, self._clock = shape, settings, hold_ms, clock

    def noise_of(self, task: LearnTask) -> tuple[float, float]:
        """The standard deviation of the noise, in units of the clip, and the clip: at least what the task asks for, and
        what this device's own budget does if it lasts for `[learn] rounds` releases.

        Raises:
            ConsentError: the task has no clip, so noise would hide nothing.
        """
        clip = min(task.clip, MAX_CLIP)
        if clip <= 0:
            raise ConsentError(f"task {task.task_id} has no clip, so no noise could hide what is learned")
        return max(task.sigma, sigma_for(self._ledger.epsilon, rounds=self._settings.rounds)), clip

    def check_budget(self, task: LearnTask) -> None:
        """Return if the ledger allows one more noised delta. Raises ConsentError."""
        sigma, clip = self.noise_of(task)
        self._ledger.check(task.line_id, sigma=sigma, clip=clip)

    def begin(self, task: LearnTask, chosen: Chosen, *, rank: int) -> Run:
        """Count the release, if it is noised, and note the run, in one transaction. Waits for the disk.

        Raises:
            ConsentError: fewer trajectories than the owner wants, no budget, or a level was lowered this very moment.
        """
        least = self._settings.min_trajectories
        if len(chosen.trajectories) < least:
            raise ConsentError(f"{len(chosen.trajectories)} trajectories, and [learn] min_trajectories is {least}")
        private = chosen.level is Level.PRIVATE_DELTAS
        sigma, clip = self.noise_of(task) if private else (0.0, 0.0)
        run = Run(
            run_id=new_id(),
            task=task,
            level=chosen.level,
            rank=rank,
            step_ids=chosen.step_ids,
            session_ids=chosen.session_ids,
            sources=chosen.sources,
            started_ms=self._clock(),
            sigma=sigma,
            clip=clip,
        )

        def operation(database: "Database") -> Run:
            drop_run(database, self._pool)
            allowance = self._consent.within(database)
            check_sources(database, self._pool, allowance, step_ids=run.step_ids, level=run.level)
            counted = run
            if private:
                line, of = task.line_id, task.task_id
                entry_id = self._ledger.reserve_in(database, line=line, sigma=sigma, clip=clip, round_id=of)
                counted = msgspec.structs.replace(run, entry_id=entry_id)
            begin_run(database, self._pool, counted)
            return counted

        begun = self._pool.submit(operation).result()
        self._runs.keep_trajectories(begun, chosen.trajectories)
        return begun

    def take_back_stale(self, served: Policy) -> int:
        """Take back what waits for a secure sum that begins from an adapter of this line that is more than `BEHIND`
        versions old: its release is given back, and what it was learned from is learned from again. Gives how many.
        """
        with self._pool.read() as database:
            if not self._stale(database, served):
                return 0
        return self._pool.submit(
            lambda database: take_back(database, self._pool.keyring, item_ids=self._stale(database, served))
        ).result()

    def _stale(self, database: "Database", served: Policy) -> list[str]:
        waiting = f" WHERE kind = '{DELTA_KIND}' AND state IN ('{ItemState.QUEUED}', '{ItemState.APPROVED}')"
        found = [item for item in Items(self._pool.keyring).all(database, waiting) if item.goes_masked and item.delta]
        return [
            item.item_id
            for item in found
            if item.delta and item.delta.line_id == served.line and item.delta.base_version < served.version - BEHIND
        ]

    def may_go_on(self, run: Run) -> bool:
        """Whether what a run learns may still leave: it was not given up, and no level was lowered."""
        with self._pool.read() as database:
            current, allowance = run_in(database, self._pool), self._consent.within(database)
            if current is None or current.run_id != run.run_id:
                return False
            try:
                check_sources(database, self._pool, allowance, step_ids=run.step_ids, level=run.level)
            except ConsentError:
                return False
            return True

    def release(self, run: Run, learned: Learned) -> Outcome:
        """Put what was learned into the outbox, and end the run, in one transaction. Waits for the disk.

        Raises:
            ConsentError: it may not leave any more, or was learned from too little. The run is not ended.
            NotLearnable: what was learned is not a delta of that task.
        """
        least = self._settings.min_trajectories
        if len(learned.trajectory_ids) < least:
            counts = _counted(learned.set_aside)
            raise ConsentError(
                f"learned from {len(learned.trajectory_ids)} trajectories, and [learn] min_trajectories is {least};"
                f" set aside: {counts or 'none'}"
            )
        delta, parameters = self._delta(run, learned)
        body = wire.encode(delta)
        if len(body) > MAX_BODY_BYTES:
            raise NotLearnable(f"a delta of {len(body)} bytes is too large; lower [learn] max_rank")
        draft = DeltaDraft(
            body=seal_body(self._pool.keyring, new_id(), body),
            level=run.level,
            facts=_facts(delta, run, parameters=parameters),
            step_ids=run.step_ids,
            sources=list(run.sources.values()),
            entry_id=run.entry_id,
        )
        return self._pool.submit(lambda database: self._put(database, run, draft, learned)).result()

    def _put(self, database: "Database", run: Run, draft: DeltaDraft, learned: Learned) -> Outcome:
        if not drop_run(database, self._pool, run_id=run.run_id, spare=False):
            raise ConsentError("the run was given up: a session that it learned from was forgotten")
        allowance, hold_ms = self._consent.within(database), self._hold_ms[run.level]
        now_ms = self._clock()
        item_id = put_delta(database, self._pool, allowance, draft=draft, hold_ms=hold_ms, now_ms=now_ms)
        entries = self._ledger.entries_in(database) if run.entry_id else []
        outcome = Outcome(
            task_id=run.task.task_id,
            line_id=run.task.line_id,
            base_version=run.task.base_version,
            at_ms=now_ms,
            took_s=(now_ms - run.started_ms) / 1000,
            level=run.level,
            trajectories=len(learned.trajectory_ids),
            item_id=item_id,
            reward=learned.reward,
            updates=len(learned.updates),
            set_aside=_counted(learned.set_aside),
            epsilon=epsilon_of(entry.sigma for entry in entries if entry.model_line == run.task.line_id),
        )
        end_in(database, self._pool, outcome)
        return outcome

    def _delta(self, run: Run, learned: Learned) -> tuple[LoraDelta, int]:
        """What leaves, and how many numbers it has."""
        from safetensors.numpy import load, save

        task, factors = run.task, load(learned.weights)
        if not all(np.isfinite(each).all() for each in factors.values()):
            raise NotLearnable("what was learned has numbers that are infinite, or none")
        private = run.level is Level.PRIVATE_DELTAS
        if private:
            key = secrets.token_bytes(noise.KEY_BYTES)
            factors = noise.hidden(factors, clip=run.clip, sigma=run.sigma, key=key)
        else:
            factors = _short(factors)
        delta = LoraDelta(
            task_id=task.task_id,
            line_id=task.line_id,
            base_version=task.base_version,
            weights_sha256=task.weights_sha256,
            method=task.method,
            level=run.level,
            rank=run.rank,
            alpha=alpha_of(task, run.rank),
            target_modules=task.target_modules,
            weights=save(factors),
            trajectories=len(learned.trajectory_ids),
            clip=run.clip,
            sigma=run.sigma,
            reward=None if private else _within(learned.reward),
        )
        try:
            delta_tensors(delta, self._shape)
        except AdapterInvalid as error:
            raise NotLearnable(str(error)) from error
        return delta, sum(each.size for each in factors.values())


def alpha_of(task: LearnTask, rank: int) -> float:
    """The alpha of a delta of that rank: alpha / rank stays what the task says."""
    return task.alpha * rank / task.rank


def _facts(delta: LoraDelta, run: Run, *, parameters: int) -> DeltaFacts:
    return DeltaFacts(
        task_id=delta.task_id,
        line_id=delta.line_id,
        base_version=delta.base_version,
        method=str(delta.method),
        rank=delta.rank,
        trajectories=delta.trajectories,
        steps=len(run.step_ids),
        parameters=parameters,
        clip=delta.clip,
        sigma=delta.sigma,
        secure=run.task.secure and run.level is Level.PRIVATE_DELTAS,
    )


def _short(factors: Arrays) -> dict[str, NDArray[Any]]:
    """The factors in 16 bits if that changes none of them by more than `HALF_ERROR`, else as they are.

    After a few updates with a small learning rate, many a value of B lies where float16 has few bits left (below 6e-5);
    bfloat16 has eight bits everywhere, and errs more than that. So it is measured.
    """
    with np.errstate(over="ignore"):
        short = {name: each.astype(np.float16) for name, each in factors.items()}
    for name, each in factors.items():
        error = np.linalg.norm(short[name].astype(np.float64) - each)
        if not error <= HALF_ERROR * np.linalg.norm(each.astype(np.float64)):
            return dict(factors)
    return short


def _counted(set_aside: dict[str, str]) -> dict[str, int]:
    reasons = list(set_aside.values())
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def _within(reward: float) -> float:
    return max(-1.0, min(1.0, reward))
