"""From samples to figures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.bench.sample import Sample

POINTS = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A distribution, in milliseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must keep to count as good; 0: no bound."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    """Of the request's mean inter-token latency."""

    p99_itl_ms: float = 0.0

    @property
    def stated(self) -> bool:
        return bool(self.ttft_ms or self.itl_ms or self.p99_itl_ms)

    def met_by(self, sample: Sample) -> bool:
        """A failed request meets none."""
        if sample.error:
            return False
        itl = sample.itl_ms
        kept = not self.ttft_ms or sample.ttft_ms <= self.ttft_ms
        if itl and self.itl_ms:
            kept = kept and float(np.mean(itl)) <= self.itl_ms
        if itl and self.p99_itl_ms:
            kept = kept and float(np.percentile(itl, 99)) <= self.p99_itl_ms
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Latencies and rates are those of requests that succeeded."""

    sent: int
    succeeded: int
    failed: int
    errors: dict[str, int]
    """Failed requests by kind."""

    error_details: dict[str, str]
    """Of each kind, the first one's words."""

    span_s: float
    """From the first request sent to the last one's end."""

    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    handover_ms: Spread | None
    e2e_ms: Spread | None
    phases_ms: dict[str, Spread]
    """As Baton's router reports them; empty for other servers."""

    transports: dict[str, int]
    """Requests by what moved their KV."""

    kv_bytes: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    slo: Slo
    good: int
    """Requests that met the SLO."""

    good_share: float
    """Of all that were sent."""

    goodput_per_s: float
    """Good requests a second."""

    loop_lag_ms: Spread | None
    """How late the client's own event loop was."""

    late_ms: Spread | None
    """How much later than planned requests were sent."""


def figures(samples: Sequence[Sample], *, slo: Slo, lags_ms: Sequence[float]) -> Figures:
    """The figures of one run."""
    fine = [sample for sample in samples if not sample.error]
    bad = [sample for sample in samples if sample.error]
    span = _span(samples)
    good = sum(slo.met_by(sample) for sample in samples)
    phases = sorted({name for sample in fine for name in sample.phases_ms})
    return Figures(
        sent=len(samples),
        succeeded=len(fine),
        failed=len(bad),
        errors=dict(Counter(sample.error for sample in bad).most_common()),
        error_details={sample.error: sample.detail for sample in reversed(bad)},
        span_s=span,
        ttft_ms=spread([sample.ttft_ms for sample in fine]),
        itl_ms=spread([gap for sample in fine for gap in sample.itl_ms]),
        tpot_ms=spread([tpot for sample in fine if (tpot := sample.tpot_ms) is not None]),
        handover_ms=spread([gap for sample in fine if (gap := sample.handover_ms) is not None]),
        e2e_ms=spread([sample.e2e_ms for sample in fine]),
        phases_ms={
            name: value
            for name in phases
            if (value := spread([s.phases_ms[name] for s in fine if name in s.phases_ms]))
        },
        transports=dict(Counter(sample.transport for sample in fine if sample.transport)),
        kv_bytes=sum(sample.kv_bytes for sample in fine),
        requests_per_s=_rate(len(fine), span),
        input_tokens_per_s=_rate(sum(sample.input_length for sample in fine), span),
        output_tokens_per_s=_rate(sum(sample.completion_tokens for sample in fine), span),
        slo=slo,
        good=good,
        good_share=good / len(samples) if samples else 0.0,
        goodput_per_s=_rate(good, span),
        loop_lag_ms=spread(lags_ms),
        late_ms=spread([sample.late_ms for sample in samples]),
    )


def spread(values: Sequence[float]) -> Spread | None:
    """None where there is nothing to describe."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, POINTS)
    return Spread(
        count=len(values),
        mean=float(np.mean(values)),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
    )


def _span(samples: Sequence[Sample]) -> float:
    if not samples:
        return 0.0
    return max(s.ended_s for s in samples) - min(s.sent_s for s in samples)


def _rate(count: int, span: float) -> float:
    return count / span if span > 0 else 0.0
