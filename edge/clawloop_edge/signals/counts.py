"""What the scorers did since the start, for `/v1/status` and `/metrics`. Numbers alone, by source and failure."""

import logging
import time
from collections import Counter
from collections.abc import Iterable

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_log = logging.getLogger(__name__)
_LOG_EVERY_S = 60.0


class ScorerCounts(msgspec.Struct, kw_only=True):
    """Of one scorer: cases judged, signals made, failures by reason, cases given up, and cases that wait.

    `problem` is what was wrong with its last case; empty: nothing.
    """

    judged: int = 0
    made: int = 0
    failed: Counter[str] = msgspec.field(default_factory=Counter)
    given_up: int = 0
    waiting: int = 0
    problem: str = ""
    logged_at: float = -_LOG_EVERY_S

    def failure(self, scorer: str, reason: str, *, problem: str) -> None:
        """Count one, and log it, once a minute at most."""
        self.failed[reason] += 1
        self.problem = problem
        if problem and time.monotonic() - self.logged_at >= _LOG_EVERY_S:
            self.logged_at = time.monotonic()
            _log.warning("scorer %s, %d failures so far: %s", scorer, self.failed.total(), problem)


class Counts(Collector):
    """Of all scorers."""

    def __init__(self, scorers: Iterable[str]) -> None:
        self._of = {name: ScorerCounts() for name in scorers}

    def __getitem__(self, scorer: str) -> ScorerCounts:
        return self._of[scorer]

    def wait(self, cases: dict[str, int]) -> None:
        """Note how many cases wait for each."""
        for name, counts in self._of.items():
            counts.waiting = cases.get(name, 0)

    def status(self) -> dict[str, dict[str, object]]:
        """By scorer, for `/v1/status`."""
        return {
            name: {
                "judged": counts.judged,
                "made": counts.made,
                "failed": dict(counts.failed),
                "given_up": counts.given_up,
                "waiting": counts.waiting,
                "problem": counts.problem,
            }
            for name, counts in self._of.items()
        }

    def collect(self) -> Iterable[Metric]:
        """For `/metrics`."""
        judged = CounterMetricFamily("clawloop_cases_judged", "Cases that a scorer judged.", labels=["source"])
        made = CounterMetricFamily("clawloop_signals_made", "Signals that came of it.", labels=["source"])
        failed = CounterMetricFamily("clawloop_cases_failed", "Tries without one.", labels=["source", "reason"])
        given_up = CounterMetricFamily("clawloop_cases_given_up", "Cases asked for in vain.", labels=["source"])
        waiting = GaugeMetricFamily("clawloop_cases_waiting", "Cases that wait for a scorer.", labels=["source"])
        for name, counts in self._of.items():
            judged.add_metric([name], counts.judged)
            made.add_metric([name], counts.made)
            given_up.add_metric([name], counts.given_up)
            waiting.add_metric([name], counts.waiting)
            for reason, count in dict(counts.failed).items():
                failed.add_metric([name, reason], count)
        yield from (judged, made, failed, given_up, waiting)
