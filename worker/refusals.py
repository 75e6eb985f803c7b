"""Counts what a worker turned away before it became work: connections, routers, peers."""

from collections import Counter

from observability.sheet import Sheet
from protos.door_watch import DoorWatch


class WorkerRefusals:
    """Every label has a handful of values, whoever calls."""

    def __init__(self) -> None:
        self._sessions: Counter[tuple[str, str]] = Counter()
        self.door: DoorWatch | None = None
        """Of the gRPC server; None where nobody tells of its connections."""
        self.metrics_door: DoorWatch | None = None
        """Of the metrics' port; None in plain text."""
        self.metrics_garbage = 0
        """Connections to that port, in plain text or within TLS, that spoke no HTTP."""

    def router(self, reason: str) -> None:
        """A router's session. `reason`: malformed, protocol or instance."""
        self._sessions["router", reason] += 1

    def peer(self, reason: str) -> None:
        """A KV session. `reason`: as in `kvtransfer.grpc_session.PeerRefused`."""
        self._sessions["worker", reason] += 1

    def on_metrics_garbage(self) -> None:
        """A connection to the metrics spoke no HTTP."""
        self.metrics_garbage += 1

    def add_to(self, sheet: Sheet) -> None:
        """The families of a scrape."""
        sheet.counter(
            "baton_worker_sessions_refused_total",
            "Sessions that did not come about, by who is at the other end and what did not fit",
            self._sessions,
            by=["peer", "reason"],
        )
        doors = {"grpc": self.door, "metrics": self.metrics_door}
        counts = {(n, w.reason): w.refused for n, w in doors.items() if w is not None}
        counts["metrics", "garbage"] = self.metrics_garbage
        sheet.counter(
            "baton_worker_connections_refused_total",
            "Connections that asked for nothing within 10 s of a TLS handshake's beginning, or, in "
            "plain text, said something and made no call, or to the metrics spoke no HTTP",
            counts,
            by=["door", "reason"],
        )
