"""Settings of a worker process, one dataclass: flags, BATON_* variables and YAML all fill it."""

import itertools
from dataclasses import dataclass
from typing import Literal

from engine.scheduler.config import SchedulePolicyName
from engine.types import HostWritePolicy, KvCacheDtype, RadixEvictionPolicy
from observability.logs import LogFormat
from protos.tls import TlsSettings, check_pairs

Role = Literal["prefill", "decode", "unified"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
TransportName = Literal["auto", "cuda_ipc", "nixl", "grpc"]
LoadFormat = Literal["auto", "dummy"]
Overlap = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(TlsSettings):
    """Everything that a worker of any role needs to start."""

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

    metrics_port: int = 0
    """TCP port of the worker's Prometheus metrics (GET /metrics, on `host`); 0 picks a free one,
    which the log names and the router lists in GET /metrics/targets; -1: none."""

    router: str = "127.0.0.1:50051"
    """host:port of the router's gRPC server, where the worker registers; several, with commas
    between, and it registers with each. Empty: none, it waits to be found (Kubernetes)."""

    device: Device = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""

    device_index: int = 0
    """Which GPU, counted as CUDA_VISIBLE_DEVICES shows them."""

    tensor_parallel_size: int = 1
    """GPUs that share the model, from device_index on: each holds a part of the heads, of the MLP
    and of the vocabulary (--tp for short). On a CPU, processes; of use for tests only. 1: one
    device holds all of it."""

    dtype: Dtype = "auto"
    """auto: bfloat16 on CUDA; on a CPU, float32 (exact against the reference)."""

    transport: TransportName = "auto"
    """How KV moves between workers: auto takes, of what both sides have, cuda_ipc (GPUs of one
    host, in one PID namespace), else nixl, else grpc. One asked for by name must be there, or the
    worker does not start. A unified worker moves none."""

    page_size: int = 64
    """Tokens a KV page; larger pages move faster, smaller ones share prefixes more finely."""

    chunked_prefill_size: int = 8192
    """Most prompt tokens computed in one step; 0 computes prompts whole. Tokens."""

    max_prefill_tokens: int = 16384
    """Most prompt tokens in one step over all requests. Tokens."""

    enable_mixed_chunk: bool = True
    """Requests that decode take part in the steps that compute a prompt's chunks, instead of
    waiting for each. Matters on a unified worker, whose phases share the steps, and on a decode
    worker that computes a retracted request again. Steps in which one side wants log probabilities
    are not mixed."""

    overlap: Overlap = "auto"
    """Launch each step before the results of the step before are handled, so that the host works
    while the device computes; the outputs are the same. auto: on for CUDA, off for a CPU, which
    gains nothing."""

    split_prefill_layers: int = 0
    """Layers of a prompt's step that run at a time: requests that decode get a step between the
    parts (and steps are not mixed then). 0 runs all layers at once. Layers."""

    schedule_conservativeness: float = 1.0
    """Scales how much of each request's possible output is counted as needed when a prompt is
    admitted; above 0. Larger means fewer retractions and smaller batches."""

    decode_reserve_tokens: int = 512
    """Tokens that each running request may still grow, as a decode worker counts them before it
    promises memory to another; too many of them halve its throughput. Tokens."""

    truncation_align_size: int = 0
    """Chunks of a prompt end at multiples of this many tokens as well, where a deterministic kernel
    asks for it; 0: at whole pages only. Tokens."""

    max_total_tokens: int = 0
    """Size of the KV pool in tokens; 0: on CUDA from mem_fraction, on a CPU 65,536."""

    mem_fraction: float = 0.85
    """Share of the GPU's memory for all that a worker takes: weights, what its largest steps were
    measured to need at start, decode graphs, landing window, and the KV pool, which gets the
    rest."""

    cuda_graph_max_batch: int = 256
    """Largest decode batch that is captured as a CUDA graph at start, max_running_requests at most;
    larger ones, and all where this is 0 or the device is a CPU, run eagerly. Requests."""

    kernel_cache: str = ""
    """Directory in which kernels that are built on this machine are kept, for images and volumes to
    carry (`baton warmup` fills it), and which of them were measured to be fastest. Empty:
    FlashInfer's and Triton's own, in the home directory, for a CPU's decode steps `baton/cpu` in
    the user's cache directory, and each start measures anew."""

    kv_cache_dtype: KvCacheDtype = "auto"
    """What KV is stored and moved as: auto as the model computes, fp8_e4m3 in half the bytes (or a
    quarter of float32's), at some loss of accuracy. Workers that hand over must agree."""

    deterministic: bool = False
    """A request's tokens and log probabilities are the same, bit for bit, whatever batch, chunks
    and prefix hits it meets, and after a replay. Slower: on a GPU kernels of one fixed order, on a
    CPU one token at a time. Workers that hand over must agree."""

    max_running_requests: int = 256
    """Most requests in one decode batch."""

    max_worker_message_bytes: int = 64 << 20
    """Largest message between router and workers, and among workers; a prompt's ids take some 3
    bytes each. Bytes."""

    max_queued_requests: int = 4096
    """Most requests that wait in this worker; one more is refused with RESOURCE_EXHAUSTED."""

    schedule_policy: SchedulePolicyName = "fcfs"
    """Which waiting request goes first: the oldest (fcfs), the one with the longest cached prefix
    (lpm), those that share a cached prefix together (dfs-weight), the one with the longest output
    (lof), or any (random). All but fcfs trade fairness for throughput."""

    enable_priority_scheduling: bool = False
    """Requests of smaller priority go first, and the policy orders equals; off, priorities are not
    looked at."""

    priority_preemption_threshold: int = 10
    """With priority scheduling: a waiting request sends running ones back to the queue whose
    priority is larger by more than this, where memory or places are short. They go on later, with
    the same output."""

    max_context_length: int = 0
    """Longest prompt + output in tokens; 0: the model's own."""

    landing_slots: int = 0
    """Pages of the landing window that peers may write (decode); 0: 1/8 of the pool, from 16 pages
    up to 32,768 tokens."""

    drain_timeout_s: float = 60.0
    """Longest a draining worker goes on with what it has taken; what still runs then is handed
    over: its router replays it on other workers. Seconds."""

    grammar_timeout_s: float = 10.0
    """Longest a request waits for its grammar (a JSON schema, regular expression or EBNF) to be
    compiled; a grammar that takes longer is refused. Seconds."""

    lease_s: float = 4.0
    """Seconds without a heartbeat of the other side, or without the end of any write to it, after
    which a transfer is given up. Short, since clients are to hear of a failure within 5 s; a busy
    peer goes on with its heartbeats. More where a link needs longer for 32 pages."""

    hang_timeout_s: float = 60.0
    """Longest one step may take; past it the worker counts as hung and its requests are replayed
    elsewhere. Seconds; more than the largest chunk needs on this device."""

    enable_radix_cache: bool = True
    """Keep the KV of finished prompts for requests that share a prefix."""

    radix_eviction_policy: RadixEvictionPolicy = "lru"
    """Which cached prefix gives way to new KV: the least recently used (lru), or the least often
    used (lfu), which keeps a system prompt through a flood of other requests."""

    host_cache_tokens: int = 0
    """Host memory for prefixes that the KV pool has no room for: they are copied back when a
    request asks for one. Tokens; 0: none, an evicted prefix is computed again. On a GPU the memory
    is locked at the start; a token takes what it takes in the pool (128 KiB in an 8B Llama)."""

    host_write_policy: HostWritePolicy = "write_through"
    """When a prefix is copied to host memory: write_through, when it enters the cache, so that
    evicting it costs nothing; write_back, shortly before it is evicted, which moves less."""

    retract_host_share: float = 0.0625
    """Host memory for the KV of requests that a decode or unified worker had to send back to its
    queue, as a share of the KV pool: they go on without computing it again, where copying is
    faster. 0: none, all of it is computed again. Never more than an eighth of the host memory that
    is free at the start; on a GPU it is locked then. Prefill workers, which send none back, and
    workers of several ranks take no memory for it."""

    verify_kv: bool = True
    """Compare every page's digest on both sides of the handover."""

    handover_trace: str = ""
    """File to which the engine appends a line an event of each handover, for measurements on one
    host (bench/end_to_end.py). Empty: none."""

    threads: int = 0
    """CPU threads for computation; 0: the cores, shared among workers of `baton up`."""

    log_format: LogFormat = "text"
    """text: lines for people; json: an object a line, with request ids as fields."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""

    def __post_init__(self) -> None:
        check_pairs(self, TLS_NEEDS)
        if not self.max_worker_message_bytes > 0:
            raise ValueError(
                f"max_worker_message_bytes must be above 0, not {self.max_worker_message_bytes}"
            )


TLS_NEEDS = tuple(itertools.permutations(("tls_cert", "tls_key", "tls_ca"), 2))
"""A worker meets only router and workers, which always check each other."""
