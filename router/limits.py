"""What bounds a connection below HTTP and gRPC: kernel buffers, probes, file descriptors.

gRPC bounds the rest of its own connections with the options below: whoever connects and does not
speak HTTP/2 is cut off after `HANDSHAKE_TIMEOUT_MS`, a head or message that is too large is refused
with RESOURCE_EXHAUSTED, an idle connection is closed in good order, and a client that does not read
is held by HTTP/2's flow control (the journey's buffer and `write_timeout_s` count from there). It
waits for a call's message for ever; `protos/slow_senders.py` does not.
"""

import contextlib
import logging
import socket
from typing import Any

from router.config import RouterConfig

try:
    import resource
except ImportError:  # no POSIX
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_MS = 10_000
"""A gRPC connection has begun to speak by then; gRPC's default is 120 s."""

SPARE_STREAMS = 256
"""Calls of one connection that are no requests: health, workers, lists."""

MAX_IDLE_MS = 600_000
"""A gRPC connection without a call for so long is closed; clients dial again when they need to."""

MIN_PING_INTERVAL_MS = 5_000
"""Keep-alive pings of clients that come more often end their connection."""

RESERVED_FILES = 512
"""File descriptors kept for gRPC connections, workers and files."""

PROBES = 5
"""Unanswered TCP probes after which a connection is dead, sent within half of keepalive_s."""


def grpc_options(config: RouterConfig, *, max_connections: int) -> list[tuple[str, Any]]:
    """Options of a gRPC door. One connection more than `max_connections` is closed at once."""
    keepalive_ms = int(config.keepalive_s * 1e3)
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_metadata_size", config.max_header_bytes),
        ("grpc.absolute_max_metadata_size", config.max_header_bytes),
        # Far above what is admitted: those between are refused with a hint, gRPC gives none.
        ("grpc.max_concurrent_streams", 2 * config.max_queued_requests + SPARE_STREAMS),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", MAX_IDLE_MS),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms // 2),
        # Two routers on one port would each see half of the workers.
        ("grpc.so_reuseport", 0),
        # Clients may ask whether we live while their stream is silent; gRPC's default
        # takes that for an attack and ends the stream after a few pings.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ]


def bound_http_socket(listener: socket.socket, config: RouterConfig) -> None:
    """Options that every connection inherits from its listener.

    Left to itself the kernel holds megabytes for a reader that has stopped, and keeps the
    connection of a machine that vanished for hours.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.send_buffer_bytes)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, round(config.keepalive_s / 2 / PROBES))
    for name, value in (
        ("TCP_KEEPIDLE", max(1, round(config.keepalive_s))),
        ("TCP_KEEPINTVL", probe_s),
        ("TCP_KEEPCNT", PROBES),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def allow_files(*max_connections: int) -> list[int]:
    """Raises this process's soft limit of open files as far as needed and allowed.

    Args:
        max_connections: of each door.

    Returns:
        How many connections each door can hold beside `RESERVED_FILES`: as many as asked for, or
        its share of what is allowed.
    """
    if resource is None:
        return list(max_connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = sum(max_connections)
    wanted = asked + RESERVED_FILES
    if soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    if soft >= wanted:
        return list(max_connections)
    left = soft - min(RESERVED_FILES, soft // 2)
    fewer = [max(1, left * most // asked) for most in max_connections]
    logger.warning(
        "only %d files may be open (ulimit -n): doors take %s connections, not %s",
        soft,
        " and ".join(map(str, fewer)),
        " and ".join(map(str, max_connections)),
    )
    return fewer
