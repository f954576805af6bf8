"""`rollout`: black-box offline mode. Runs a program many times a task through the edge that runs, and says how well."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clawloop_edge.cli.context import (
    Json,
    command,
    console,
    count,
    home_of,
    opened_pool,
    print_json,
    print_table,
    problems,
    shown,
)
from clawloop_edge.cli.service import ask
from clawloop_shared.errors import ClawloopError, ConfigError

if TYPE_CHECKING:
    from clawloop_edge.client import Client
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.rollout.journal import Ended, Journal, Scored, Settings
    from clawloop_edge.rollout.judging import Judge
    from clawloop_edge.rollout.report import Report
    from clawloop_edge.rollout.runner import Plan
    from clawloop_edge.rollout.tasks import Task

_INTERRUPTED = 130
_TABLE_ROWS = 50

Agent = Annotated[str, typer.Option("--agent", help="The program, as typed: it is told its model by OPENAI_BASE_URL.")]
Tasks = Annotated[Path, typer.Option("--tasks", help="A JSON object a line: prompt or messages, answer, metadata.")]
Runs = Annotated[int, typer.Option("--n", min=1, max=10_000, help="Runs of each task; they are one group.")]
Parallel = Annotated[int, typer.Option("--parallel", min=1, max=1024, help="Agents that run at the same time.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that a run may take.")]
Memory = Annotated[int, typer.Option("--memory", min=0, help="Address space of an agent in MiB; 0: no limit.")]
Channel = Annotated[
    Literal["train", "val"], typer.Option("--channel", help="train, or val: evaluates only, is never learned from.")
]
Scorers = Annotated[
    list[str] | None,
    typer.Option("--scorer", help="exact, regex, module:function, stdout, or another scorer by name; may be repeated."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for journal, logs and report.json; by default a new one.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the rollout in --out.")]
PassAt = Annotated[float, typer.Option("--pass-at", min=-1, max=1, help="A run passed if its reward is at least this.")]
FailedReward = Annotated[
    float | None, typer.Option("--failed-reward", min=-1, max=1, help="Reward of runs that failed; by default none.")
]
Shell = Annotated[bool, typer.Option("--shell", help="Have /bin/sh read --agent.")]
Env = Annotated[list[str] | None, typer.Option("--env", help="A variable of yours that agents may see; repeatable.")]
TellAnswer = Annotated[bool, typer.Option("--tell-answer", help="Tell agents the task's answer too.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Gives each run a CLAWLOOP_SEED of its own.")]


def rollout(
    context: typer.Context,
    agent: Agent,
    tasks: Tasks,
    n: Runs = 8,
    parallel: Parallel = 16,
    timeout: Timeout = 600.0,
    memory: Memory = 0,
    channel: Channel = "train",
    scorer: Scorers = None,
    pass_at: PassAt = 1.0,
    failed_reward: FailedReward = None,
    out: Out = None,
    resume: Resume = False,
    shell: Shell = False,
    env: Env = None,
    tell_answer: TellAnswer = False,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run a program N times for each task: a trajectory a run, a group a task, scored, completed, and a report.

    The program is any that takes OpenAI's base URL from its environment. The task is on its stdin and in CLAWLOOP_TASK,
    without its answer. A run that fails gets no reward. Ctrl-C stops; --resume does what is missing.
    """
    from clawloop_edge.rollout.agent import Limits
    from clawloop_edge.rollout.environment import base_environment
    from clawloop_edge.rollout.journal import Settings
    from clawloop_edge.rollout.judging import hidden_fields
    from clawloop_edge.rollout.runner import Plan

    if resume and out is None:
        raise typer.BadParameter("--resume needs the --out of the rollout to go on with")
    settings = Settings(
        agent=agent,
        n=n,
        channel=channel,
        scorers=sorted(scorer or []),
        shell=shell,
        tell_answer=tell_answer,
        failed_reward=failed_reward,
        seed=seed,
    )
    plan = Plan(
        command=_command(agent, shell=shell),
        n=n,
        parallel=parallel,
        channel=channel,
        environment=base_environment(env or []),
        limits=Limits(timeout_s=timeout, memory_bytes=memory << 20),
        hidden=() if tell_answer else hidden_fields(home_of(context).require().load_config().signals),
        failed_reward=failed_reward,
        seed=seed,
    )
    folder = (out or Path(datetime.now().strftime("rollout-%Y%m%d-%H%M%S"))).absolute()
    report = _rollout(context, plan, settings=settings, tasks_file=tasks, folder=folder, resume=resume, pass_at=pass_at)
    print_json(report) if as_json else _print(report, folder)
    _complain(report, folder)


