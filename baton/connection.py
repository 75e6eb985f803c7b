"""How the client library reaches a router: keep-alive, limits, security."""

from dataclasses import dataclass, field

import grpc

FIRST_RECONNECT_MS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAlive:
    """Pings that notice a router that vanished without closing its connection."""

    interval_s: float = 10.0
    """Seconds between pings while a call is open; gRPC sends none more often than every 10 s. The
    server must permit them: by default it ends a connection that pings while no data flows."""

    timeout_s: float = 5.0
    """Seconds without an answer after which the connection counts as dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Server authentication, and client certificates where the server asks for them."""

    root_certificates: bytes | None = None
    """PEM; None: the ones that gRPC ships."""

    private_key: bytes | None = None
    """PEM, for mutual TLS."""

    certificate_chain: bytes | None = None
    """PEM, for mutual TLS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """Everything about the connection but its address."""

    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    """Pings on an open call."""

    tls: Tls | None = None
    """None: plain text, for a trusted network or this machine."""

    max_message_bytes: int = 16 << 20
    """Largest message either way; a prompt of a million token ids is about 3 MB."""

    reconnect_limit_s: float = 2.0
    """Longest pause between two attempts to reach a router that is away. Seconds."""

    default_timeout_s: float | None = None
    """Deadline of calls that name none; None: none. A stream's deadline covers all of it."""

    def channel_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.keepalive_time_ms", int(self.keep_alive.interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keep_alive.timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", int(self.reconnect_limit_s * 1000)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # Two clients of one process must not share a connection: closing one would be felt.
            ("grpc.use_local_subchannel_pool", 1),
        ]

    def credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.root_certificates,
            private_key=self.tls.private_key,
            certificate_chain=self.tls.certificate_chain,
        )


def target_of(address: str) -> str:
    """host:port, as gRPC wants it, from what people write: grpc://host:port also works."""
    return address.removeprefix("grpc://").rstrip("/")
