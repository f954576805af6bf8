"""What `/metrics` tells Prometheus: how fast calls are answered, what is in flight, and which versions live.

Counts and times alone: no names of sessions, no content. What changes on its own is read when it is asked for.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clawloop_edge.engine.protocol import Engine, TextEngine
from clawloop_edge.gateway.call import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500)


class GatewayCounts(Protocol):
    """The counts of `app.GatewayStats` that are shown."""

    @property
    def kept(self) -> int: ...
    @property
    def keep_failures(self) -> int: ...
    @property
    def kept_late(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def spliced(self) -> Mapping[str, int]: ...


class Metrics:
    """Counts what passes; `text` is the page."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # `..._created` lines are read by nobody
        self._registry = CollectorRegistry()
        self._requests = Counter("clawloop_requests", "Requests answered.", ("path", "status"), registry=self._registry)
        self._seconds = self._histogram("clawloop_request_seconds", "From the request to its last byte.", _SECONDS)
        self._first = self._histogram("clawloop_first_token_seconds", "From the request to its first token.", _SECONDS)
        self._rate = self._histogram("clawloop_tokens_per_second", "Of a call, after its first token.", _RATES)
        tokens = Counter("clawloop_tokens", "Tokens by what became of them.", ("kind",), registry=self._registry)
        self._prompt, self._cached = tokens.labels("prompt"), tokens.labels("cached")
        self._completion = tokens.labels("completion")

    def request(self, path: str, *, status: int, seconds: float) -> None:
        """A request is over. `path` is one of our own routes, never what the client sent."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def answer(self, usage: Usage, *, started_ms: int, first_token_ms: int, finished_ms: int) -> None:
        """An answer is over."""
        self._prompt.inc(usage.prompt)
        self._cached.inc(usage.cached)
        self._completion.inc(usage.completion)
        if first_token_ms:
            self._first.observe((first_token_ms - started_ms) / 1000)
        if usage.completion > 1 and finished_ms > first_token_ms:
            self._rate.observe((usage.completion - 1) * 1000 / (finished_ms - first_token_ms))

    def watch(self, collector: Collector) -> None:
        """Read further metrics whenever the page is asked for."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self._registry)

    async def handle(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(body=self.text(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)


class StateCollector(Collector):
    """The state of engine and gateway at the moment of asking."""

    def __init__(self, engine: Engine | TextEngine, counts: "CountsReader") -> None:
        self._engine, self._counts = engine, counts

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        health, counts = self._engine.health(), self._counts()
        yield _gauge("clawloop_engine_up", "1 while the engine answers.", int(health.alive))
        yield _gauge("clawloop_calls_in_flight", "Calls that are being answered.", counts.in_flight)
        yield _gauge("clawloop_calls_waiting", "Calls in flight that have no row in the batch yet.", health.waiting)
        yield _gauge("clawloop_memory_bytes", "Weights and attention caches.", health.memory_bytes)
        yield _gauge("clawloop_memory_budget_bytes", "What they may take; 0: unbounded.", health.budget_bytes)
        yield _gauge("clawloop_prefix_cache_bytes", "Attention caches kept for next turns.", health.cache_bytes)
        yield _gauge("clawloop_adapter_version", "Version of a call that asks for none.", self._engine.policy.version)
        live = GaugeMetricFamily(
            "clawloop_version_loaded", "Adapter versions that can be asked for.", labels=["version"]
        )
        for version in health.versions:
            live.add_metric([str(version)], 1)
        yield live
        yield CounterMetricFamily("clawloop_steps_kept", "Steps on disk since the start.", counts.kept)
        yield CounterMetricFamily("clawloop_steps_not_kept", "Steps that could not be kept.", counts.keep_failures)
        late = "Answers that ended before the disk had them."
        yield CounterMetricFamily("clawloop_answers_kept_late", late, counts.kept_late)
        prompts = CounterMetricFamily("clawloop_prompts", "Prompts by how their ids came about.", labels=["how"])
        for how, count in counts.spliced.items():
            prompts.add_metric([how], count)
        yield prompts


class CountsReader(Protocol):
    """Gives the gateway's counts."""

    def __call__(self) -> GatewayCounts: ...


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=value)
