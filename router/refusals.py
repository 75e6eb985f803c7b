"""Counts what was refused before it became a request: connections, keys, limits, workers."""

from collections import Counter

from observability.sheet import Sheet
from protos.door_watch import DoorWatch


class Refusals:
    """Every label has a handful of values, whoever calls."""

    def __init__(self) -> None:
        self._auth: Counter[tuple[str, str]] = Counter()
        self._limited: Counter[str] = Counter()
        self._workers: Counter[str] = Counter()
        self.http = {"handshake": 0, "garbage": 0}
        """Connections of the HTTP door that came to nothing."""
        self.doors: dict[str, DoorWatch] = {}
        """The gRPC doors whose refused connections can be counted."""

    def auth(self, door: str, reason: str) -> None:
        """`reason`: missing, malformed, unknown, revoked or forbidden."""
        self._auth[door, reason] += 1

    def limit(self, limit: str) -> None:
        """`limit`: the setting of the key that was reached."""
        self._limited[limit] += 1

    def worker(self, reason: str) -> None:
        """`reason`: protocol, fingerprint, replaced, malformed, full or other."""
        self._workers[reason] += 1

    def http_connection(self, reason: str) -> None:
        """`reason`: handshake or garbage."""
        self.http[reason] += 1

    def add_to(self, sheet: Sheet) -> None:
        """The families of a scrape."""
        sheet.counter(
            "baton_auth_failures_total",
            "Calls without a valid API key, by door and by what was wrong",
            self._auth,
            by=["door", "reason"],
        )
        sheet.counter(
            "baton_rate_limited_total",
            "Requests refused by a limit of their API key",
            self._limited,
            by=["limit"],
        )
        sheet.counter(
            "baton_workers_refused_total",
            "Registrations of workers that are not used, by reason",
            self._workers,
            by=["reason"],
        )
        connections = {("http", reason): count for reason, count in self.http.items()}
        connections |= {(door, watch.reason): watch.refused for door, watch in self.doors.items()}
        sheet.counter(
            "baton_connections_refused_total",
            "Connections that failed the TLS handshake (of gRPC: that made no call in 10 s); in "
            "plain text, those that spoke no HTTP, or to gRPC said something and made no call",
            connections,
            by=["door", "reason"],
        )
