"""How long requests take on one worker, as its front sees them pass: latencies, tokens, outcomes.

The front measures, so that the engine's thread does not. It is told of a step after the step's
tokens are on their way to the router: nothing here delays one.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from observability.histogram import E2E_S, ITL_S, TTFT_S, Histogram
from protos.baton.v1 import inference_pb2, worker_pb2

WorkKey = tuple[str, int]
"""(request id, attempt)."""

PROMPT_PHASES = ("queue", "prefill")
HANDOVER_PHASES = ("transfer_tail", "verify", "join", "first_decode_step")
PHASES = {
    inference_pb2.WORKER_ROLE_PREFILL: PROMPT_PHASES,
    inference_pb2.WORKER_ROLE_DECODE: HANDOVER_PHASES,
    inference_pb2.WORKER_ROLE_UNIFIED: (*PROMPT_PHASES, "join", "first_decode_step"),
}
"""What a worker of that role can time by itself."""

HANDED_OVER = "handed_over"
"""Outcome of a request that a prefill worker has given to decode, pages and all."""


@dataclass(slots=True)
class Passing:
    """A request between its arrival and its end."""

    arrived: float
    trace_id: str = ""
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    outcome: str = ""


class RequestClock:
    """All times are time.monotonic() seconds."""

    def __init__(self, role: inference_pb2.WorkerRole) -> None:
        self.ttft = Histogram(TTFT_S)
        self.itl = Histogram(ITL_S)
        self.tpot = Histogram(ITL_S)
        self.e2e = Histogram(E2E_S)
        self.phases = {name: Histogram(ITL_S) for name in PHASES[role]}
        self.outcomes: Counter[str] = Counter()
        """Requests by how they ended: a finish reason, an error code, handed_over."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self._makes_first_tokens = role != inference_pb2.WORKER_ROLE_DECODE
        self._running: dict[WorkKey, Passing] = {}

    def begin(self, key: WorkKey, *, prompt_tokens: int, now: float, trace_id: str = "") -> None:
        """A request was taken."""
        self.prompt_tokens += prompt_tokens
        self._running[key] = Passing(now, trace_id)

    def on_outputs(self, outputs: Iterable[worker_pb2.RequestOutput], now: float) -> None:
        """One step's tokens."""
        for output in outputs:
            running = self._running.get((output.request_id, output.attempt))
            if running is None:
                continue
            tokens = len(output.tokens)
            self.generation_tokens += tokens
            running.tokens += tokens
            if running.first:
                self.itl.observe((now - running.last) / max(1, tokens), tokens)
            else:
                running.first = now
                if self._makes_first_tokens:
                    self.ttft.observe(now - running.arrived)
            running.last = now
            if output.HasField("timing"):
                self._take_timing(output.timing)
            if output.finish_reason:
                name = inference_pb2.FinishReason.Name(output.finish_reason)
                running.outcome = name.removeprefix("FINISH_REASON_").lower()

    def on_failed(self, failed: worker_pb2.WorkFailed) -> None:
        """A request ended with an error."""
        running = self._running.get((failed.request_id, failed.attempt))
        if running is not None:
            name = worker_pb2.ErrorCode.Name(failed.error.code)
            running.outcome = name.removeprefix("ERROR_CODE_").lower()

    def end(self, key: WorkKey, now: float) -> Passing | None:
        """The engine holds nothing of it any more. None: it was not known."""
        passing = self._running.pop(key, None)
        if passing is None:
            return None
        if not passing.outcome:
            handed_over = self._hands_over and passing.tokens > 0
            passing.outcome = HANDED_OVER if handed_over else "abort"
        self.outcomes[passing.outcome] += 1
        if passing.tokens:
            last = now if passing.outcome == HANDED_OVER else passing.last
            self.e2e.observe(last - passing.arrived)
        if passing.tokens > 1:
            self.tpot.observe((passing.last - passing.first) / (passing.tokens - 1))
        return passing

    @property
    def _hands_over(self) -> bool:
        return "first_decode_step" not in self.phases

    def _take_timing(self, timing: worker_pb2.WorkerTiming) -> None:
        names = set(self.phases)
        if not self._hands_over and self._makes_first_tokens:
            # A unified worker tells of the prompt first, then of the first decode step.
            names = names & set(PROMPT_PHASES if timing.prefill_ms else HANDOVER_PHASES)
        for name in names:
            self.phases[name].observe(getattr(timing, f"{name}_ms") / 1e3)
