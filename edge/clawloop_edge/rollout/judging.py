"""What the runs of a rollout were worth: the scorers that were named, asked for each trajectory that ended.

A scorer that fails gives no score, and its run stays without one: that is never a reward of 0.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.errors import ScorerFailed
from clawloop_edge.rollout.journal import Ended, Score
from clawloop_edge.rollout.tasks import ANSWERS, Task
from clawloop_edge.signals.limits import ScorerLimits
from clawloop_edge.signals.protocol import Case, Moment, Scorer, Verdict
from clawloop_edge.signals.registry import SCORERS, Deps
from clawloop_edge.signals.rule import RuleScorer
from clawloop_edge.signals.rule_child import Match
from clawloop_shared.errors import ConfigError
from clawloop_shared.records import Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clawloop_edge.pool.records import KeptStep
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.signals.settings import SignalsSettings
    from clawloop_shared.records import Signal

STDOUT = "stdout"
"""an agent's own word, on the last line that it prints"""
FAILED = "rollout"
"""what was chosen as the reward of runs that failed"""
_RULE = "rule"
_MAX_COMMENT_CHARS = 4096
_NO_CASE = Match(b'""', b'""', ignore_case=False)
"""a question to a rule's process that has it import the rule, and does not call it"""


class Asked:
    """A scorer with its limits."""

    def __init__(self, scorer: Scorer, limits: ScorerLimits) -> None:
        self.scorer, self._limits = scorer, limits
        self._room = asyncio.Semaphore(limits.at_once)

    async def score(self, case: Case) -> list[Verdict]:
        """Its verdicts.

        Raises:
            ScorerFailed: it could not judge, or not in time.
        """
        async with self._room:
            try:
                async with asyncio.timeout(self._limits.timeout_s):
                    return await self.scorer.score(case)
            except TimeoutError as error:
                raise ScorerFailed(f"{self.scorer.name}: no verdict within {self._limits.timeout_s:g} s") from error


class Judge:
    """The scorers of a rollout. Without any, the edge's own judge what was completed, later."""

    def __init__(self, scorers: Iterable[Asked], pool: Pool | None, *, stdout: bool) -> None:
        self._scorers, self._pool, self._stdout = list(scorers), pool, stdout

    @property
    def names(self) -> list[str]:
        """The sources of its scores."""
        return [asked.scorer.name for asked in self._scorers] + ([STDOUT] if self._stdout else [])

    async def check(self) -> None:
        """Return if the rules can be imported.

        Raises:
            ScorerFailed: one cannot; the scorers are closed.
        """
        for asked in self._scorers:
            if isinstance(asked.scorer, RuleScorer):
                try:
                    await asked.scorer.child.ask(_NO_CASE)
                except ScorerFailed:
                    await self.close()
                    raise

    async def scores(self, task: Task, ended: Ended, *, but: Iterable[str] = ()) -> tuple[list[Score], str]:
        """The scores of a run that finished, and why some are missing if they are. `but` are sources to leave out."""
        found: list[Score] = []
        problems: list[str] = []
        left_out = set(but)
        if self._stdout and STDOUT not in left_out:
            if ended.told is None:
                problems.append('the last line on stdout was no {"reward": number from -1 to 1}')
            else:
                found.append(Score(source=STDOUT, value=ended.told))
        wanted = [asked for asked in self._scorers if asked.scorer.name not in left_out]
        case = await self._case(task, ended.trajectory_id) if wanted else None
        if wanted and case is None:
            problems.append("no step of it is of its main line (`sessions show` tells what each is)")
        elif case is not None:
            for asked in wanted:
                try:
                    verdicts = await asked.score(case)
                except ScorerFailed as error:
                    problems.append(str(error))
                    continue
                found += [_score(asked.scorer.name, verdict) for verdict in verdicts if verdict.weight > 0]
        return found, "; ".join(problems)

    async def known(self, trajectory_id: str) -> list[Score]:
        """What the edge was told of a trajectory already, by sources of a rollout."""
        if self._pool is None:
            return []
        found = await asyncio.to_thread(_signals, self._pool, trajectory_id)
        return [_score_of(signal) for signal in found if signal.source in (*self.names, FAILED)]

    async def close(self) -> None:
        """End what the scorers have open."""
        for asked in self._scorers:
            await asked.scorer.close()

    async def _case(self, task: Task, trajectory_id: str) -> Case | None:
        assert self._pool is not None  # whoever names a scorer that reads opens it
        steps = await asyncio.to_thread(_main_steps, self._pool, trajectory_id)
        if not steps:
            return None
        return Case(
            moment=Moment.ENDED,
            target=Target.TRAJECTORY,
            target_id=trajectory_id,
            steps=steps,
            metadata=task.fields,
        )


