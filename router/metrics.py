"""The router's Prometheus metrics, in a registry of its own."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.fleet import Fleet
from router.journey import Journey
from router.refusals import Refusals
from router.registry import state_name

TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class RouterMetrics:
    """Counts what happened; how the workers are is read at the moment of a scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self.in_flight = 0
        """Requests between admission and their end."""
        self._registry = CollectorRegistry()
        self.refusals = Refusals(self._registry)
        self._requests = Counter(
            "baton_requests_total",
            "Requests by how they ended: a finish reason, an error code, or client_gone",
            ["outcome"],
            registry=self._registry,
        )
        self._replays = Counter(
            "baton_replays_total", "Attempts after a request's first", registry=self._registry
        )
        self._tokens = Counter(
            "baton_output_tokens_total", "Tokens produced", registry=self._registry
        )
        self._kv_bytes = Counter(
            "baton_kv_bytes_total",
            "KV bytes moved from prefill to decode",
            ["transport"],
            registry=self._registry,
        )
        self._ttft = Histogram(
            "baton_ttft_seconds",
            "Arrival to first token",
            buckets=TTFT_BUCKETS_S,
            registry=self._registry,
        )
        self._itl = Histogram(
            "baton_itl_seconds",
            "Time between a request's tokens, the handover included",
            buckets=ITL_BUCKETS_S,
            registry=self._registry,
        )
        self._handover = Histogram(
            "baton_handover_seconds",
            "First token to second: from prefill to decode",
            buckets=ITL_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_FleetCollector(fleet, self))

    def refused(self, outcome: str) -> None:
        """A request ended before it had a journey."""
        self._requests.labels(outcome).inc()

    def on_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that came together share the time since those before."""
        for _ in range(tokens):
            self._itl.observe(seconds / tokens)

    def on_close(self, journey: Journey, *, output_tokens: int) -> None:
        self._requests.labels(journey.outcome).inc()
        self._replays.inc(journey.replays)
        self._tokens.inc(output_tokens)
        if journey.kv_bytes:
            self._kv_bytes.labels(journey.transport).inc(journey.kv_bytes)
        if journey.times.ttft_s is not None:
            self._ttft.observe(journey.times.ttft_s)
        if journey.times.handover_s is not None and journey.times.handed_over:
            self._handover.observe(journey.times.handover_s)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class _FleetCollector(Collector):
    def __init__(self, fleet: Fleet, metrics: RouterMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily(
            "baton_requests_in_flight", "Requests in the router, waiting or running"
        )
        in_flight.add_metric([], self._metrics.in_flight)
        yield in_flight
        workers = GaugeMetricFamily(
            "baton_workers", "Listed workers by role and state", labels=["role", "state"]
        )
        counts: dict[tuple[str, str], int] = {}
        for record in self._fleet.registry.workers():
            key = record.role_name, state_name(record.state)
            counts[key] = counts.get(key, 0) + 1
        for labels, count in counts.items():
            workers.add_metric(list(labels), count)
        yield workers
        yield self._pages()
        yield from self._source()

    def _pages(self) -> Metric:
        pages = GaugeMetricFamily(
            "baton_pages", "KV pages by worker and state", labels=["worker", "role", "state"]
        )
        for record in self._fleet.registry.workers():
            for state in ("free", "cached", "held", "in_use"):
                count = getattr(record.status.pages, state)
                pages.add_metric([record.id, record.role_name, state], count)
        return pages

    def _source(self) -> Iterable[Metric]:
        registry = self._fleet.registry
        health = registry.health()
        up = GaugeMetricFamily(
            "baton_registry_up",
            "1 while the source of the list of workers answers, 0 while the last list is used",
            labels=["kind"],
        )
        up.add_metric([registry.kind], int(health.up))
        yield up
        age = GaugeMetricFamily(
            "baton_registry_sync_age_seconds",
            "Time since the list of workers last agreed with its source",
            labels=["kind"],
        )
        age.add_metric([registry.kind], registry.sync_age_s())
        yield age
        failures = CounterMetricFamily(
            "baton_registry_failures",
            "How often the source of the list of workers did not answer",
            labels=["kind"],
        )
        failures.add_metric([registry.kind], health.failures)
        yield failures
