"""Settings of a worker process, one dataclass: flags, BATON_* variables and YAML all fill it."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["prefill", "decode"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
TransportName = Literal["auto", "nixl", "grpc"]
LoadFormat = Literal["auto", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything that a prefill or decode worker needs to start."""

    model: str
    """Hugging Face model directory: config.json, safetensors, tokenizer.json."""

    served_model_name: str = ""
    """Name under which clients ask for the model. Empty: the directory's name."""

    load_format: LoadFormat = "auto"
    """auto reads the weights; dummy draws random ones (benchmarks only, labelled so)."""

    host: str = "127.0.0.1"
    """Address to listen on, and under which the router and peers reach this worker."""

    port: int = 0
    """TCP port of the worker's gRPC server; 0 picks a free one."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server, where the worker registers."""

    device: Device = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""

    device_index: int = 0
    """Which GPU, counted as CUDA_VISIBLE_DEVICES shows them."""

    dtype: Dtype = "auto"
    """auto: bfloat16 on CUDA; on a CPU, float32 (exact against the reference)."""

    transport: TransportName = "auto"
    """How KV moves: auto prefers nixl where both sides have it, else grpc."""

    page_size: int = 64
    """Tokens a KV page; larger pages move faster, smaller ones share prefixes more finely."""

    chunked_prefill_size: int = 8192
    """Most prompt tokens computed in one step; 0 computes prompts whole. Tokens."""

    max_prefill_tokens: int = 16384
    """Most prompt tokens in one step over all requests. Tokens."""

    max_total_tokens: int = 0
    """Size of the KV pool in tokens; 0: on CUDA from mem_fraction, on a CPU 65,536."""

    mem_fraction: float = 0.85
    """Share of the GPU's memory for weights and KV pool together."""

    cuda_graph_max_batch: int = 0
    """Largest decode batch that is captured as a CUDA graph at start; larger ones, and all where
    this is 0, run eagerly. Requests."""

    max_running_requests: int = 256
    """Most requests in one decode batch."""

    max_queued_requests: int = 4096
    """Most requests that wait in this worker; one more is refused with RESOURCE_EXHAUSTED."""

    max_context_length: int = 0
    """Longest prompt + output in tokens; 0: the model's own."""

    landing_slots: int = 0
    """Pages of the landing window that peers may write (decode); 0: 1/8 of the pool, 16 to 512."""

    lease_s: float = 30.0
    """Seconds without a sign of life after which a transfer is given up."""

    hang_timeout_s: float = 60.0
    """Longest one step may take; past it the worker counts as hung and its requests are replayed
    elsewhere. Seconds; more than the largest chunk needs on this device."""

    enable_radix_cache: bool = True
    """Keep the KV of finished prompts for requests that share a prefix."""

    verify_kv: bool = True
    """Compare every page's digest on both sides of the handover."""

    threads: int = 0
    """CPU threads for computation; 0: the cores, shared among workers of `baton up`."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""
