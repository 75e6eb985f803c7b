"""Counts what was refused before it became a request: connections, keys, limits, workers."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from protos.door_watch import DoorWatch


class Refusals:
    """Every label has a handful of values, whoever calls."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._auth = Counter(
            "baton_auth_failures_total",
            "Calls without a valid API key, by door and by what was wrong",
            ["door", "reason"],
            registry=registry,
        )
        self._limited = Counter(
            "baton_rate_limited_total",
            "Requests refused by a limit of their API key",
            ["limit"],
            registry=registry,
        )
        self._workers = Counter(
            "baton_workers_refused_total",
            "Registrations of workers that are not used, by reason",
            ["reason"],
            registry=registry,
        )
        self.http = {"handshake": 0, "garbage": 0}
        """Connections of the HTTP door that came to nothing."""
        self.doors: dict[str, DoorWatch] = {}
        """The gRPC doors that speak TLS."""
        registry.register(_Connections(self.doors, self.http))

    def auth(self, door: str, reason: str) -> None:
        """`reason`: missing, malformed, unknown, revoked or forbidden."""
        self._auth.labels(door, reason).inc()

    def limit(self, limit: str) -> None:
        """`limit`: the setting of the key that was reached."""
        self._limited.labels(limit).inc()

    def worker(self, reason: str) -> None:
        """`reason`: protocol, fingerprint, replaced, malformed, full or other."""
        self._workers.labels(reason).inc()

    def http_connection(self, reason: str) -> None:
        """`reason`: handshake or garbage."""
        self.http[reason] += 1


class _Connections(Collector):
    def __init__(self, doors: dict[str, DoorWatch], http: dict[str, int]) -> None:
        self._doors = doors
        self._http = http

    def collect(self) -> Iterable[Metric]:
        refused = CounterMetricFamily(
            "baton_connections_refused",
            "Connections that failed the TLS handshake (of gRPC: that made no call in 10 s) or "
            "spoke no HTTP",
            labels=["door", "reason"],
        )
        for reason, count in self._http.items():
            refused.add_metric(["http", reason], count)
        for door, watch in self._doors.items():
            refused.add_metric([door, "handshake"], watch.refused)
        yield refused
