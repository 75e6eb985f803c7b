"""Settings of the router, one dataclass: flags, BATON_* variables and YAML all fill it."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from observability.logs import LogFormat
from protos.tls import NEEDS, TlsSettings, check_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(TlsSettings):
    """Everything that the router needs to start; every field has a default."""

    http_host: str = "127.0.0.1"
    """Address on which the OpenAI-compatible HTTP door listens."""

    http_port: int = 8000
    """TCP port of the HTTP door; 0 picks a free one."""

    grpc_host: str = "127.0.0.1"
    """Address on which the gRPC door and the workers' registry listen."""

    grpc_port: int = 50051
    """TCP port of the gRPC door; 0 picks a free one."""

    tls_client_ca: str = ""
    """PEM file: only clients with a certificate of these authorities are served; empty: any."""

    api_keys_file: str = ""
    """YAML file with the digests of API keys (`baton keys`): both doors refuse whoever has none,
    and count what each uses. It is read again when it changes. Empty: everybody is served."""

    workers_host: str = "127.0.0.1"
    """Where clients need TLS or an API key, workers register on a door of their own: with tls_ca in
    mutual TLS, else in plain text. Its address."""

    workers_port: int = 50052
    """TCP port of the workers' own door, where there is one; 0 picks a free one."""

    tokenizer: str = ""
    """Directory with tokenizer.json (or that file); empty: the first registered worker's model."""

    served_model_name: str = ""
    """Name under which clients ask for the model; empty: the name that workers register."""

    max_workers: int = 1024
    """Most workers that are listed; one more is refused."""

    max_worker_message_bytes: int = 64 << 20
    """Largest message between router and workers; a prompt's ids take some 3 bytes each. Bytes."""

    max_queued_requests: int = 1024
    """Most requests in the router, waiting or running; one more is refused (429)."""

    max_message_bytes: int = 16 << 20
    """Largest gRPC message accepted from a client or a worker. Bytes."""

    max_body_bytes: int = 4 << 20
    """Largest HTTP body; a larger one is refused with 413. Reading JSON stops everybody's streams
    for some 0.1 s a MiB of token ids, and a prompt of 500,000 tokens fits. Bytes."""

    body_timeout_s: float = 30.0
    """Longest a client may take to send an HTTP body, or the message of a gRPC call. Seconds."""

    max_header_bytes: int = 64 << 10
    """Longest head of an HTTP request (431), or metadata of a gRPC call. Bytes."""

    head_timeout_s: float = 15.0
    """Longest an HTTP connection may go without a complete head of a request. Seconds."""

    max_connections: int = 4096
    """Most open HTTP connections; one more takes the place of the longest idle one."""

    max_grpc_connections: int = 4096
    """Most open connections of a gRPC door, workers' included where they share it; one more is
    closed at once. A connection carries many requests."""

    keepalive_s: float = 20.0
    """A connection silent for this long is probed; a client whose machine vanished is gone, and
    its requests with it, after 1.5 times this. Seconds."""

    max_buffered_tokens: int = 8192
    """Tokens kept for a client that reads slower than they come; one more ends its request."""

    send_buffer_bytes: int = 128 << 10
    """Kernel memory per HTTP connection for what its client has not read; a stream blocks, and
    write_timeout_s counts, once it and 64 KiB in the router are full. Bytes."""

    write_timeout_s: float = 30.0
    """Longest one write to a client may block before its request is ended. Seconds."""

    request_timeout_s: float = 600.0
    """Longest a request may take; a client's own, shorter deadline counts. Seconds."""

    max_reserve_wait_s: float = 25.0
    """Longest a request waits for decode memory before it is refused. Seconds."""

    max_replays: int = 3
    """How often a request is replayed on other workers before its error reaches the client."""

    replay_wait_s: float = 0.5
    """How long a replay waits for usable workers where none are left; together with
    silence_timeout_s it stays below 5 s. Seconds."""

    registry: Literal["memory", "redis", "kubernetes"] = "memory"
    """Where the list of workers comes from: memory (workers tell this router, which is the only
    one), redis (several routers share what each was told), kubernetes (the pods are the list)."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    """Where the shared registry is: redis://, rediss:// or unix://, with user and password. A
    password is better given as BATON_REDIS_URL than as a flag."""

    redis_prefix: str = "baton"
    """Name under which this deployment's keys lie in Redis; routers that share workers share it."""

    redis_ttl_s: float = 10.0
    """A worker that no router has heard for this long leaves the shared registry. Seconds."""

    redis_sync_s: float = 0.5
    """How often a router tells Redis whom it hears, and looks whom others found. Seconds."""

    kubernetes_namespace: str = ""
    """Namespace of the workers' pods; empty: the router's own."""

    kubernetes_selector: str = "app.kubernetes.io/part-of=baton"
    """Label selector of the workers' pods, as kubectl takes it."""

    kubernetes_role_label: str = "app.kubernetes.io/component"
    """Label of a pod whose value is its worker's role: prefill, decode or unified."""

    kubernetes_port_annotation: str = "baton.dev/grpc-port"
    """Annotation of a pod with its worker's gRPC port; without it, the container port `grpc`."""

    kubernetes_drain_annotation: str = "baton.dev/drain"
    """A pod with this annotation gets no new requests, unless its value is empty or false."""

    kubernetes_reconcile_s: float = 60.0
    """All pods are listed anew at least this often, whatever the watch says. Seconds."""

    kubernetes_kubeconfig: str = ""
    """File that says where the cluster's API is; empty: the pod's service account, else the
    user's own file."""

    heartbeat_interval_s: float = 1.0
    """How often a worker tells the registry that it lives. Seconds."""

    heartbeat_timeout_s: float = 5.0
    """Without a heartbeat for this long, a lost worker is not dialled again. Seconds."""

    forget_lost_s: float = 30.0
    """A lost worker without heartbeats leaves the list of workers after this. Seconds."""

    ping_interval_s: float = 0.5
    """How often the router pings a worker on its session. Seconds."""

    silence_timeout_s: float = 2.5
    """A worker that says nothing for this long is lost, and its requests move on. Seconds."""

    status_timeout_s: float = 0.5
    """Longest GET /workers waits for one worker's fresh figures. Seconds."""

    drain_timeout_s: float = 30.0
    """Longest a stopping router waits for its running requests. Seconds."""

    otlp_endpoint: str = ""
    """OTLP collector that gets a trace of every request, over gRPC: http://host:4317, or https://
    for TLS. Empty: no traces. Needs the extra `otel`."""

    trace_sample_ratio: float = 1.0
    """Share of requests that are traced, 0 to 1, of those whose client has not decided it (W3C
    traceparent)."""

    log_format: LogFormat = "text"
    """text: lines for people; json: an object a line, with request ids and phases as fields."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""

    @property
    def workers_apart(self) -> bool:
        """Workers register on a door of their own."""
        return bool(self.tls_cert or self.api_keys_file)

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "workers_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} must be between 0 and 65535, not {getattr(self, name)}")
        check_pairs(self, TLS_NEEDS)
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError(
                f"trace_sample_ratio must be between 0 and 1, not {self.trace_sample_ratio}"
            )
        if self.otlp_endpoint and urlsplit(self.otlp_endpoint).scheme not in ("http", "https"):
            raise ValueError("otlp_endpoint must begin with http:// or, for TLS, https://")
        if self.max_replays < 0:
            raise ValueError(f"max_replays must not be negative, not {self.max_replays}")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.registry == "redis" and urlsplit(self.redis_url).scheme not in REDIS_SCHEMES:
            # The URL itself may hold a password.
            raise ValueError(f"redis_url must begin with one of {', '.join(REDIS_SCHEMES)}://")
        if not self.redis_prefix or set(self.redis_prefix) & set("{}"):
            raise ValueError(f"redis_prefix must be a name without braces: {self.redis_prefix!r}")
        if self.redis_sync_s * 3 > self.redis_ttl_s:
            raise ValueError(
                f"redis_ttl_s ({self.redis_ttl_s}) must be at least three times redis_sync_s "
                f"({self.redis_sync_s}), or healthy workers leave the list"
            )
        if self.ping_interval_s >= self.silence_timeout_s:
            raise ValueError(
                f"ping_interval_s ({self.ping_interval_s}) must be below silence_timeout_s "
                f"({self.silence_timeout_s}), or healthy workers look lost"
            )


REDIS_SCHEMES = ("redis", "rediss", "unix")

TLS_NEEDS = (*NEEDS, ("tls_ca", "tls_cert"), ("tls_client_ca", "tls_cert"))
"""Settings of TLS that mean nothing alone, and what each needs."""

POSITIVE = (
    "max_workers",
    "max_worker_message_bytes",
    "max_queued_requests",
    "max_message_bytes",
    "max_body_bytes",
    "body_timeout_s",
    "max_header_bytes",
    "head_timeout_s",
    "max_connections",
    "max_grpc_connections",
    "keepalive_s",
    "max_buffered_tokens",
    "send_buffer_bytes",
    "write_timeout_s",
    "request_timeout_s",
    "max_reserve_wait_s",
    "replay_wait_s",
    "redis_ttl_s",
    "redis_sync_s",
    "kubernetes_reconcile_s",
    "heartbeat_interval_s",
    "heartbeat_timeout_s",
    "forget_lost_s",
    "ping_interval_s",
    "silence_timeout_s",
    "status_timeout_s",
    "drain_timeout_s",
)
"""Fields that mean nothing at zero or below."""
