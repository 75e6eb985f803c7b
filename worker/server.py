"""The gRPC server of a worker's front: its bounds, and TLS where the deployment has it."""

from typing import Any

import grpc

from protos.door_watch import DoorWatch, PlainDoorWatch, TlsDoorWatch
from protos.slow_senders import SlowSenders
from protos.tls import ServerFiles, check_files
from worker.config import WorkerConfig

HANDSHAKE_TIMEOUT_MS = 10_000
"""Whoever connects and does not speak gRPC is cut off by then; gRPC's default is 120 s."""

MAX_METADATA_BYTES = 16 << 10
"""Of one call; routers and peers send next to none."""

MESSAGE_TIMEOUT_S = 30.0
"""From a call's head to the end of its message, where it has one."""

MAX_CONNECTIONS = 4096
"""Routers, peers (`max_workers` of a router at most) and probes; one more is closed at once."""

MAX_CALLS = 1024
"""Of one connection at a time: sessions, and questions beside them."""


class WorkerServer:
    """A server that is not bound yet: add services, `bind`, and start `grpc`."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises OSError: a file of TLS cannot be used."""
        self._config = config
        self._credentials: grpc.ServerCredentials | None = None
        self.address = ""
        """host:port, once it is bound."""
        self.watch: DoorWatch | None = None
        """Counts connections that were refused; None before `bind`, and where nobody tells."""
        self._watch: DoorWatch = PlainDoorWatch()
        if config.mutual:
            check_files(config, ("tls_ca", config.tls_ca))
            files = ServerFiles(
                certificate=config.tls_cert, key=config.tls_key, client_ca=config.tls_ca
            )
            self._watch = watch = TlsDoorWatch()
            self._credentials = files.credentials(on_connection=watch.on_connection)
        limit = config.max_worker_message_bytes
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.max_concurrent_streams", MAX_CALLS),
            ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ("grpc.so_reuseport", 0),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ]
        interceptors: list[Any] = [self._watch, SlowSenders(MESSAGE_TIMEOUT_S)]
        self.grpc: grpc.aio.Server = grpc.aio.server(options=options, interceptors=interceptors)

    def bind(self) -> str:
        """host:port under which the worker is reached. Raises OSError that names the address."""
        host, port = self._config.host, self._config.port
        address = f"{host}:{port}"
        try:
            if self._credentials is None:
                bound = self.grpc.add_insecure_port(address)
            else:
                bound = self.grpc.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        self.watch = self._watch if self._watch.begin(bound) else None
        self.address = f"{host}:{bound}"
        return self.address

    async def stop(self, *, grace_s: float) -> None:
        """Calls that run may end within that time."""
        await self.grpc.stop(grace_s)
        self._watch.close()
