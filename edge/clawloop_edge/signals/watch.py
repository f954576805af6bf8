"""Follows the signals that the pool takes, and keeps the account of the rewards' health: `RewardHealth`, on disk."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clawloop_edge.signals.health import RewardHealth, Sums, report_of

if TYPE_CHECKING:
    from clawloop_edge.pool.store import Pool

STATE = "signals.health"
BITE = 500
"""signals of one look; the next look takes more"""


def kept_sums(pool: "Pool") -> Sums:
    """The account as it is on disk."""
    raw = pool.get_state(STATE)
    return msgspec.msgpack.decode(raw, type=Sums) if raw else Sums()


class HealthWatch(Collector):
    """The one that writes the account. `catch_up` runs in any one thread at a time; the rest only reads."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._health: RewardHealth | None = None

    def catch_up(self) -> int:
        """Count up to `BITE` signals that are new; how many there were."""
        health = self._health = self._health or RewardHealth(kept_sums(self._pool))
        with self._pool.reading() as reading:
            found = reading.signals_after(health.sums.after_seq, BITE)
            for seq, signal in found:
                judged = reading.judged(signal)
                if judged is not None:
                    health.add(
                        signal.source,
                        signal.value,
                        trajectory=judged.trajectory,
                        tokens=judged.response_tokens,
                        steps=judged.steps,
                    )
                health.sums.after_seq = seq
        if found:
            self._pool.set_state(STATE, msgspec.msgpack.encode(health.sums)).result()
        return len(found)

    def report(self) -> dict[str, object]:
        """The figures and warnings as JSON."""
        return report_of(self._sums)

    @property
    def _sums(self) -> Sums:
        return self._health.sums if self._health else Sums()

    def collect(self) -> Iterable[Metric]:
        """For `/metrics`."""
        said = CounterMetricFamily("clawloop_signals", "Judgements by who gave them.", labels=["source"])
        means = GaugeMetricFamily("clawloop_signal_recent_mean", "Mean value of late.", labels=["source"])
        drift = GaugeMetricFamily("clawloop_signal_drift", "Mean of late less that of before.", labels=["source"])
        pays = GaugeMetricFamily(
            "clawloop_signal_correlation", "Of the value with length or number of calls.", labels=["source", "with"]
        )
        agreed = GaugeMetricFamily("clawloop_signal_agreement", "Share of equal signs.", labels=["source", "other"])
        for name, source in list(self._sums.sources.items()):
            said.add_metric([name], source.count)
            means.add_metric([name], source.fast)
            drift.add_metric([name], source.drift)
            pays.add_metric([name, "length"], source.lengths.correlation)
            pays.add_metric([name, "calls"], source.calls.correlation)
        for pair, agreement in list(self._sums.pairs.items()):
            agreed.add_metric(pair.split(" "), agreement.share)
        return [said, means, drift, pays, agreed]
