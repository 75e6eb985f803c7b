"""What the scheduler hands to the model runner for one step, and what comes back.

The scheduler and the runner meet only here: the scheduler never sees logits, the runner never
sees a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from engine.execution.logit_edits import LogitEdits


class ForwardMode(Enum):
    """What a batch does (scheduling.md section 4)."""

    EXTEND = auto()
    """Prompts, or chunks of prompts, after a cached prefix of any length."""
    DECODE = auto()
    """One new token for each request."""
    MIXED = auto()
    """EXTEND rows and one-token rows of running requests in one forward."""
    SPLIT_PREFILL = auto()
    """An EXTEND executed a few layers at a time."""
    PREBUILT = auto()
    """KV arrived by transfer: joins without a forward."""
    IDLE = auto()

    def is_extend(self) -> bool:
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.SPLIT_PREFILL)

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling parameters of a batch; `b` rows, device tensors unless said otherwise."""

    temperature: torch.Tensor
    """[b] float32; 0 is greedy."""
    top_p: torch.Tensor
    """[b] float32."""
    top_k: torch.Tensor
    """[b] int64; 0 keeps all."""
    seed: torch.Tensor
    """[b] int64; the unsigned 64-bit seed's bits."""
    position: torch.Tensor
    """[b] int64; absolute position (prompt + output) of the token to be drawn."""
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_logprobs: bool
    min_p: torch.Tensor | None = None
    """[b] float32, 0 keeps all; None: nobody asks."""
    edits: LogitEdits | None = None
    """What happens to the logits before a token is drawn; None: nothing."""
    top: "TopRows | None" = None
    """Who wants alternatives beside the token; None: nobody."""


@dataclass(frozen=True, slots=True)
class TopRows:
    """Requests that want the most likely tokens reported."""

    rows: list[int]
    """Their places in the batch, ascending."""
    rows_on_device: torch.Tensor
    """[r] int64, the same."""
    count: int
    """Alternatives for each: the most that one of them wants, at least 1."""


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """Prompt tokens of an extend whose log probabilities are wanted, request after request."""

    inputs: torch.Tensor
    """[n] int64; of the extend's t inputs, the one before each target: its logits judge it."""
    target_ids: torch.Tensor
    """[n] int64."""
    target_ids_cpu: list[int]
    """The same on the host."""
    counts: list[int]
    """[b]; targets of each request; sums to n."""
    top: int
    """Alternatives for each: the most that one of the requests wants; may be 0."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step. `t` input tokens of `b` requests, request after request."""

    forward_mode: ForwardMode
    input_ids: torch.Tensor
    """[t] int64."""
    positions: torch.Tensor
    """[t] int64; absolute positions of the input tokens."""
    out_cache_loc: torch.Tensor
    """[t] int64; token slot (page * page_size + offset) that receives each input token's KV."""
    req_pool_indices: torch.Tensor
    """[b] int64; rows of `req_to_token`."""
    seq_lens: torch.Tensor
    """[b] int64; tokens whose KV exists after this step (prefix + extend; for DECODE, all)."""
    seq_lens_cpu: list[int]
    """The same on the host."""
    extend_prefix_lens: list[int]
    """[b]; tokens whose KV existed before. For DECODE: seq_len - 1."""
    extend_lens: list[int]
    """[b]; input tokens of each request; sums to t. For DECODE: ones."""
    req_to_token: torch.Tensor
    """[rows, max_context] int32; token slot of each position of each row."""
    sampling: SamplingBatch
    prompt_targets: PromptTargets | None = None
    """None: nobody wants log probabilities of the prompt, or all were reported."""
    pages: Sequence[Sequence[int]] | None = None
    """[b]; each request's pages, on the host: what `req_to_token` says, too. None: only that."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of `n` tokens under the model's unmodified distributions, on the device."""

    chosen: torch.Tensor
    """[n] float32; of the tokens themselves."""
    top_ids: torch.Tensor
    """[n, k] int64; the most likely tokens, most likely first, ties by the lowest id."""
    top: torch.Tensor
    """[n, k] float32; theirs."""


class LayersDone(NamedTuple):
    """A point of a step: what it writes into the pool for its first `layers` layers is there."""

    layers: int
    passed: torch.cuda.Event | None
    """Recorded there; None: the step was computed while it was launched."""


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """One drawn token a request: after the last input token of each."""

    next_token_ids: torch.Tensor
    """[b] int64, on the device."""
    logprobs: torch.Tensor | None
    """[b] float32, on the device; None unless some request asked."""
    top: TokenLogprobs | None = None
    """Of the rows that `SamplingBatch.top` names, in that order."""
    prompt: TokenLogprobs | None = None
    """Of `ForwardBatch.prompt_targets`."""
    layers_done: tuple[LayersDone, ...] = ()
    """Ascending, up to the last layer; empty where the runner does not mark its layers."""

    def start_copy(self) -> "PendingResult":
        """Called once, right after the step was launched: everything is on its way to the host,
        behind the step and before anything launched later."""
        return HostCopy(self)


class PendingResult(Protocol):
    """A step's result on its way to the host."""

    def wait(self) -> ForwardResult:
        """The result with all tensors on the host. Waits for this step's end, and for nothing that
        was launched after it."""
        ...

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        ...


class HostCopy:
    """`PendingResult` of a step that ran on a stream, or on the host itself."""

    def __init__(self, result: ForwardResult) -> None:
        self._result = result
        self._copied: torch.cuda.Event | None = None
        if result.next_token_ids.is_cuda:
            self._result = ForwardResult(
                next_token_ids=_pinned(result.next_token_ids),
                logprobs=None if result.logprobs is None else _pinned(result.logprobs),
                top=None if result.top is None else _pinned_logprobs(result.top),
                prompt=None if result.prompt is None else _pinned_logprobs(result.prompt),
            )
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> ForwardResult:
        if self._copied is not None:
            self._copied.synchronize()
        return self._result

    def ready(self) -> bool:
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]


def _pinned(values: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which does not wait for the device."""
    target = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return target.copy_(values, non_blocking=True)


def _pinned_logprobs(values: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        chosen=_pinned(values.chosen), top_ids=_pinned(values.top_ids), top=_pinned(values.top)
    )


class BatchRunner(Protocol):
    """Computes a step; implemented by `ModelRunner` and, in tests, by a scripted stub."""

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        """Called by the scheduler, once a step, from its own thread only. Writes the KV of all
        input tokens at `out_cache_loc` in every layer, and draws one token a request. May return
        before the device is done, and may be called again then: steps run in the order of their
        launch. `ForwardResult.start_copy` tells when one has ended.
        """
        ...


@runtime_checkable
class SplitRunner(BatchRunner, Protocol):
    """A runner that can compute an extend a few layers at a time."""

    @property
    def num_layers(self) -> int: ...

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        """Layers `first_layer .. last_layer - 1` of `forward(batch)`; called in order, for one
        batch until its last layer or `drop_split`, with `forward` of others in between. Before the
        last layer nothing is drawn: `next_token_ids` is [0], and `start_copy` tells when the part
        has ended.
        """
        ...

    def drop_split(self) -> None:
        """The batch under way is not continued."""
        ...
