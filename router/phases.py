"""Where a request's time went: durations taken inside one process each, siblings that sum up.

The router sees the two totals (TTFT, handover). Each phase is some process's own measurement, and
phases may overlap the rest: decode may have worked before the first token reached the router. So
each total is handed out from its end backwards, no phase gets more than is left, and the remainder
is the network's. Thus the phases are never negative and always sum to their total.
"""

from dataclasses import dataclass, field

from protos.baton.v1 import inference_pb2, worker_pb2


@dataclass(slots=True)
class AttemptTimes:
    """What is known of one attempt."""

    sent_at: float = 0.0
    """When its requests to the workers left. Seconds, monotonic."""
    unified: bool = False
    """One worker did both phases: nothing was handed over, so that of the handover only join (the
    wait for the step in which it decodes) and the first decode step have a duration."""
    reserve_ms: float = 0.0
    prefill: worker_pb2.WorkerTiming = field(default_factory=worker_pb2.WorkerTiming)
    decode: worker_pb2.WorkerTiming = field(default_factory=worker_pb2.WorkerTiming)


@dataclass(slots=True)
class RequestTimes:
    """The router's own clock over one request."""

    arrived_at: float
    first_at: float | None = None
    """When token 0 was ready for the client. Seconds, monotonic."""
    second_at: float | None = None
    last_at: float | None = None
    """When the newest token was ready."""
    first_attempt: AttemptTimes = field(default_factory=AttemptTimes)
    """The attempt that gave token 0."""
    second_attempt: AttemptTimes | None = None
    """The attempt whose decode worker gave token 1; None where a replayed prefill did."""

    @property
    def handed_over(self) -> bool:
        """The second token came from another worker than the first."""
        second = self.second_attempt
        return self.second_at is not None and (second is None or not second.unified)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.arrived_at

    @property
    def handover_s(self) -> float | None:
        if self.first_at is None or self.second_at is None:
            return None
        return self.second_at - self.first_at

    def phases(self) -> inference_pb2.Phases:
        """Named as in inference.proto. Zero for what did not happen."""
        result = inference_pb2.Phases()
        if self.ttft_s is not None:
            times = self.first_attempt
            admission_ms = 1e3 * (times.sent_at - self.arrived_at)
            ttft_ms = 1e3 * self.ttft_s
            # Prefill's queue begins with the ticket, where decode's reserve has ended.
            prefill = times.prefill
            shares, network_ms = hand_out(
                ttft_ms - admission_ms, [prefill.prefill_ms, prefill.queue_ms, times.reserve_ms]
            )
            result.ttft_ms, result.admission_ms = ttft_ms, admission_ms
            result.prefill_ms, result.queue_ms, result.reserve_ms = shares
            result.network_ms = network_ms
        if self.handover_s is not None:
            decode = (self.second_attempt or AttemptTimes()).decode
            result.handover_ms = 1e3 * self.handover_s
            shares, result.handover_network_ms = hand_out(
                result.handover_ms,
                [
                    decode.first_decode_step_ms,
                    decode.join_ms,
                    decode.verify_ms,
                    decode.transfer_tail_ms,
                ],
            )
            result.first_decode_step_ms, result.join_ms = shares[0], shares[1]
            result.verify_ms, result.transfer_tail_ms = shares[2], shares[3]
        return result


def hand_out(total: float, wanted: list[float]) -> tuple[list[float], float]:
    """Gives each in turn what it wants of what is left; returns the shares and the remainder."""
    left, shares = total, []
    for want in wanted:
        share = min(max(want, 0.0), left)
        shares.append(share)
        left -= share
    return shares, left