def _rollout(
    context: typer.Context,
    plan: Plan,
    *,
    settings: Settings,
    tasks_file: Path,
    folder: Path,
    resume: bool,
    pass_at: float,
) -> Report:
    """Do what is missing, and publish the report."""
    from clawloop_edge.client import Client
    from clawloop_edge.rollout.journal import Journal, Opened
    from clawloop_edge.rollout.judging import open_judge
    from clawloop_edge.rollout.report import make_report
    from clawloop_edge.rollout.tasks import read_tasks
    from clawloop_shared.files import private_folder, publish_secret
    from clawloop_shared.ids import new_id

    home = home_of(context).require()
    if not ask(home)["running"]:
        raise ConfigError(f"the edge does not run; start it with: {command(home, 'serve')}")
    found, broken = read_tasks(tasks_file)
    for line in broken:
        problems.print(shown(f"{tasks_file}, line {line.line} is left out: {line.reason}"), soft_wrap=True)
    with (
        Client(home=home.folder) as client,
        _pool(context, settings.scorers, resume=resume) as pool,
    ):
        judge = open_judge(settings.scorers, home.load_config().signals, home=home.folder, pool=pool)
        asyncio.run(_check(plan, judge))
        opened = Opened(rollout_id=new_id(), settings=settings)
        with Journal.open(private_folder(folder), opened, resume=resume) as journal:
            try:
                with Screen(plan.n * len(found), journal, pass_at=pass_at) as screen:
                    _play(plan, found, client=client, journal=journal, judge=judge, screen=screen)
            except (ClawloopError, KeyboardInterrupt) as error:
                again = f"to go on: the same command with --out {shlex.quote(str(folder))} --resume"
                problems.print(shown(again), soft_wrap=True)
                if isinstance(error, KeyboardInterrupt):
                    raise typer.Exit(_INTERRUPTED) from None
                raise
            report = make_report(
                journal.opened.rollout_id,
                found,
                n=plan.n,
                ended=journal.ended,
                scored=journal.scored,
                pass_at=pass_at,
                broken=broken,
                scored_by=judge.names,
            )
    publish_secret(folder / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


@contextmanager
def _pool(context: typer.Context, scorers: list[str], *, resume: bool) -> Iterator[Pool | None]:
    """The pool beside the edge that runs, where something of it is read."""
    from clawloop_edge.rollout.judging import needs_pool

    if not needs_pool(scorers) and not resume:
        yield None
        return
    with opened_pool(context) as pool:
        yield pool


async def _check(plan: Plan, judge: Judge) -> None:
    """Return if the machine and the scorers can do it. Raises ClawloopError: they cannot, and nothing was begun."""
    from clawloop_edge.rollout.agent import allow_files, check_memory_limit

    allow_files(plan.parallel)
    await check_memory_limit(plan.limits.memory_bytes)
    await judge.check()


def _play(plan: Plan, tasks: list[Task], *, client: Client, journal: Journal, judge: Judge, screen: Screen) -> None:
    """Play until all is done, or Ctrl-C: then the agents are ended. Raises KeyboardInterrupt."""
    from clawloop_edge.rollout.runner import Rollout

    async def play() -> None:
        me = asyncio.current_task()
        assert me is not None  # it is run by asyncio.run
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, _once(me.cancel))
        try:
            await Rollout(plan, client, journal=journal, judge=judge, watch=screen).run(tasks)
        finally:
            await judge.close()

    try:
        asyncio.run(play())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error


