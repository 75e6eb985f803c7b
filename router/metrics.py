"""The router's Prometheus metrics: what happened, and how requests and workers are at a scrape.

No label holds anything that a client sent: an outcome is a finish reason or an error code, a phase
one of inference.proto's, a transport what the workers offer. So the series do not grow with the
traffic.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from observability.histogram import E2E_S, ITL_S, TTFT_S, Histogram
from observability.sheet import Sheet
from observability.vllm_names import VllmFigures, add_vllm_names
from protos.baton.v1 import inference_pb2
from router.fleet import DECODE, UNIFIED, Fleet
from router.journey import Journey
from router.refusals import Refusals
from router.registry import WorkerRecord, state_name

TOTALS = ("ttft_ms", "handover_ms")
PHASES = tuple(
    field.name.removesuffix("_ms")
    for field in inference_pb2.Phases.DESCRIPTOR.fields
    if field.name not in TOTALS
)
"""The parts of a request's two totals, as inference.proto names them."""

PAGE_STATES = ("free", "cached", "held", "in_use")
OWNED_STATES = ("held", "in_use")
FINISHED = ("stop", "length", "abort")


class RouterMetrics:
    """Counts what happened; how the workers are is read at the moment of a scrape."""

    def __init__(self, fleet: Fleet, live: Callable[[], Iterable[Journey | None]]) -> None:
        """`live`: the requests between admission and their end; None: it is being admitted."""
        self._fleet = fleet
        self._live = live
        self.outcomes: Counter[str] = Counter()
        self.refusals = Refusals()
        self._replays = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._kv_bytes: Counter[str] = Counter()
        self._ttft, self._itl, self._e2e = Histogram(TTFT_S), Histogram(ITL_S), Histogram(E2E_S)
        self._tpot, self._handover = Histogram(ITL_S), Histogram(ITL_S)
        self._phases = {name: Histogram(ITL_S) for name in PHASES}

    # ---- what happens ---------------------------------------------------------------------------

    def refused(self, outcome: str) -> None:
        """A request ended before it had a journey."""
        self.outcomes[outcome] += 1

    def on_tokens(self, seconds: float, tokens: int) -> None:
        """Tokens that came together share the time since those before."""
        self._itl.observe(seconds / tokens, tokens)

    def on_close(self, journey: Journey) -> None:
        """A request ended, however it went."""
        times = journey.times
        self.outcomes[journey.outcome] += 1
        self._replays += journey.replays
        self._prompt_tokens += len(journey.request.prompt_ids)
        self._cached_tokens += journey.cached_tokens
        self._output_tokens += journey.output_tokens
        if journey.kv_bytes:
            self._kv_bytes[journey.transport] += journey.kv_bytes
        if times.ttft_s is None:
            return
        self._ttft.observe(times.ttft_s)
        if times.handover_s is not None and times.handed_over:
            self._handover.observe(times.handover_s)
        if journey.outcome in FINISHED and times.last_at is not None:
            self._e2e.observe(times.last_at - times.arrived_at)
            if journey.output_tokens > 1 and times.first_at is not None:
                decoding_s = times.last_at - times.first_at
                self._tpot.observe(decoding_s / (journey.output_tokens - 1))
        self._on_phases(times.phases(), has_second=times.handover_s is not None)

    def _on_phases(self, phases: inference_pb2.Phases, *, has_second: bool) -> None:
        # A second token that was there with the first one counts, too: its handover took no time.
        for name in PHASES:
            if name in ("admission", "reserve", "queue", "prefill", "network") or has_second:
                self._phases[name].observe(getattr(phases, f"{name}_ms") / 1e3)

    # ---- a scrape -------------------------------------------------------------------------------

    def render(self) -> bytes:
        """The text exposition format."""
        sheet = Sheet()
        waiting, running = self._count_live()
        self._add_requests(sheet, waiting, running)
        self._add_latencies(sheet)
        self._add_workers(sheet)
        self._add_registry(sheet)
        self.refusals.add_to(sheet)
        model = self._fleet.model()
        if model is not None:
            sheet.extend(add_vllm_names(self._vllm(model.name, waiting, running)))
        return sheet.render()

    def _count_live(self) -> tuple[int, int]:
        """Requests that wait for their first token, and those that have it."""
        journeys = list(self._live())
        running = sum(1 for j in journeys if j is not None and j.times.first_at is not None)
        return len(journeys) - running, running

    def _add_requests(self, sheet: Sheet, waiting: int, running: int) -> None:
        sheet.gauge(
            "baton_requests_in_flight", "Requests in the router, waiting or running",
            waiting + running,
        )  # fmt: skip
        sheet.gauge("baton_num_requests_waiting", "Requests without a first token", waiting)
        sheet.gauge("baton_num_requests_running", "Requests that have their first token", running)
        sheet.counter(
            "baton_requests_total",
            "Requests by how they ended: a finish reason, an error code, or client_gone",
            self.outcomes,
            by=["outcome"],
        )
        sheet.counter(
            "baton_replays_total",
            "Attempts after something failed; to meet a draining worker is no failure",
            self._replays,
        )
        sheet.counter(
            "baton_prompt_tokens_total", "Prompt tokens of ended requests", self._prompt_tokens
        )
        sheet.counter(
            "baton_cached_prompt_tokens_total",
            "Of them, those whose KV prefill had cached",
            self._cached_tokens,
        )
        sheet.counter("baton_output_tokens_total", "Tokens produced", self._output_tokens)
        sheet.counter(
            "baton_kv_bytes_total",
            "KV bytes moved from prefill to decode",
            self._kv_bytes,
            by=["transport"],
        )

    def _add_latencies(self, sheet: Sheet) -> None:
        sheet.histogram("baton_ttft_seconds", "Arrival to first token", self._ttft)
        sheet.histogram(
            "baton_itl_seconds", "Time between a request's tokens, the handover included", self._itl
        )
        sheet.histogram(
            "baton_tpot_seconds", "Mean time of a request's tokens after its first", self._tpot
        )
        sheet.histogram("baton_e2e_seconds", "Arrival to last token", self._e2e)
        sheet.histogram(
            "baton_handover_seconds",
            "First token to second: from prefill to decode",
            self._handover,
        )
        sheet.histogram(
            "baton_phase_seconds",
            "Parts of TTFT and handover; those of one request sum to its totals",
            self._phases,
            by=["phase"],
        )

    def _add_workers(self, sheet: Sheet) -> None:
        records = list(self._fleet.registry.workers())
        sheet.gauge(
            "baton_workers",
            "Listed workers by role and state",
            Counter((record.role_name, state_name(record.state)) for record in records),
            by=["role", "state"],
        )
        sheet.gauge(
            "baton_pages",
            "KV pages by worker and state",
            {
                (record.id, record.role_name, state): getattr(record.status.pages, state)
                for record in records
                for state in PAGE_STATES
            },
            by=["worker", "role", "state"],
        )
        sheet.gauge(
            "baton_queued_tokens",
            "Prompt tokens that wait at each worker, as it last told this router",
            {(record.id, record.role_name): record.status.queued_tokens for record in records},
            by=["worker", "role"],
        )

    def _add_registry(self, sheet: Sheet) -> None:
        registry = self._fleet.registry
        health = registry.health()
        sheet.gauge(
            "baton_registry_up",
            "1 while the source of the list of workers answers, 0 while the last list is used",
            {registry.kind: int(health.up)},
            by=["kind"],
        )
        sheet.gauge(
            "baton_registry_sync_age_seconds",
            "Time since the list of workers last agreed with its source",
            {registry.kind: registry.sync_age_s()},
            by=["kind"],
        )
        sheet.counter(
            "baton_registry_failures_total",
            "How often the source of the list of workers did not answer",
            {registry.kind: health.failures},
            by=["kind"],
        )

    def _vllm(self, model_name: str, waiting: int, running: int) -> VllmFigures:
        """One router and its workers as if they were one server."""
        decoding = [
            record
            for record in self._fleet.registry.workers()
            if record.role in (DECODE, UNIFIED) and record.connected
        ]
        pages = sum(record.status.pages.total for record in decoding)
        return VllmFigures(
            model_name=model_name,
            running=running,
            waiting=waiting,
            kv_usage=sum(_owned(record) for record in decoding) / pages if pages else 0.0,
            page_size=decoding[0].model.page_size if decoding else 0,
            pages=pages,
            prefix_caching=True,
            prefix_queries=self._prompt_tokens,
            prefix_hits=self._cached_tokens,
            preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._output_tokens,
            finished={reason: self.outcomes[reason] for reason in FINISHED},
            latencies={
                "time_to_first_token_seconds": self._ttft,
                "inter_token_latency_seconds": self._itl,
                "request_time_per_output_token_seconds": self._tpot,
                "e2e_request_latency_seconds": self._e2e,
                "request_queue_time_seconds": self._phases["queue"],
                "request_prefill_time_seconds": self._phases["prefill"],
            },
        )


def _owned(record: WorkerRecord) -> int:
    return sum(getattr(record.status.pages, state) for state in OWNED_STATES)
