"""One step on every rank: the leading one decides, the others compute along.

Only rank 0 has a scheduler. It has prepared a step as a `ForwardBatch` anyway, so what the others
need is that description and nothing of how it came about: no request, no clock, no random choice
and no sampler can come to differ between them. The host's lists go through a channel; what lies on
the device (token ids, which the step before may not have drawn yet, and the page table) goes from
device to device, in order with the steps, so that steps overlap as on one device. Tokens are drawn
on rank 0 from the gathered logits, and reach the others as the next step's inputs.
"""

from collections.abc import Callable

import torch

from engine.execution.device import to_device
from engine.execution.forward_batch import (
    ForwardBatch,
    ForwardResult,
    PromptTargets,
    SamplingBatch,
)
from engine.execution.model_runner import ModelRunner
from engine.execution.page_table import page_table
from engine.parallel.commands import StepCommand, StepKind
from engine.parallel.group import TensorGroup


class LeadingRunner:
    """`BatchRunner` and `SplitRunner` of rank 0: tells the others, then computes."""

    def __init__(
        self, runner: ModelRunner, group: TensorGroup, tell: Callable[[bytes], None]
    ) -> None:
        """`tell` passes one command to every other rank, in order, without waiting for them."""
        self._runner = runner
        self._group = group
        self._tell = tell

    @property
    def num_layers(self) -> int:
        return self._runner.num_layers

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        self._lead(batch, StepKind.FORWARD)
        return self._runner.forward(batch)

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        self._lead(batch, StepKind.FORWARD_SPLIT, first_layer, last_layer)
        return self._runner.forward_split(batch, first_layer, last_layer)

    def drop_split(self) -> None:
        self._tell(StepCommand(kind=StepKind.DROP_SPLIT).to_bytes())
        self._runner.drop_split()

    def _lead(
        self, batch: ForwardBatch, kind: StepKind, first_layer: int = 0, last_layer: int = 0
    ) -> None:
        targets = batch.prompt_targets
        command = StepCommand(
            kind=kind,
            mode=batch.forward_mode,
            first_layer=first_layer,
            last_layer=last_layer,
            num_prompt_targets=-1 if targets is None else targets.inputs.shape[0],
            seq_lens=tuple(batch.seq_lens_cpu),
            extend_prefix_lens=tuple(batch.extend_prefix_lens),
            extend_lens=tuple(batch.extend_lens),
        )
        self._tell(command.to_bytes())
        pages = page_table(batch, self._runner.kv_pool.page_size).indices
        parts = [batch.input_ids, batch.positions, batch.out_cache_loc, pages.to(torch.int64)]
        if targets is not None:
            parts.append(targets.inputs)
        self._group.broadcast(torch.cat(parts))


class FollowingRunner:
    """Every other rank: computes what it is told, and draws nothing that counts."""

    def __init__(self, runner: ModelRunner, group: TensorGroup) -> None:
        self._runner = runner
        self._group = group
        self._device = runner.kv_pool.device

    def follow(self, command: StepCommand) -> None:
        """One command of `LeadingRunner`, in order."""
        if command.kind is StepKind.DROP_SPLIT:
            self._runner.drop_split()
            return
        batch = self._batch(command)
        if command.kind is StepKind.FORWARD:
            self._runner.forward(batch)
        else:
            self._runner.forward_split(batch, command.first_layer, command.last_layer)

    def _batch(self, command: StepCommand) -> ForwardBatch:
        page_size = self._runner.kv_pool.page_size
        tokens, rows = sum(command.extend_lens), len(command.seq_lens)
        counts = [-(-length // page_size) for length in command.seq_lens]
        targets = command.num_prompt_targets
        sizes = [tokens, tokens, tokens, sum(counts), max(targets, 0)]
        payload = torch.empty(sum(sizes), dtype=torch.int64, device=self._device)
        parts = self._group.broadcast(payload).split_with_sizes(sizes)
        input_ids, positions, out_cache_loc, pages, inputs = parts
        return ForwardBatch(
            forward_mode=command.mode,
            input_ids=input_ids,
            positions=positions,
            out_cache_loc=out_cache_loc,
            req_pool_indices=torch.arange(rows, device=self._device),
            seq_lens=to_device(command.seq_lens, self._device),
            seq_lens_cpu=list(command.seq_lens),
            extend_prefix_lens=list(command.extend_prefix_lens),
            extend_lens=list(command.extend_lens),
            req_to_token=self._table(pages, counts, page_size),
            sampling=_greedy(rows, self._device),
            prompt_targets=None if targets < 0 else _judged(inputs),
        )

    def _table(self, pages: torch.Tensor, counts: list[int], page_size: int) -> torch.Tensor:
        """The rows of the request-to-token table that this step reads."""
        owners = [row for row, count in enumerate(counts) for _ in range(count)]
        places = [place for count in counts for place in range(count)]
        shape = (len(counts), max(counts, default=0), page_size)
        table = torch.zeros(shape, dtype=torch.int32, device=self._device)
        offsets = torch.arange(page_size, device=self._device)
        slots = (pages[:, None] * page_size + offsets).to(torch.int32)
        table[to_device(owners, self._device), to_device(places, self._device)] = slots
        return table.view(len(counts), -1)


def _greedy(rows: int, device: torch.device) -> SamplingBatch:
    """Asks nothing of the sampler but its cheapest draw, which nobody reads."""
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    return SamplingBatch(
        temperature=zeros.float(),
        top_p=zeros.float(),
        top_k=zeros,
        seed=zeros,
        position=zeros,
        all_greedy=True,
        any_top_k=False,
        any_top_p=False,
        any_logprobs=False,
    )


def _judged(inputs: torch.Tensor) -> PromptTargets:
    """Prompt tokens whose logits all ranks compute together; the leading one alone reads them."""
    ids = torch.zeros_like(inputs)
    return PromptTargets(inputs=inputs, target_ids=ids, target_ids_cpu=[], counts=[], top=0)
