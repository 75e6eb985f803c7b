"""A worker's Prometheus metrics: what its engine counts and what its front has timed.

Names: a router's begin with `baton_`, a worker's with `baton_worker_`, so that a sum over
everything scraped counts nothing twice; the same figures stand under vLLM's names as well.
"""

from observability.histogram import Histogram
from observability.sheet import Sheet
from observability.vllm_names import VllmFigures, add_vllm_names
from protos.baton.v1 import channel_pb2, inference_pb2, worker_pb2
from protos.version import PROTOCOL_VERSION
from worker.figures import from_message
from worker.refusals import WorkerRefusals
from worker.request_clock import RequestClock

RUNNING = frozenset({"running", "prebuilt"})
"""Queues whose requests are at work; those in the others wait."""

PAGE_STATES = ("free", "cached", "held", "in_use")


def render(
    *,
    registration: worker_pb2.RegisterRequest,
    status: worker_pb2.WorkerStatus,
    figures: channel_pb2.EngineFigures,
    figures_age_s: float,
    prefix_caching: bool,
    clock: RequestClock,
    refusals: WorkerRefusals,
) -> bytes:
    """The text exposition format. `figures_age_s` is above 0 where the engine did not answer, in
    the middle of a long step, and its last figures are told again."""
    role = inference_pb2.WorkerRole.Name(registration.role).removeprefix("WORKER_ROLE_").lower()
    sheet = Sheet({"model_name": registration.model.name, "role": role})
    sheet.gauge(
        "baton_worker_info",
        "Which worker this is",
        {(registration.instance_id, str(PROTOCOL_VERSION)): 1},
        by=["worker", "protocol_version"],
    )
    sheet.gauge(
        "baton_worker_figures_age_seconds",
        "0 while the engine tells its figures at once; else how old the last ones are",
        figures_age_s,
    )
    _add_requests(sheet, status, figures, clock)
    _add_memory(sheet, status, figures)
    _add_engine(sheet, figures)
    _add_transfers(sheet, figures)
    _add_latencies(sheet, clock, first_tokens=role != "decode")
    refusals.add_to(sheet)
    sheet.extend(add_vllm_names(_vllm(registration, figures, clock, prefix_caching=prefix_caching)))
    return sheet.render()


def _running(figures: channel_pb2.EngineFigures) -> int:
    return sum(count for queue, count in figures.queues.items() if queue in RUNNING)


def _waiting(figures: channel_pb2.EngineFigures) -> int:
    """Those whose pages are only read by a transfer any more do not wait for anything to be
    done."""
    at_work = RUNNING | {"inflight"}
    return sum(count for queue, count in figures.queues.items() if queue not in at_work)


def _kv_usage(figures: channel_pb2.EngineFigures) -> float:
    pages = figures.pages
    return (pages.in_use + pages.held) / pages.total if pages.total else 0.0


def _add_requests(
    sheet: Sheet,
    status: worker_pb2.WorkerStatus,
    figures: channel_pb2.EngineFigures,
    clock: RequestClock,
) -> None:
    sheet.gauge(
        "baton_worker_num_requests_running", "Requests that are computed", _running(figures)
    )
    sheet.gauge(
        "baton_worker_num_requests_waiting",
        "Requests that wait: for a ticket, memory, their turn, or their KV",
        _waiting(figures),
    )
    sheet.gauge(
        "baton_worker_queue_requests",
        "Requests by the queue of the role that they are in",
        dict(figures.queues),
        by=["queue"],
    )
    sheet.gauge(
        "baton_worker_queued_prompt_tokens",
        "Prompt tokens that wait to be computed",
        status.queued_tokens,
    )
    sheet.counter(
        "baton_worker_requests_total",
        "Attempts at requests by how they ended here",
        dict(clock.outcomes),
        by=["outcome"],
    )
    sheet.counter("baton_worker_prompt_tokens_total", "Prompt tokens taken", clock.prompt_tokens)
    sheet.counter(
        "baton_worker_generation_tokens_total", "Tokens produced", clock.generation_tokens
    )


def _add_memory(
    sheet: Sheet, status: worker_pb2.WorkerStatus, figures: channel_pb2.EngineFigures
) -> None:
    sheet.gauge(
        "baton_worker_kv_cache_usage_perc",
        "Share of KV pages that requests and transfers own, 0 to 1",
        _kv_usage(figures),
    )
    sheet.gauge(
        "baton_worker_kv_pages",
        "KV pages by state",
        {state: getattr(figures.pages, state) for state in PAGE_STATES},
        by=["state"],
    )
    sheet.gauge(
        "baton_worker_landing_slots",
        "Slots of the landing window by state; 0 where nothing lands",
        {
            "free": status.slots_free,
            "granted": status.slots_granted,
            "quarantined": status.slots_quarantined,
        },
        by=["state"],
    )
    tiers = {"prefixes": status.host_cache, "retracted": status.retracted}
    sheet.gauge(
        "baton_worker_host_pages",
        "Pages of host memory by what they are for and whether they are used",
        {
            (tier, state): count
            for tier, pages in tiers.items()
            for state, count in (("used", pages.used), ("free", pages.total - pages.used))
        },
        by=["tier", "state"],
    )
    sheet.counter(
        "baton_worker_host_copies_total",
        "Pages copied to host memory, back from it, and found spoilt there",
        {
            (tier, event): getattr(pages, event)
            for tier, pages in tiers.items()
            for event in ("written", "loaded", "spoilt")
        },
        by=["tier", "event"],
    )
    sheet.counter(
        "baton_worker_prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache",
        figures.prefix_query_tokens,
    )
    sheet.counter(
        "baton_worker_prefix_cache_hits_total",
        "Prompt tokens whose KV was in the prefix cache",
        figures.prefix_hit_tokens,
    )


