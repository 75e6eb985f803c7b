"""Settings of `baton bench`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_DURATION_S = 60.0
PLOT_SUFFIXES = (".png", ".svg")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to send, how fast, against what, and what to make of it."""

    url: str = "grpc://127.0.0.1:50051"
    """The door: grpc://HOST:PORT, or http://HOST:PORT for any server with /v1/completions."""

    model: str = ""
    """Model to ask for; empty: the first one that the server lists."""

    rate: float = 0.0
    """Open loop: Poisson arrivals, so many requests a second; 0: not this."""

    concurrency: int = 0
    """Closed loop: so many requests are always under way; 0: not this."""

    trace: str = ""
    """Open loop: file of JSON lines with timestamp, input_length and output_length."""

    trace_time_unit: Literal["ms", "s"] = "ms"
    """Unit of numeric timestamps in the trace."""

    trace_speed: float = 1.0
    """Replays the trace so many times faster."""

    requests: int = 0
    """Most requests to send; 0: bounded by the duration or the trace."""

    duration_s: float = 0.0
    """No request is sent after this; those under way finish. Seconds; 0: 60, or bounded by the
    number of requests or the trace."""

    warmup: int = 0
    """Requests that are sent first, one at a time, and not counted."""

    seed: int = 0
    """Of lengths, arrivals and token ids: the same seed sends the same requests."""

    input_length: int = 0
    """Prompt tokens of every request; 0: the mixed workload's or the trace's."""

    output_length: int = 0
    """Tokens to produce for every request; 0: the mixed workload's or the trace's."""

    length_scale: float = 1.0
    """Multiplies the lengths of workload and trace, for models with a short context."""

    vocab_size: int = 0
    """Token ids are drawn below this; 0: as the server says."""

    request_timeout_s: float = 600.0
    """Longest one request may take. Seconds."""

    slo_ttft_ms: float = 0.0
    """Goodput counts requests whose first token came within this; 0: any."""

    slo_itl_ms: float = 0.0
    """Goodput counts requests whose mean inter-token latency is within this; 0: any."""

    slo_p99_itl_ms: float = 0.0
    """Goodput counts requests whose 99th percentile of inter-token latency is within this; 0:
    any."""

    json: str = ""
    """File to write settings, figures and every request to."""

    plot: str = ""
    """File to draw the distributions to: .png or .svg."""

    def __post_init__(self) -> None:
        if sum((self.rate > 0, self.concurrency > 0, bool(self.trace))) != 1:
            raise ValueError("give one of --rate (Poisson), --concurrency (closed loop), --trace")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("trace_speed", "length_scale", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.scheme not in ("grpc", "grpcs", "http", "https"):
            raise ValueError(
                f"url must begin with grpc://, grpcs://, http:// or https://: {self.url}"
            )
        if self.plot and Path(self.plot).suffix not in PLOT_SUFFIXES:
            raise ValueError(f"plot must end in {' or '.join(PLOT_SUFFIXES)}, not {self.plot}")

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def bound_s(self) -> float:
        """Seconds after which nothing is sent any more; infinite where something else bounds."""
        if self.duration_s:
            return self.duration_s
        return float("inf") if self.requests or self.trace else DEFAULT_DURATION_S


NOT_NEGATIVE = (
    "rate",
    "concurrency",
    "requests",
    "duration_s",
    "warmup",
    "seed",
    "input_length",
    "output_length",
    "vocab_size",
    "slo_ttft_ms",
    "slo_itl_ms",
    "slo_p99_itl_ms",
)