def _once(call: Callable[[], object]) -> Callable[[], None]:
    """`call` the first time only: a second Ctrl-C must not cut off the end of the agents, which takes seconds."""
    left = [call]

    def first() -> None:
        if left:
            left.pop()()

    return first


class Screen:
    """What happens, on stderr."""

    def __init__(self, runs: int, journal: Journal, *, pass_at: float) -> None:
        self._pass_at, self._running, self._passed, self._failed = pass_at, 0, 0, 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=problems, transient=True)
        self._task = self._progress.add_task("", total=runs)
        for ended in journal.ended.values():
            self._failed += ended.ending != "finished"
        for scored in journal.scored.values():
            self._count(scored)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def started(self) -> None:
        """An agent was started."""
        self._running += 1
        self._say()

    def ended(self, ended: Ended) -> None:
        """It is gone."""
        self._running -= 1
        self._failed += ended.ending != "finished"
        self._say()

    def done(self, scored: Scored) -> None:
        """A run was judged."""
        self._count(scored)
        self._say()

    def _count(self, scored: Scored) -> None:
        from clawloop_edge.rollout.report import reward_of_run

        reward = reward_of_run(scored)
        self._passed += reward is not None and reward >= self._pass_at
        self._progress.advance(self._task)

    def _say(self) -> None:
        words = f"{self._running} running, {self._passed} passed, {self._failed} failed"
        self._progress.update(self._task, description=words)


def _print(report: Report, folder: Path) -> None:
    rows = [
        (line.task, line.n, line.failed, line.judged, line.passed, _number(line.mean_reward))
        for line in report.tasks[:_TABLE_ROWS]
    ]
    print_table(("task", "runs", "failed", "judged", "passed", "mean reward"), rows, empty="nothing was run")
    if len(report.tasks) > _TABLE_ROWS:
        console.print(f"... and {len(report.tasks) - _TABLE_ROWS} more tasks; report.json has all")
    facts = [
        ("runs", f"{report.runs}, {report.failed} failed, {report.judged} judged, {report.passed} passed"),
        ("mean reward", f"{_number(report.mean_reward)} (of {count(report.judged, 'judged run')})"),
        *((f"pass@{k}", f"{chance:.3f}") for k, chance in report.pass_at_k.items()),
        *((f"failed: {reason}", number) for reason, number in report.failures.items()),
        *((f"not judged: {reason}", number) for reason, number in report.problems.items()),
    ]
    print_table(("what", "is"), facts, empty="")
    if report.scored_by:
        console.print(
            f"passed: finished, with a reward of at least {report.pass_at:g} by {', '.join(report.scored_by)}"
        )
    else:
        console.print("no --scorer was named: this edge's own scorers judge the runs later, not in this report")
    console.print(shown(f"report, journal and logs: {folder}"), soft_wrap=True)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _complain(report: Report, folder: Path) -> None:
    """Leave with an error if not every line was a task, or if no run came to its end.

    Raises:
        ConfigError: so it is.
    """
    if report.broken_lines:
        lines = count(len(report.broken_lines), "line")
        raise ConfigError(f"{lines} of the tasks left out; mend what is broken, and go on with --out and --resume")
    if report.runs and report.failed == report.runs:
        reason = next(iter(report.failures))
        raise ConfigError(f"every run failed, most by: {reason}; what the agents printed is in {folder / 'logs'}")


def _command(agent: str, *, shell: bool) -> list[str]:
    """What is started. Raises ConfigError: no words can be made of it."""
    if shell:
        return ["/bin/sh", "-c", agent]
    try:
        words = shlex.split(agent)
    except ValueError as error:
        raise ConfigError(f"--agent cannot be read ({error}); mind its quotes, or give --shell") from error
    if not words:
        raise ConfigError("--agent is empty; give a program, like 'python agent.py'")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--agent: no program {words[0]} can be started from here; mend its name, or give --shell")
    return words


def register(app: typer.Typer) -> None:
    app.command()(rollout)