def _add_engine(sheet: Sheet, figures: channel_pb2.EngineFigures) -> None:
    sheet.counter(
        "baton_worker_preemptions_total",
        "Requests that ran and gave way to a more important one",
        figures.preemptions,
    )
    sheet.counter(
        "baton_worker_retractions_total",
        "Requests sent back to the queue for want of memory",
        figures.retractions,
    )
    sheet.gauge(
        "baton_worker_new_token_ratio",
        "Share of a request's possible output that is counted as needed when it is admitted",
        figures.new_token_ratio,
    )
    sheet.counter(
        "baton_worker_computed_tokens_total",
        "Tokens that went into forwards",
        figures.computed_tokens,
    )
    sheet.histogram(
        "baton_worker_scheduler_pass_seconds",
        "One pass of the scheduler that ran something, its step included",
        from_message(figures.pass_seconds),
    )


def _add_transfers(sheet: Sheet, figures: channel_pb2.EngineFigures) -> None:
    transfers = figures.transfers
    sheet.gauge("baton_worker_kv_peers", "Workers that KV can flow to or from", figures.peers)
    sheet.counter(
        "baton_worker_kv_transfer_bytes_total",
        "KV bytes of transfers that completed",
        {one.transport: one.bytes for one in transfers},
        by=["transport"],
    )
    sheet.histogram(
        "baton_worker_kv_transfer_seconds",
        "From the ticket to the last page's acknowledgement",
        {one.transport: from_message(one.seconds) for one in transfers},
        by=["transport"],
    )
    sheet.counter(
        "baton_worker_kv_transfer_failures_total",
        "Transfers that did not complete, by cause",
        {
            (one.transport, cause): count
            for one in transfers
            for cause, count in one.failures.items()
        },
        by=["transport", "cause"],
    )
    sheet.counter(
        "baton_worker_kv_messages_dropped_total",
        "Messages of peers that were late, repeated or not allowed",
        dict(figures.dropped_messages),
        by=["cause"],
    )


def _add_latencies(sheet: Sheet, clock: RequestClock, *, first_tokens: bool) -> None:
    if first_tokens:
        sheet.histogram("baton_worker_ttft_seconds", "Arrival here to first token", clock.ttft)
    sheet.histogram("baton_worker_itl_seconds", "Time between a request's tokens", clock.itl)
    sheet.histogram(
        "baton_worker_tpot_seconds", "Mean time of a request's tokens after its first", clock.tpot
    )
    sheet.histogram(
        "baton_worker_e2e_seconds",
        "Arrival here to last token, or to the handover's end",
        clock.e2e,
    )
    sheet.histogram(
        "baton_worker_phase_seconds",
        "Parts of a request's time that this worker measures",
        clock.phases,
        by=["phase"],
    )


def _vllm(
    registration: worker_pb2.RegisterRequest,
    figures: channel_pb2.EngineFigures,
    clock: RequestClock,
    *,
    prefix_caching: bool,
) -> VllmFigures:
    latencies: dict[str, Histogram] = {
        "inter_token_latency_seconds": clock.itl,
        "request_time_per_output_token_seconds": clock.tpot,
        "e2e_request_latency_seconds": clock.e2e,
    }
    if "prefill" in clock.phases:
        latencies |= {
            "time_to_first_token_seconds": clock.ttft,
            "request_queue_time_seconds": clock.phases["queue"],
            "request_prefill_time_seconds": clock.phases["prefill"],
        }
    return VllmFigures(
        model_name=registration.model.name,
        running=_running(figures),
        waiting=_waiting(figures),
        kv_usage=_kv_usage(figures),
        page_size=registration.model.page_size,
        pages=figures.pages.total,
        prefix_caching=prefix_caching,
        prefix_queries=figures.prefix_query_tokens,
        prefix_hits=figures.prefix_hit_tokens,
        preemptions=figures.preemptions + figures.retractions,
        prompt_tokens=clock.prompt_tokens,
        generation_tokens=clock.generation_tokens,
        finished={reason: clock.outcomes[reason] for reason in ("stop", "length", "abort")},
        latencies=latencies,
    )