def hidden_fields(settings: SignalsSettings) -> frozenset[str]:
    """The fields of a task that say what is right: those that scorers read by default, and by these settings."""
    read = {key.partition(".")[0] for key in (*settings.exact.keys, *settings.regex.keys)}
    return frozenset({*ANSWERS, *read})


def open_judge(names: Iterable[str], settings: SignalsSettings, *, home: Path, pool: Pool | None) -> Judge:
    """The scorers with these names: one of `[signals]`, `module:function` for a rule, or `stdout`.

    Raises:
        ConfigError: there is no such scorer, or it does not judge what has ended, or two would be one source.
    """
    wanted = list(dict.fromkeys(names))
    asked = [_open(name, settings, home) for name in wanted if name != STDOUT]
    sources = [each.scorer.name for each in asked]
    for source in sources:
        if sources.count(source) > 1:
            raise ConfigError(f"two scorers are one source, {source}: the later would replace the earlier; name one")
    return Judge(asked, pool, stdout=STDOUT in wanted)


def needs_pool(names: Iterable[str]) -> bool:
    """Whether these scorers read what was kept."""
    return any(name != STDOUT for name in names)


def _open(name: str, settings: SignalsSettings, home: Path) -> Asked:
    kind = _RULE if ":" in name else name
    if kind not in SCORERS:
        known = ", ".join([*SCORERS, STDOUT])
        raise ConfigError(f"no scorer {name}; it is module:function, or one of {known}")
    if ":" in name:
        rule = msgspec.structs.replace(settings.rule, function=name, path=str(Path.cwd()))
        settings = msgspec.structs.replace(settings, rule=rule)
    scorer = SCORERS[kind](Deps(settings=settings, engine=None, folder=home))
    if Moment.ENDED not in scorer.moments:
        raise ConfigError(f"the scorer {name} judges nothing that has ended; name another")
    return Asked(scorer, settings.of(kind))


def told_reward(line: bytes) -> float | None:
    """The reward in an agent's last line; None if there is none from -1 to 1."""
    try:
        said = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    value = said.get("reward") if isinstance(said, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1:
        return None
    return float(value)


def _score(source: str, verdict: Verdict) -> Score:
    return Score(
        source=source,
        value=verdict.value,
        weight=verdict.weight,
        comment=(verdict.comment or verdict.evidence)[:_MAX_COMMENT_CHARS],
        step_id=verdict.target_id if verdict.target is Target.STEP else "",
    )


def _main_steps(pool: Pool, trajectory_id: str) -> list[KeptStep]:
    return [kept for kept in pool.session_steps(trajectory_id) if kept.kind == "main"]


def _signals(pool: Pool, trajectory_id: str) -> list[Signal]:
    with pool.reading() as reading:
        return reading.session_signals(trajectory_id)


def _score_of(signal: Signal) -> Score:
    return Score(
        source=signal.source,
        value=signal.value,
        weight=signal.weight,
        comment=signal.comment,
        step_id=signal.target_id if signal.target is Target.STEP else "",
    )
