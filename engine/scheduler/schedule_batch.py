"""A batch of requests and its device tensors (seed section "ScheduleBatch").

A decode step must cost the host little: the tensors stay on the device and advance by one, and are
cut or joined only when members leave or come. The host's truth is in each `Req` (pages, lengths);
nothing is ever read back from the device here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import EngineError
from engine.execution.device import moved, to_device
from engine.execution.forward_batch import ForwardBatch, ForwardMode, PromptTargets
from engine.memory.req_to_token import page_slots
from engine.scheduler.batch_memory import BatchMemory
from engine.scheduler.decode_mixin import ScheduleBatchDisaggregationDecodeMixin
from engine.scheduler.logprobs import prompt_targets
from engine.scheduler.req import Req
from engine.scheduler.sampling_state import SamplingState


def _empty() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(eq=False, kw_only=True)
class ScheduleBatch(BatchMemory, ScheduleBatchDisaggregationDecodeMixin):
    """`b` requests; `t` input tokens of the step being prepared."""

    vocab_size: int = 0
    """Width of the logits; requests with penalties count tokens in rows of it."""
    is_hybrid: bool = False
    """Layers with pools of their own (sliding windows); one pool for all so far."""
    model_config: object | None = None
    """For models whose batches depend on it; none so far."""
    enable_overlap: bool = False
    """Results are handled while the next step runs."""
    batch_is_full: bool = False
    """No request may join; recomputed in every pass (latching it froze servers: sglang#35537)."""
    is_prefill_only: bool = False
    """Its requests have no decode step here."""
    chunked_req: Req | None = None
    """The request of this batch whose prompt goes on in a later one."""

    input_ids: torch.Tensor = field(default_factory=_empty)
    """[t] int64."""
    input_embeds: torch.Tensor | None = None
    """[t, hidden] float32."""
    positions: torch.Tensor = field(default_factory=_empty)
    """[t] int64."""
    req_pool_indices: torch.Tensor = field(default_factory=_empty)
    """[b] int64."""
    seq_lens: torch.Tensor = field(default_factory=_empty)
    """[b] int64; a new tensor each step, since a launched step may still read the old one."""
    out_cache_loc: torch.Tensor = field(default_factory=_empty)
    """[t] int64."""
    output_ids: torch.Tensor = field(default_factory=_empty)
    """[b] int64; tokens drawn last, the inputs of the next decode step."""
    last_loc: torch.Tensor = field(default_factory=_empty)
    """[b] int64; slot of each request's last token with KV."""
    multimodal_inputs: list[object] | None = None
    seq_lens_sum: int = 0
    orig_seq_lens: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[b] int32; the length before any cut: prompt + output as far as known."""
    prefix_lens: list[int] = field(default_factory=list)
    extend_lens: list[int] = field(default_factory=list)
    extend_num_tokens: int = 0
    extend_logprob_start_lens: list[int] = field(default_factory=list)
    prebuilt_rows: list[int] = field(default_factory=list)
    """Of requests that come by transfer, while they are described: their rows."""
    num_decode_rows: int = 0
    """Of a MIXED batch: its last rows, which come from the running batch."""
    sampling: SamplingState | None = None
    _endings_seen: int = field(default=0, init=False)
    _steps_left: int = field(default=0, init=False)
    """See `drop_ended`; 0: not known."""
    prompt_targets: PromptTargets | None = None
    """Prompt tokens that this step judges, where somebody asked."""

    @property
    def return_logprob(self) -> bool:
        return any(
            req.sampling_params.wants_logprobs or req.wants_prompt_logprobs for req in self.reqs
        )

    @property
    def num_input_tokens(self) -> int:
        """Of the step that was prepared."""
        return self.extend_num_tokens if self.forward_mode.is_extend() else len(self.reqs)

    # ---- preparing a step

    def prepare_for_extend(self) -> None:
        """Rows, pages and tensors for the extends that `init_next_round_input` and the adder have
        described. Raises `OutOfMemoryError` if the adder promised what is not there.
        """
        self.forward_mode = ForwardMode.EXTEND
        self.prefix_lens = [req.prefix_len for req in self.reqs]
        self.extend_lens = [req.extend_input_len for req in self.reqs]
        self.extend_num_tokens = sum(self.extend_lens)
        self.extend_logprob_start_lens = [0] * len(self.reqs)
        ends = [p + e for p, e in zip(self.prefix_lens, self.extend_lens, strict=True)]

        self.require_pages(
            sum(
                -(-end // self.page_size) - len(req.pages)
                for req, end in zip(self.reqs, ends, strict=True)
            )
        )
        newcomers = [req for req in self.reqs if req.req_pool_idx is None]
        row_of = dict(zip(newcomers, self.alloc_req_slots(len(newcomers)), strict=True))
        input_ids: list[int] = []
        slots_of_inputs: list[torch.Tensor] = []
        for req, prefix, end in zip(self.reqs, self.prefix_lens, ends, strict=True):
            missing = end - len(req.pages) * self.page_size
            if missing > 0:
                last_page = req.pages[-1] if req.pages else None
                req.pages.extend(self.alloc_token_slots(missing, after=last_page))
            written = prefix  # what the row holds already
            if req.req_pool_idx is None:
                req.req_pool_idx, written = row_of[req], 0
            slots = page_slots(req.pages, self.page_size, written, end)
            self.req_to_token_pool.write(req.req_pool_idx, written, slots)
            slots_of_inputs.append(slots[prefix - written :])
            input_ids.extend(req.input_ids(prefix, end))
            req.kv_committed_len = end

        self.describe_rows([r.req_pool_idx for r in self.reqs if r.req_pool_idx is not None], ends)
        self.input_ids = to_device(input_ids, self.device)
        self.output_ids = self.input_ids[:0]  # nothing is drawn yet
        positions = [torch.arange(p, e) for p, e in zip(self.prefix_lens, ends, strict=True)]
        self.positions = moved(torch.cat(positions), self.device)
        self.out_cache_loc = moved(torch.cat(slots_of_inputs), self.device)
        last_slots = torch.stack([slots[-1] for slots in slots_of_inputs])
        self.last_loc = moved(last_slots, self.device)
        self.sampling = SamplingState.of(self.reqs, self.device, vocab_size=self.vocab_size)
        self.prompt_targets = prompt_targets(
            self.reqs, self.prefix_lens, self.extend_lens, self.device
        )

    def describe_rows(self, rows: Sequence[int], seq_lens: list[int]) -> None:
        self.req_pool_indices = to_device(rows, self.device)
        self.seq_lens = to_device(seq_lens, self.device)
        lengths = [req.seqlen for req in self.reqs]
        self.orig_seq_lens = to_device(lengths, self.device, torch.int32)
        self.seq_lens_sum = sum(seq_lens)

    def prepare_for_split_prefill(self) -> None:
        """Marks a prepared extend to be executed a few layers at a time."""
        self.forward_mode = ForwardMode.SPLIT_PREFILL

    def prepare_for_decode(self) -> None:
        """One more token a request: its input is the token drawn last. Raises `OutOfMemoryError`
        unless `check_decode_mem` holds.
        """
        self.forward_mode = ForwardMode.DECODE
        page_size = self.page_size
        growing = self.rows_that_need_a_page()
        loc = self.last_loc + 1
        if growing:
            pages = self.alloc_token_slots(len(growing) * page_size)
            for i, page in zip(growing, pages, strict=True):
                self.reqs[i].pages.append(page)
            loc[to_device(growing, self.device)] = to_device(pages, self.device) * page_size
        self.out_cache_loc = self.last_loc = loc
        self.req_to_token_pool.write_each(self.req_pool_indices, self.seq_lens, loc)
        self.input_ids = self.output_ids
        if self.sampling is not None:
            self.sampling.count(self.output_ids)
        self.prompt_targets = None
        self.positions = self.seq_lens
        self.seq_lens = self.seq_lens + 1
        self.orig_seq_lens = self.orig_seq_lens + 1
        self.seq_lens_sum += len(self.reqs)
        self._growing = None
        self._steps_left -= 1
        now = time.monotonic()
        for req in self.reqs:
            req.kv_committed_len += 1
            if req.t_first_decode == 0.0:
                req.t_first_decode = now

    def mix_with_running(self, running_batch: ScheduleBatch) -> None:
        """Takes a prepared decode batch into this prepared extend: each of its rows becomes an
        extend of one token after what is committed.
        """
        running_bs = running_batch.batch_size()
        prefix_lens = [req.kv_committed_len - 1 for req in running_batch.reqs]
        for req, prefix in zip(running_batch.reqs, prefix_lens, strict=True):
            req.prefix_len, req.extend_input_len = prefix, 1
        # Joined before the batches merge: merging drops both sides' inputs.
        input_ids = torch.cat([self.input_ids, running_batch.input_ids])
        out_cache_loc = torch.cat([self.out_cache_loc, running_batch.out_cache_loc])
        positions = torch.cat([self.positions, running_batch.positions])
        self.merge_batch(running_batch)
        self.forward_mode = ForwardMode.MIXED
        self.num_decode_rows = running_bs
        self.output_ids = self.input_ids[:0]
        self.input_ids, self.out_cache_loc, self.positions = input_ids, out_cache_loc, positions
        self.prefix_lens.extend(prefix_lens)
        self.extend_lens.extend([1] * running_bs)
        self.extend_num_tokens += running_bs
        self.extend_logprob_start_lens.extend([0] * running_bs)

    def to_forward_batch(self, tokens_known: Callable[[], None] | None = None) -> ForwardBatch:
        """The prepared step as the runner takes it. `tokens_known`: see `SamplingState.at`."""
        if self.sampling is None:
            raise EngineError("a batch must be prepared before it runs")
        seq_lens = [req.kv_committed_len for req in self.reqs]
        decode = self.forward_mode.is_decode()
        return ForwardBatch(
            forward_mode=self.forward_mode,
            input_ids=self.input_ids,
            positions=self.positions,
            out_cache_loc=self.out_cache_loc,
            req_pool_indices=self.req_pool_indices,
            seq_lens=self.seq_lens,
            seq_lens_cpu=seq_lens,
            extend_prefix_lens=[n - 1 for n in seq_lens] if decode else list(self.prefix_lens),
            extend_lens=[1] * len(seq_lens) if decode else list(self.extend_lens),
            req_to_token=self.req_to_token_pool.req_to_token,
            # The token drawn follows all those with KV, so its position is their number.
            sampling=self.sampling.at(self.seq_lens, tokens_known),
            prompt_targets=self.prompt_targets,
            pages=[req.pages for req in self.reqs],
        )

    # ---- members

    def drop_ended(self, num_endings: int) -> None:
        """`filter_batch()` of a batch that decodes, at no cost while nobody can have ended:
        `num_endings` counts the requests of the engine that ever did, and nobody reaches its length
        within `_steps_left` steps.
        """
        if num_endings == self._endings_seen and self._steps_left > 0:
            return
        self.filter_batch()
        self._endings_seen = num_endings
        self._steps_left = min(
            (req.max_new_tokens - len(req.output_ids) - req.in_flight for req in self.reqs),
            default=0,
        )

    def filter_batch(
        self,
        chunked_req_to_exclude: Collection[Req] = (),
        keep_indices: list[int] | None = None,
    ) -> None:
        """Drops requests that take no further step and those to exclude, or all but
        `keep_indices`."""
        if keep_indices is None:
            # `takes_no_step`, written out: a call a row would cost a pass half of its time.
            keep_indices = [
                i
                for i, req in enumerate(self.reqs)
                if req.finish_reason is None
                and len(req.output_ids) + req.in_flight < req.max_new_tokens
                and req not in chunked_req_to_exclude
            ]
        if len(keep_indices) == len(self.reqs):
            return
        self._growing = self._growth = None
        keep = to_device(keep_indices, self.device)
        self.reqs = [self.reqs[i] for i in keep_indices]
        self.req_pool_indices = self.req_pool_indices[keep]
        self.seq_lens = self.seq_lens[keep]
        self.orig_seq_lens = self.orig_seq_lens[keep]
        self.last_loc = self.last_loc[keep]
        self.output_ids = self.output_ids[keep]
        self.seq_lens_sum = sum(req.kv_committed_len for req in self.reqs)
        if self.sampling is not None:
            self.sampling = self.sampling.filter(keep_indices, keep)

    def merge_batch(self, other: ScheduleBatch) -> None:
        """Appends the members of `other`, which must not be used afterwards."""
        self.reqs = self.reqs + other.reqs
        self._growing = self._growth = None
        self._steps_left = 0
        self.req_pool_indices = torch.cat([self.req_pool_indices, other.req_pool_indices])
        self.seq_lens = torch.cat([self.seq_lens, other.seq_lens])
        self.orig_seq_lens = torch.cat([self.orig_seq_lens, other.orig_seq_lens])
        self.last_loc = torch.cat([self.last_loc, other.last_loc])
        self.output_ids = torch.cat([self.output_ids, other.output_ids])
        self.seq_lens_sum += other.seq_lens_sum
        if self.sampling is None:
            self.sampling = other.sampling
        elif other.sampling is not None:
            self.sampling = self.sampling.merge(other.sampling)
