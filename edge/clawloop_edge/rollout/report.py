"""What came of a rollout, in numbers. Pure functions of its tasks and its journal's events.

Passed: a run that finished and whose reward is at least `pass_at`. A run that failed did not pass, but is in no mean
reward: it has none, or one that was chosen for it. A run that nobody judged is in neither.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from clawloop_edge.rollout.journal import Ended, Ending, Scored
from clawloop_edge.rollout.runner import run_name
from clawloop_edge.rollout.tasks import BrokenLine, Task


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """One run. No reward: it failed, or nobody judged it; `problem` says why a score is missing."""

    run: str
    trajectory_id: str
    ending: str
    detail: str
    seconds: float
    steps: int
    reward: float | None
    passed: bool
    problem: str


class TaskLine(msgspec.Struct, frozen=True, kw_only=True):
    """One task: runs that are over, and of these those that failed, were judged and passed."""

    task: str
    line: int
    n: int
    failed: int
    judged: int
    passed: int
    mean_reward: float | None
    runs: list[RunLine]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout. `pass_at_k` is the mean over tasks with at least k runs that count; empty if none was judged."""

    rollout_id: str
    tasks: list[TaskLine]
    runs: int
    missing: int
    failed: int
    judged: int
    passed: int
    mean_reward: float | None
    pass_at: float
    pass_at_k: dict[int, float]
    failures: dict[str, int]
    problems: dict[str, int]
    broken_lines: list[BrokenLine]
    scored_by: list[str]


def pass_at_k(n: int, *, c: int, k: int) -> float:
    """The chance that one of k runs passes, without bias from n runs of which c passed: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} runs with {c} passed")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def make_report(
    rollout_id: str,
    tasks: Sequence[Task],
    *,
    n: int,
    ended: Mapping[str, Ended],
    scored: Mapping[str, Scored],
    pass_at: float,
    broken: Sequence[BrokenLine],
    scored_by: Sequence[str],
) -> Report:
    """The numbers of a rollout as far as it has come."""
    lines = [_task_line(task, n, ended=ended, scored=scored, pass_at=pass_at) for task in tasks]
    runs = [run for line in lines for run in line.runs]
    return Report(
        rollout_id=rollout_id,
        tasks=lines,
        runs=len(runs),
        missing=n * len(tasks) - len(runs),
        failed=sum(line.failed for line in lines),
        judged=sum(line.judged for line in lines),
        passed=sum(line.passed for line in lines),
        mean_reward=_mean([run.reward for run in runs if run.reward is not None and run.ending == Ending.FINISHED]),
        pass_at=pass_at,
        pass_at_k=_pass_at_ks(lines, n),
        failures=_counted([_reason(run) for run in runs if run.ending != Ending.FINISHED]),
        problems=_counted([run.problem for run in runs if run.problem]),
        broken_lines=list(broken),
        scored_by=list(scored_by),
    )


def reward_of_run(scored: Scored | None) -> float | None:
    """The weighted mean of what its scorers said; None if none said anything."""
    scores = scored.scores if scored else []
    total = sum(score.weight for score in scores)
    return sum(score.value * score.weight for score in scores) / total if total else None


def _task_line(
    task: Task, n: int, *, ended: Mapping[str, Ended], scored: Mapping[str, Scored], pass_at: float
) -> TaskLine:
    names = [run_name(task, index) for index in range(n)]
    runs = [_run_line(ended[name], scored.get(name), pass_at=pass_at) for name in names if name in ended]
    judged = [run.reward for run in runs if run.reward is not None and run.ending == Ending.FINISHED]
    return TaskLine(
        task=task.name,
        line=task.line,
        n=len(runs),
        failed=sum(run.ending != Ending.FINISHED for run in runs),
        judged=len(judged),
        passed=sum(run.passed for run in runs),
        mean_reward=_mean(judged),
        runs=runs,
    )


def _run_line(ended: Ended, scored: Scored | None, *, pass_at: float) -> RunLine:
    reward = reward_of_run(scored)
    return RunLine(
        run=ended.run,
        trajectory_id=ended.trajectory_id,
        ending=ended.ending.value,
        detail=ended.detail,
        seconds=round(ended.seconds, 3),
        steps=ended.steps,
        reward=reward,
        passed=ended.ending is Ending.FINISHED and reward is not None and reward >= pass_at,
        problem=scored.problem if scored else "",
    )


def _reason(run: RunLine) -> str:
    link = ": " if run.ending in (Ending.NOT_STARTED, Ending.REFUSED) else " "
    return link.join(filter(None, (run.ending, run.detail)))


def _pass_at_ks(lines: Sequence[TaskLine], n: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, 8 ... up to n, where there is a task that can tell."""
    if not any(line.judged for line in lines):
        return {}
    found = {}
    k = 1
    while k <= n:
        counts = [(line.judged + line.failed, line.passed) for line in lines]
        chances = [pass_at_k(runs, c=passed, k=k) for runs, passed in counts if runs >= k]
        if chances:
            found[k] = sum(chances) / len(chances)
        k *= 2
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counted(words: Sequence[str]) -> dict[str, int]:
    return dict(Counter(words).most_common())
