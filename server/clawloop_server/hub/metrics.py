"""`GET /metrics` of the admin API: the server's status as Prometheus reads it.

Counts, times and means alone: no id, no name, no content. Every number of the latest update and of the latest round is
there under its own name as a label, so that a new one needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clawloop_server.hub.status import ServerStatus
from clawloop_server.hub.training import Numbers, TrainerEar

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def metrics_page(status: ServerStatus, trainer: TrainerEar) -> bytes:
    """The page for this status and what was heard of the trainer."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(status, trainer))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, status: ServerStatus, trainer: TrainerEar) -> None:
        self._status, self._trainer = status, trainer

    def collect(self) -> Iterable[Metric]:
        yield from _server(self._status)
        yield from _rounds(self._status)
        yield from _adapter(self._status)
        yield _by("clawloop_last_update", "What the latest update measured.", "metric", _finite(self._trainer.update))
        yield _by("clawloop_last_round", "What the latest round came to.", "metric", _finite(self._trainer.round))


def _server(status: ServerStatus) -> Iterable[Metric]:
    devices = status.devices
    names = ("joined", "online", "revoked", "waiting", "left", "doubled")
    counts = {name: getattr(devices, name) for name in names}
    yield _by("clawloop_devices", "Devices by how they are.", "state", counts)
    yield _by("clawloop_part_up", "1 while a child process runs.", "part", {p.name: bool(p.pid) for p in status.parts})
    restarts = CounterMetricFamily("clawloop_part_restarts", "Since the start.", labels=["part"])
    for part in status.parts:
        restarts.add_metric([part.name], part.restarts)
    yield restarts


def _rounds(status: ServerStatus) -> Iterable[Metric]:
    rounds, training = status.rounds, status.training
    ended = {"passed": rounds.passed, "refused": rounds.refused, "failed": rounds.failed}
    counts = CounterMetricFamily("clawloop_rounds", "Rounds by what came of them.", labels=["state"])
    for state, number in ended.items():
        counts.add_metric([state], number)
    yield counts
    ready, needed = status.ready_trajectories, status.round_trajectories
    yield _gauge("clawloop_trajectories_ready", "Rewarded trajectories that the next round can take.", ready)
    yield _gauge("clawloop_trajectories_missing", "How many more it waits for.", max(0, needed - ready))
    yield _by("clawloop_deltas", "What devices learned at home, by what became of it.", "state", status.deltas.states)
    yield _gauge(
        "clawloop_deltas_needed", "How many that wait make a round without trajectories.", status.deltas.needed
    )
    yield _gauge("clawloop_round_running", "1 while a round runs.", training is not None)
    yield _gauge("clawloop_round_updates", "Of the round under way.", training.updates if training else 0)
    yield _gauge("clawloop_round_updates_made", "Of these, how many are made.", training.done if training else 0)
    left_s = training.left_s if training else None
    if left_s is not None:
        yield _gauge("clawloop_round_left_seconds", "How long its updates will take yet.", left_s)


def _adapter(status: ServerStatus) -> Iterable[Metric]:
    adapter = status.adapter
    yield _gauge(
        "clawloop_adapter_version", "The one that devices should use; 0: none.", adapter.version if adapter else 0
    )
    yield _gauge("clawloop_adapters_waiting", "Newer ones that are not released.", status.waiting_adapters)
    if adapter is not None:
        yield _gauge("clawloop_adapter_in_use", "Devices that use it.", adapter.in_use)
        yield _gauge("clawloop_adapter_released_seconds", "When it was released.", adapter.released_ms / 1000)
        scores = {"before": adapter.reward_before, "after": adapter.reward}
        yield _by("clawloop_adapter_evaluated", "Mean reward on the gate's tasks.", "adapter", scores)


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=value)


def _finite(numbers: Numbers) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None}


def _by(name: str, help_text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
