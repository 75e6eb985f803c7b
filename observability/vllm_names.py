"""The same figures under the names that vLLM gives them.

Dashboards made for vLLM work unchanged, and so does the endpoint picker of the Gateway API
inference extension, whose model server protocol asks for the queue, the running requests, the
share of KV memory in use, the cache's shape and the adapters under these names.
"""

import time
from dataclasses import dataclass, field

from observability.histogram import Histogram
from observability.sheet import Sheet

_LATENCIES = {
    "time_to_first_token_seconds": "Arrival to first token",
    "inter_token_latency_seconds": "Time between a request's tokens",
    "request_time_per_output_token_seconds": "Mean time of a request's tokens after the first",
    "e2e_request_latency_seconds": "Arrival to last token",
    "request_queue_time_seconds": "Arrival to first forward",
    "request_prefill_time_seconds": "First forward to first token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmFigures:
    """What a process knows of them."""

    model_name: str
    running: int
    waiting: int
    kv_usage: float
    """Share of KV memory that is in use, 0 to 1."""
    page_size: int
    """Tokens a KV page."""
    pages: int
    """KV pages in all."""
    prefix_caching: bool
    prefix_queries: int
    """Prompt tokens that were looked up."""
    prefix_hits: int
    """Of them, those whose KV was there."""
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]
    """Requests by finish reason."""
    latencies: dict[str, Histogram] = field(default_factory=dict)
    """By vLLM's name of them, without the prefix; those that this process measures."""


def add_vllm_names(figures: VllmFigures) -> Sheet:
    """A sheet of its own, since vLLM labels its series with model and engine."""
    sheet = Sheet({"model_name": figures.model_name, "engine": "0"})
    sheet.gauge("vllm:num_requests_running", "Requests that produce tokens", figures.running)
    sheet.gauge("vllm:num_requests_waiting", "Requests that wait", figures.waiting)
    sheet.gauge("vllm:kv_cache_usage_perc", "KV memory in use, 0 to 1", figures.kv_usage)
    sheet.gauge(
        "vllm:gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc", figures.kv_usage
    )
    sheet.counter(
        "vllm:prefix_cache_queries_total", "Prompt tokens looked up", figures.prefix_queries
    )
    sheet.counter("vllm:prefix_cache_hits_total", "Prompt tokens found cached", figures.prefix_hits)
    sheet.counter(
        "vllm:num_preemptions_total", "Requests sent back to the queue", figures.preemptions
    )
    sheet.counter("vllm:prompt_tokens_total", "Prompt tokens taken", figures.prompt_tokens)
    sheet.counter("vllm:generation_tokens_total", "Tokens produced", figures.generation_tokens)
    sheet.counter(
        "vllm:request_success_total",
        "Requests that finished, by reason",
        figures.finished,
        by=["finished_reason"],
    )
    for name, histogram in figures.latencies.items():
        sheet.histogram(f"vllm:{name}", _LATENCIES[name], histogram)
        if name == "inter_token_latency_seconds":
            sheet.histogram(
                "vllm:time_per_output_token_seconds", f"Older name of vllm:{name}", histogram
            )
    sheet.gauge(
        "vllm:cache_config_info",
        "Shape of the KV memory",
        {
            (
                str(figures.page_size),
                str(figures.pages),
                str(figures.prefix_caching),
            ): 1
        },
        by=["block_size", "num_gpu_blocks", "enable_prefix_caching"],
    )
    sheet.gauge(
        "vllm:lora_requests_info",
        "Adapters in use; none are served. Seconds since 1970",
        {("0", "", ""): time.time()},
        by=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    return sheet
