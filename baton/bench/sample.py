"""One request as its client saw it."""

import itertools
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Sample:
    """Times are seconds from the start of the run."""

    index: int
    planned_s: float
    """When an open loop wanted to send it; in a closed loop, when it was sent."""

    sent_s: float
    input_length: int
    output_length: int
    """Tokens asked for."""

    arrivals_s: list[float] = field(default_factory=list)
    """One a token; tokens of one message came at the same time."""

    ended_s: float = 0.0
    completion_tokens: int = 0
    phases_ms: dict[str, float] = field(default_factory=dict)
    """What a Baton router reports; empty for others."""

    kv_bytes: int = 0
    transport: str = ""
    error: str = ""
    """Kind of error; empty: it succeeded."""

    detail: str = ""
    """The error's own words."""

    @property
    def ttft_ms(self) -> float:
        """Time to first token; only where one came."""
        return (self.arrivals_s[0] - self.sent_s) * 1e3

    @property
    def itl_ms(self) -> list[float]:
        """Inter-token latencies; the first of them is the handover."""
        return [(later - at) * 1e3 for at, later in itertools.pairwise(self.arrivals_s)]

    @property
    def handover_ms(self) -> float | None:
        """From the first token, prefill's, to the second, decode's; None: there was no second."""
        if len(self.arrivals_s) < 2:
            return None
        return (self.arrivals_s[1] - self.arrivals_s[0]) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None: there was only one."""
        if self.completion_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) * 1e3 / (self.completion_tokens - 1)

    @property
    def e2e_ms(self) -> float:
        return (self.ended_s - self.sent_s) * 1e3

    @property
    def late_ms(self) -> float:
        """How much later than planned it was sent."""
        return max(0.0, self.sent_s - self.planned_s) * 1e3
