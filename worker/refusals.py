"""Counts what a worker turned away before it became work: connections, routers, peers."""

from collections import Counter

from observability.sheet import Sheet
from protos.door_watch import DoorWatch


class WorkerRefusals:
    """Every label has a handful of values, whoever calls."""

    def __init__(self) -> None:
        self._sessions: Counter[tuple[str, str]] = Counter()
        self.door: DoorWatch | None = None
        """Of the gRPC server; None in plain text, where gRPC refuses unseen."""
        self.metrics_door: DoorWatch | None = None
        """Of the metrics' port; None in plain text."""

    def router(self, reason: str) -> None:
        """A router's session. `reason`: malformed, protocol or instance."""
        self._sessions["router", reason] += 1

    def peer(self, reason: str) -> None:
        """A KV session. `reason`: as in `kvtransfer.grpc_session.PeerRefused`."""
        self._sessions["worker", reason] += 1

    def add_to(self, sheet: Sheet) -> None:
        """The families of a scrape."""
        sheet.counter(
            "baton_worker_sessions_refused_total",
            "Sessions that did not come about, by who is at the other end and what did not fit",
            self._sessions,
            by=["peer", "reason"],
        )
        doors = {"grpc": self.door, "metrics": self.metrics_door}
        sheet.counter(
            "baton_worker_connections_refused_total",
            "Connections of a door that speaks TLS that asked for nothing within 10 s",
            {(n, "handshake"): watch.refused for n, watch in doors.items() if watch is not None},
            by=["door", "reason"],
        )
