"""How the client library reaches a router: keep-alive, limits, reconnecting, security."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

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
    """PEM of the authorities that may have signed the server's certificate; None: the public ones
    that gRPC ships."""

    private_key: bytes | None = None
    """PEM, for mutual TLS; needs `certificate_chain`."""

    certificate_chain: bytes | None = None
    """PEM, for mutual TLS; needs `private_key`."""

    server_name: str | None = None
    """Name to expect in the server's certificate; None: the host that is called."""

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            given, missing = "private_key", "certificate_chain"
            if self.private_key is None:
                given, missing = missing, given
            raise ValueError(
                f"mutual TLS takes a key and its certificate: {missing} is missing, "
                f"{given} is there"
            )
        for name in ("root_certificates", "private_key", "certificate_chain"):
            value = getattr(self, name)
            if value is not None and b"-----BEGIN " not in value:
                raise ValueError(f"{name} is not in PEM format")

    @classmethod
    def from_files(
        cls,
        *,
        root_certificates: str | Path | None = None,
        private_key: str | Path | None = None,
        certificate_chain: str | Path | None = None,
        server_name: str | None = None,
    ) -> Self:
        """The same from PEM files.

        Raises:
            OSError: a file cannot be read.
            ValueError: one of key and certificate is missing, or a file holds no PEM.
        """
        return cls(
            root_certificates=_read(root_certificates),
            private_key=_read(private_key),
            certificate_chain=_read(certificate_chain),
            server_name=server_name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """Everything about the connection but its address."""

    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    """Pings on an open call."""

    tls: Tls | None = None
    """None: plain text, for a trusted network or this machine."""

    api_key: str = field(default="", repr=False)
    """Key that the router asks for; empty: none. It is readable on a connection without TLS."""

    max_message_bytes: int = 16 << 20
    """Largest message either way; a prompt of a million token ids is about 3 MB."""

    reconnect_limit_s: float = 2.0
    """Longest pause between two attempts to reach a router that is away. Seconds."""

    reconnect_wait_s: float = 5.0
    """Longest a call waits for a lost connection to come back before it raises Unavailable, so
    that a router's restart is not felt; 0: it raises at once. The call's deadline counts, too."""

    default_timeout_s: float | None = None
    """Deadline of calls that name none; None: none. A stream's deadline covers all of it."""

    def channel_options(self) -> list[tuple[str, int | str]]:
        options: list[tuple[str, int | str]] = [
            ("grpc.keepalive_time_ms", int(self.keep_alive.interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keep_alive.timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", int(self.reconnect_limit_s * 1000)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # Two clients of one process must not share a connection: closing one would be felt.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call says of itself."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def credentials(self) -> grpc.ChannelCredentials | None:
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.root_certificates,
            private_key=self.tls.private_key,
            certificate_chain=self.tls.certificate_chain,
        )

    def open(self, address: str) -> grpc.Channel:
        """A blocking channel."""
        credentials, options = self.credentials(), self.channel_options()
        target = target_of(address)
        if credentials is None:
            return grpc.insecure_channel(target, options=options)
        return grpc.secure_channel(target, credentials, options=options)

    def open_async(self, address: str) -> grpc.aio.Channel:
        """The same for asyncio."""
        credentials, options = self.credentials(), self.channel_options()
        target = target_of(address)
        if credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, credentials, options=options)


def target_of(address: str) -> str:
    """host:port, as gRPC wants it, from what people write: grpc://host:port also works."""
    return address.removeprefix("grpc://").removeprefix("grpcs://").rstrip("/")


def config_for(address: str, config: ConnectionConfig | None) -> ConnectionConfig:
    """The configuration to connect with: grpcs:// asks for TLS where `config` names none.

    Raises:
        ValueError: grpc:// asks for plain text, and `config` for TLS.
    """
    config = config or ConnectionConfig()
    if address.startswith("grpcs://") and config.tls is None:
        return replace(config, tls=Tls())
    if address.startswith("grpc://") and config.tls is not None:
        raise ValueError(f"{address} asks for plain text, but TLS is configured; use grpcs://")
    return config


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
