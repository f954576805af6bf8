"""Plays the tasks of a rollout: so many agents at a time, each with a trajectory of its own, and tells the edge what
they were worth.

What one agent does touches no other's trajectory. An edge that is away ends the rollout, which can go on later.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec

from clawloop_edge.client import CallRefused, Client, EdgeAway, Trajectory
from clawloop_edge.rollout.agent import Limits, run_agent
from clawloop_edge.rollout.environment import agent_environment
from clawloop_edge.rollout.journal import Begun, Ended, Ending, Journal, Score, Scored
from clawloop_edge.rollout.judging import FAILED, Judge, told_reward
from clawloop_edge.rollout.tasks import ANSWERS, Task
from clawloop_shared.files import publish_secret

T = TypeVar("T")
_KEY_CHARS = 16
_SEEDS = 1 << 31


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How tasks are played. `environment` is what every agent is given, `hidden` the fields of a task that none is
    told; `failed_reward` judges runs that failed, which have no reward otherwise."""

    command: list[str]
    n: int
    parallel: int
    channel: Literal["train", "val"]
    environment: Mapping[str, str]
    limits: Limits
    hidden: Collection[str] = ANSWERS
    failed_reward: float | None = None
    seed: int | None = None


class Watch(Protocol):
    """Sees what happens."""

    def started(self) -> None:
        """An agent was started."""

    def ended(self, ended: Ended) -> None:
        """It is gone."""

    def done(self, scored: Scored) -> None:
        """What there is to say of it was said."""


class Rollout:
    """One rollout. On the event loop's thread; its calls wait in threads of their own."""

    def __init__(self, plan: Plan, client: Client, *, journal: Journal, judge: Judge, watch: Watch) -> None:
        self._plan, self._client, self._journal = plan, client, journal
        self._judge, self._watch = judge, watch
        self._threads = ThreadPoolExecutor(plan.parallel, thread_name_prefix="rollout")
        self._resumed = set(journal.ended)
        """runs of which an earlier process may have told the edge more than it wrote down"""

    async def run(self, tasks: Sequence[Task]) -> None:
        """Do what is missing.

        Raises:
            EdgeAway: the edge does not answer, or stops.
            StorageError: the journal cannot be written.
        """
        for folder in ("logs", "tasks"):
            (self._journal.folder / folder).mkdir(mode=0o700, exist_ok=True)
        todo = iter(_runs(tasks, self._plan.n))
        try:
            await self._abandon()
            async with asyncio.TaskGroup() as group:
                for _ in range(self._plan.parallel):
                    group.create_task(self._work(todo))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _abandon(self) -> None:
        """Complete what another process began and never ended, without a reward: whatever its agents still do counts
        for nothing, and the runs begin anew."""
        for begun in self._journal.left:
            trajectory = Trajectory(self._client, begun.trajectory_id, group=begun.group)
            try:
                await self._ask(trajectory.complete)
            except CallRefused as error:
                if error.status != 404:  # forgotten meanwhile
                    raise

    async def _work(self, todo: Iterator[tuple[Task, int]]) -> None:
        for task, index in todo:
            run = run_name(task, index)
            scored = self._journal.scored.get(run)
            if scored is not None and not scored.problem:
                continue
            ended = self._journal.ended.get(run)
            if ended is None:
                self._watch.started()
                ended = await self._play(task, index)
                self._journal.append(ended)
                self._watch.ended(ended)
            scored = await self._score(task, ended)
            self._journal.append(scored)
            self._watch.done(scored)

    async def _play(self, task: Task, index: int) -> Ended:
        """One run, from its trajectory's begin to its end."""
        run, plan = run_name(task, index), self._plan
        group = group_of(self._journal.opened.rollout_id, task)
        try:
            trajectory = await self._ask(
                lambda: self._client.trajectory(
                    group=group, group_size=plan.n, channel=plan.channel, metadata=task.fields
                )
            )
        except CallRefused as error:
            return Ended(run=run, trajectory_id="", ending=Ending.REFUSED, detail=str(error))
        self._journal.append(Begun(run=run, trajectory_id=trajectory.trajectory_id, group=group))
        told = msgspec.json.encode(task.told(plan.hidden))
        task_file = self._task_file(task, told)
        environment = agent_environment(
            plan.environment,
            base_url=trajectory.base_url,
            task=told,
            task_file=str(task_file),
            run=run,
            seed=_seed(plan.seed, run),
        )
        outcome = await run_agent(
            plan.command, environment=environment, task=task_file, log=log_of(self._journal, run), limits=plan.limits
        )
        done = await self._ask(trajectory.complete)
        unused = outcome.ending is Ending.FINISHED and not done.steps
        return Ended(
            run=run,
            trajectory_id=trajectory.trajectory_id,
            ending=Ending.NO_CALL if unused else outcome.ending,
            detail=outcome.detail,
            seconds=outcome.seconds,
            steps=done.steps,
            told=told_reward(outcome.last_line),
        )

    async def _score(self, task: Task, ended: Ended) -> Scored:
        """Judge a run, and tell the edge."""
        before = await self._judge.known(ended.trajectory_id) if ended.run in self._resumed else []
        known = {score.source for score in before}
        problem = ""
        scores: list[Score] = []
        if ended.ending is Ending.FINISHED:
            scores, problem = await self._judge.scores(task, ended, but=known)
        elif ended.steps and self._plan.failed_reward is not None and FAILED not in known:
            scores = [Score(source=FAILED, value=self._plan.failed_reward)]
        try:
            for score in scores:
                await self._ask(lambda score=score: _tell(self._client, score, ended.trajectory_id))  # type: ignore[misc]
        except CallRefused as error:
            return Scored(run=ended.run, scores=before, problem=str(error))
        return Scored(run=ended.run, scores=before + scores, problem=problem)

    def _task_file(self, task: Task, told: bytes) -> Path:
        path = self._journal.folder / "tasks" / f"{task.key[:_KEY_CHARS]}.json"
        if not path.exists():
            publish_secret(path, told)
        return path

    async def _ask(self, call: Callable[[], T]) -> T:
        """A call of the edge, in a thread.

        Raises:
            EdgeAway: it does not answer, or stays busy, as one that stops does.
            CallRefused: it refuses.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except CallRefused as error:
            if error.status in (401, 503):
                raise EdgeAway(f"the edge at {self._client.url} takes no calls now: {error}") from error
            raise


def _tell(client: Client, score: Score, trajectory_id: str) -> None:
    target = {"step_id": score.step_id} if score.step_id else {"trajectory_id": trajectory_id}
    client.feedback(value=score.value, weight=score.weight, source=score.source, comment=score.comment, **target)


def _runs(tasks: Sequence[Task], n: int) -> Iterator[tuple[Task, int]]:
    """Task by task, so that groups come to their end one after another."""
    return ((task, index) for task in tasks for index in range(n))


def run_name(task: Task, index: int) -> str:
    """What a run is called in journal, log and environment."""
    return f"{task.key[:_KEY_CHARS]}-{index}"


def group_of(rollout_id: str, task: Task) -> str:
    """The group of a task's runs. It tells nothing of the task, and is another one in each rollout."""
    return hashlib.sha256(f"{rollout_id}\0{task.key}".encode()).hexdigest()[:32]


def log_of(journal: Journal, run: str) -> Path:
    """Where what a run's agent printed is kept."""
    return journal.folder / "logs" / f"{run}.log"


def _seed(seed: int | None, run: str) -> int | None:
    """A seed of its own for each run."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}\0{run}".encode()).digest()[:8]) % _SEEDS
