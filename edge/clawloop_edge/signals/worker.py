"""Asks the scorers, in the background: what is new in the pool becomes cases, cases become signals.

Every scorer has a loop of its own, so that one which hangs holds up nobody else. What waits lies on disk (`docket`): a
case is done with once its signals are kept, or no judgement came of it however often it was asked for. The pool is read
in one thread of this worker's own, and while calls are answered it rests three times as long as it worked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import msgspec

from clawloop_edge.errors import NotScorable, ScorerFailed, UnknownTarget
from clawloop_edge.signals import cases
from clawloop_edge.signals.counts import Counts, ScorerCounts
from clawloop_edge.signals.docket import Docket, Taken, Waiting
from clawloop_edge.signals.limits import Budget
from clawloop_edge.signals.making import settings_digest, signals_of
from clawloop_shared.errors import ClawloopError, RecordError

if TYPE_CHECKING:
    from clawloop_edge.pool.reading import Reading
    from clawloop_edge.pool.records import StepLink
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.signals.protocol import Case, Scorer
    from clawloop_edge.signals.settings import SignalsSettings
    from clawloop_shared.records import Signal

_log = logging.getLogger(__name__)
T = TypeVar("T")
TICK_S = 0.5
"""how often it is looked for what is new"""
BITE = 50
"""steps that are looked at in one snapshot"""
ROUND = 32
"""cases of one scorer that are in memory at once, and their tokens together but for the first"""
ROUND_TOKENS = 1_000_000
GRACE_MS = 60_000
"""how long the end of a completed trajectory waits for steps that were begun and are not on disk"""
RETRY_FACTOR, RETRY_MOST_S = 3, 3_600.0
STOP_S = 5.0
_REST = 3.0
_REST_MOST_S = 1.0


class Outcome(msgspec.Struct, frozen=True):
    """What came of asking once: signals; or why there are none, and whether to ask again."""

    row: Waiting
    signals: list[Signal] = []
    failure: str = ""
    problem: str = ""
    again: bool = False


class SignalWorker:
    """Runs the scorers of one pool. `start` and `stop` on the event loop."""

    def __init__(
        self,
        pool: Pool,
        settings: SignalsSettings,
        *,
        scorers: Sequence[Scorer],
        metadata_of: cases.ReadMetadata,
        completed: Callable[[Pool, Sequence[str]], dict[str, bool]],
        clock_ms: Callable[[], int],
        busy: Callable[[], int] = lambda: 0,
    ) -> None:
        """`completed` are those of some trajectories that are over, and whether all of their steps are on disk; `busy`
        is how many calls are being answered."""
        self._pool, self._settings, self._clock_ms, self._busy = pool, settings, clock_ms, busy
        self._scorers, self._metadata_of, self._completed = list(scorers), metadata_of, completed
        self._wanted = [(scorer.name, scorer.moments) for scorer in scorers]
        self._docket = Docket(pool)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="signals")
        self._wake = {scorer.name: asyncio.Event() for scorer in scorers}
        self._budgets = {name: Budget(settings.of(name).per_hour) for name, _ in self._wanted}
        self._tasks: list[asyncio.Task[None]] = []
        self._cursor = 0
        self.counts = Counts(scorer.name for scorer in scorers)

    async def start(self) -> None:
        """Go on where the last one stopped."""
        if not self._scorers:
            return
        self._cursor = await self._in_thread(lambda: self._docket.begin([name for name, _ in self._wanted]))
        loops = [self._take_in, *(lambda scorer=scorer: self._judge(scorer) for scorer in self._scorers)]
        self._tasks = [asyncio.create_task(self._forever(loop)) for loop in loops]

    async def stop(self) -> None:
        """End at once: what is not judged waits for the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        closing = [asyncio.create_task(scorer.close()) for scorer in self._scorers]
        if closing:
            done, late = await asyncio.wait(closing, timeout=STOP_S)
            for task in late:
                task.cancel()
            for task in done:
                if error := task.exception():
                    _log.error("a scorer did not close: %s", type(error).__name__)
        await asyncio.to_thread(self._thread.shutdown)

    async def _forever(self, turn: Callable[[], object]) -> None:
        while True:
            try:
                await turn()  # type: ignore[misc]
            except ClawloopError as error:
                _log.warning("signals: %s; trying again", error)
                await asyncio.sleep(TICK_S)
            except Exception as error:  # noqa: BLE001 - a loop that ends would leave all that follows unjudged
                _log.error("signals: %s; trying again", type(error).__name__)
                await asyncio.sleep(10 * TICK_S)

    # From steps to cases.

    async def _take_in(self) -> None:
        began = time.monotonic()
        more = await self._in_thread(self._take)
        if more:
            for event in self._wake.values():
                event.set()
        await self._rest(began)
        if more < BITE:
            await asyncio.sleep(TICK_S)

    def _take(self) -> int:
        """A bite of new steps, and what became of trajectories; how many steps."""
        now_ms = self._clock_ms()
        with self._pool.reading() as reading:
            links = reading.links(self._cursor, BITE)
            found = [taken for link in links if (taken := self._taken(reading, link, now_ms=now_ms)) is not None]
        if links:
            self._docket.add(found, seq=links[-1].seq, wanted=self._wanted)
            self._cursor = links[-1].seq
        self._hasten_ends(now_ms)
        self.counts.wait(self._docket.counts())
        return len(links)

    def _taken(self, reading: Reading, link: StepLink, *, now_ms: int) -> Taken | None:
        try:
            ended_ms = now_ms + int(self._settings.idle_s * 1000)
            return cases.take(reading, link, ended_ms=ended_ms, untrainable=self._settings.untrainable)
        except Exception as error:  # noqa: BLE001 - one step that cannot be read must not hold up all after it
            _log.error("step %s makes no case: %s", link.step_id, type(error).__name__)
            return None

    def _hasten_ends(self, now_ms: int) -> None:
        waiting = self._docket.open_trajectories(now_ms=now_ms)
        if not waiting:
            return
        over = self._completed(self._pool, list(waiting))
        due = {name: now_ms if whole else now_ms + GRACE_MS for name, whole in over.items()}
        sooner = {name: at for name, at in due.items() if at == now_ms or at < waiting[name] - GRACE_MS}
        if sooner:
            self._docket.hasten(sooner)

    # From cases to signals.

    async def _judge(self, scorer: Scorer) -> None:
        """One round: what is due, as far as it fits into memory."""
        began = time.monotonic()
        loaded = await self._in_thread(lambda: self._load(scorer.name))
        if not loaded:
            with suppress(TimeoutError):
                # Python 3.11's wait_for loses a cancellation that comes with what it waits for: `stop` waited for ever.
                async with asyncio.timeout(TICK_S):
                    await self._wake[scorer.name].wait()
            self._wake[scorer.name].clear()
            return
        await self._rest(began)
        places = asyncio.Semaphore(self._settings.of(scorer.name).at_once)
        asked = {asyncio.create_task(self._ask(scorer, row, case, places=places)) for row, case in loaded}
        try:
            while asked:
                done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                await self._settle(scorer, [task.result() for task in done])
        finally:
            for task in asked:
                task.cancel()

    def _load(self, name: str) -> list[tuple[Waiting, Case | None]]:
        rows = self._docket.due(name, now_ms=self._clock_ms(), limit=ROUND)
        loaded: list[tuple[Waiting, Case | None]] = []
        tokens = 0
        if not rows:
            return loaded
        with self._pool.reading() as reading:
            for row in rows:
                case = self._built(reading, row)
                loaded.append((row, case))
                tokens += sum(len(kept.step.prompt_ids) for kept in case.steps) if case else 0
                if tokens > ROUND_TOKENS:
                    break
        return loaded

    def _built(self, reading: Reading, row: Waiting) -> Case | None:
        try:
            return cases.build(reading, row, metadata_of=self._metadata_of)
        except Exception as error:  # noqa: BLE001 - one case that cannot be read must not hold up all after it
            _log.error("what is known of step %s makes no case: %s", row.step_id, type(error).__name__)
            return None

    async def _ask(self, scorer: Scorer, row: Waiting, case: Case | None, *, places: asyncio.Semaphore) -> Outcome:
        if case is None:
            return Outcome(row, failure="gone")
        limits = self._settings.of(scorer.name)
        async with places:
            await self._budgets[scorer.name].spend()
            try:
                async with asyncio.timeout(limits.timeout_s):
                    verdicts = await scorer.score(case)
                digest = settings_digest(self._settings.of(scorer.name))
                return Outcome(row, signals_of(scorer.name, case, verdicts, digest=digest, now_ms=self._clock_ms()))
            except TimeoutError:
                problem = f"{scorer.name} gave no answer within {limits.timeout_s:g} s"
                return Outcome(row, failure="timeout", problem=problem, again=True)
            except NotScorable as error:
                return Outcome(row, failure="not scorable", problem=str(error))
            except RecordError as error:
                return Outcome(row, failure="invalid verdict", problem=str(error))
            except ScorerFailed as error:
                return Outcome(row, failure="failed", problem=str(error), again=True)
            except Exception as error:  # noqa: BLE001 - a scorer's own fault must not end the others' work
                kind = type(error).__name__
                return Outcome(row, failure=kind, problem=f"{scorer.name} broke off with {kind}", again=True)

    async def _settle(self, scorer: Scorer, outcomes: Sequence[Outcome]) -> None:
        """Keep the signals, then let go of the rows: after a crash between the two the same signals are made again."""
        counts = self.counts[scorer.name]
        await self._keep([signal for outcome in outcomes for signal in outcome.signals], counts)
        again = [each for each in outcomes if each.again and each.row.tries + 1 < self._settings.tries]
        put_off = [(each.row, self._clock_ms() + self._delay_ms(each.row.tries)) for each in again]
        done = [each.row for each in outcomes if each not in again]
        await self._in_thread(lambda: self._docket.settle(done, again=put_off))
        counts.given_up += sum(each.failure not in ("", "gone") for each in outcomes) - len(again)
        for outcome in outcomes:
            self._count(scorer.name, outcome)

    async def _keep(self, signals: Sequence[Signal], counts: ScorerCounts) -> None:
        kept = [asyncio.wrap_future(self._pool.keep_signal(signal)) for signal in signals]
        for result in await asyncio.gather(*kept, return_exceptions=True):
            if isinstance(result, UnknownTarget):
                counts.failed["gone"] += 1
            elif isinstance(result, BaseException):
                raise result
            else:
                counts.made += 1

    def _count(self, name: str, outcome: Outcome) -> None:
        counts = self.counts[name]
        if outcome.failure:
            counts.failure(name, outcome.failure, problem=outcome.problem)
        else:
            counts.judged, counts.problem = counts.judged + 1, ""

    def _delay_ms(self, tries: int) -> int:
        return int(1000 * min(RETRY_MOST_S, self._settings.retry_after_s * RETRY_FACTOR**tries))

    async def _rest(self, began: float) -> None:
        """While calls are answered, leave them most of the time."""
        if self._busy():
            await asyncio.sleep(min(_REST_MOST_S, _REST * (time.monotonic() - began)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
