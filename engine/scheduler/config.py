"""Settings of the scheduler."""

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import ConfigError

CLIP_MAX_NEW_TOKENS = 4096
"""Tokens: an estimate of memory never counts more future output for one request than this, or a
generous max_tokens would keep everybody else out (scheduling.md section 3)."""


SchedulePolicyName = Literal["fcfs", "lpm", "dfs-weight", "lof", "random"]
"""Orders of the waiting queue (scheduling.md section 6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler may take in one pass, and how much it keeps in reserve."""

    page_size: int
    """Tokens a KV page; must be the allocator's."""

    context_length: int
    """Longest prompt + output in tokens; a request that reaches it finishes with `length`."""

    vocab_size: int
    """Token ids of a prompt must be below this."""

    chunked_prefill_size: int | None = 8192
    """Most prompt tokens of one request in one step, at least a page; None computes prompts whole.
    Smaller chunks shorten the pause of running requests, larger ones use the device better."""

    max_prefill_tokens: int = 16384
    """Most prompt tokens in one step over all requests. Tokens."""

    max_running_requests: int = 256
    """Most requests in one decode batch."""

    max_queued_requests: int = 4096
    """Most requests that wait; one more is refused."""

    enable_mixed_chunk: bool = False
    """Run one-token rows of running requests in the same step as a prompt's chunk."""

    schedule_conservativeness: float = 1.0
    """Scales how much of each request's possible output is counted as needed; above 0. Larger
    means fewer retractions and smaller batches."""

    enable_overlap: bool = False
    """Launch each step before the results of the step before are handled, so that the host works
    while the device computes (scheduling.md section 7). The same outputs either way; off by default
    since a device that is the host (CPU) gains nothing."""

    split_prefill_layers: int = 0
    """Layers of a prompt's step that run before others get a turn: running requests decode between
    the parts (and are not mixed in, whatever `enable_mixed_chunk` says), and finished layers can
    leave early. 0 runs all layers at once."""

    decode_reserve_tokens: int = 512
    """R of scheduling.md section 5: tokens a running request may still grow, as far as admission
    of new tickets is concerned. Too large a one halves throughput (sglang#6860)."""

    truncation_align_size: int | None = None
    """Chunks end at multiples of this many tokens as well, where a deterministic kernel asks."""

    schedule_policy: SchedulePolicyName = "fcfs"
    """Which waiting request goes first: the oldest (fcfs), the one with the longest cached prefix
    (lpm), those that share a cached prefix together (dfs-weight), the one with the longest output
    (lof), or any (random). Policies other than fcfs trade fairness for throughput."""

    schedule_seed: int = 0
    """What the random policy draws from, so that a run can be repeated."""

    enable_priority_scheduling: bool = False
    """Smaller `Req.priority` goes first, the policy orders equals; off, no priority counts."""

    priority_preemption_threshold: int = 10
    """A waiting request may send a running one back to the queue whose priority is larger by more
    than this; at least 0. Small differences order the queue but do not undo work."""

    max_loras_per_batch: int = 8
    """Most adapters among the requests that are computed together: their weights' slots."""

    lora_ids: tuple[str, ...] = ()
    """Adapters that this engine has; a request for another one is refused by name."""

    def __post_init__(self) -> None:
        for name in ("page_size", "context_length", "vocab_size", "max_prefill_tokens",
                     "max_running_requests", "max_queued_requests",
                     "max_loras_per_batch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.chunked_prefill_size is not None and self.chunked_prefill_size < self.page_size:
            raise ConfigError(
                f"chunked_prefill_size ({self.chunked_prefill_size}) must hold a page "
                f"({self.page_size} tokens), or no chunk could ever end"
            )
        if self.max_prefill_tokens < self.page_size:
            raise ConfigError(
                f"max_prefill_tokens ({self.max_prefill_tokens}) must hold a page "
                f"({self.page_size} tokens)"
            )
        if self.schedule_conservativeness <= 0:
            raise ConfigError(
                f"schedule_conservativeness must be above 0, not {self.schedule_conservativeness}"
            )
        if self.priority_preemption_threshold < 0:
            raise ConfigError(
                "priority_preemption_threshold must be at least 0, not "
                f"{self.priority_preemption_threshold}"
            )
        if self.schedule_policy not in get_args(SchedulePolicyName):
            raise ConfigError(
                f"schedule_policy must be one of {', '.join(get_args(SchedulePolicyName))}, not "
                f"{self.schedule_policy!r}"
            )
        if self.split_prefill_layers < 0:
            raise ConfigError(
                f"split_prefill_layers must not be negative, not {self.split_prefill_layers}"
            )
        if self.decode_reserve_tokens < 1:
            raise ConfigError(
                f"decode_reserve_tokens must be at least 1, not {self.decode_reserve_tokens}"
            )
        if self.truncation_align_size is not None and (
            self.truncation_align_size < 1
            or (self.chunked_prefill_size or self.truncation_align_size)
            < self.truncation_align_size
        ):
            raise ConfigError(
                f"truncation_align_size ({self.truncation_align_size}) must be at least 1 and at "
                "most chunked_prefill_size"
            )
