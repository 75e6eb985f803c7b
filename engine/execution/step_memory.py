"""What the largest steps need of a GPU, found by running them before the KV pool takes the rest.

Activations depend on the model's shapes, on the kernels and on how torch's allocator cuts its
blocks; no formula holds for long. A forward of the largest batch that settings allow tells it, down
to the sampler. It reads and writes one page only, however long its requests are: what is computed
is nonsense, what is allocated is not.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.execution.decode_graphs import ladder
from engine.execution.forward_batch import (
    ForwardBatch,
    ForwardMode,
    ForwardResult,
    PromptTargets,
    SamplingBatch,
    TopRows,
)
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig

GRAPH_BYTES = 16 << 20
"""Of the driver, for one captured step of some 400 kernels; an upper bound, stated at start beside
what the capture took."""

_TOP = 20
"""Alternatives a token: as many as any request may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestStep:
    """The most that settings let one step compute."""

    tokens: int
    """Input tokens."""
    rows: int
    """Requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """What must stay free, or is taken, beside weights and KV pool. Bytes."""

    activations: int = 0
    workspace: int = 0
    """Attention's, taken once."""
    graphs: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.workspace + self.graphs


class Runner(Protocol):
    """What is measured."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def kv_pool(self) -> PageMajorKVPool: ...

    def forward(self, batch: ForwardBatch) -> ForwardResult: ...


class Meter(Protocol):
    """Counts what is allocated beside what was there."""

    def begin(self) -> None: ...

    def peak_bytes(self) -> int:
        """The most since `begin`."""
        ...


class CudaMeter:
    """`Meter` of torch's allocator: of whole blocks, so that what is lost between them counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._before


def peak_activations(runner: Runner, largest: LargestStep, meter: Meter) -> int:
    """Bytes that the largest steps of `runner` allocate: a prompt's chunk, the same with log
    probabilities of the prompt, a decode step; every row asks for all that a sampler does."""
    tokens, rows = largest.tokens, largest.rows
    context = runner.model_config.context_length
    prompts = min(max(-(-tokens // context), min(rows, tokens // runner.kv_pool.page_size)), tokens)
    lengths = [min(context, tokens // prompts + (n < tokens % prompts)) for n in range(prompts)]
    batches = [
        step_of(runner, [1] * rows, ForwardMode.DECODE),
        step_of(runner, lengths, ForwardMode.EXTEND),
        step_of(runner, lengths, ForwardMode.EXTEND, judged=True),
    ]
    runner.forward(batches[0])  # libraries take workspaces of their own at first use, and keep them
    meter.begin()
    for batch in batches:
        runner.forward(batch)
    return meter.peak_bytes()


def graphs_bytes(config: ModelConfig, *, max_batch: int, page_size: int) -> int:
    """Of captured decode steps: logits and page tables, which all sizes share, and the driver's.
    Activations of a decode step are few beside a chunk's, and not counted twice."""
    if not max_batch:
        return 0
    logits = max_batch * config.vocab_size * torch.float32.itemsize
    tables = max_batch * -(-config.context_length // page_size) * torch.int32.itemsize
    return logits + tables + GRAPH_BYTES * len(ladder(max_batch))


def step_of(
    runner: Runner, lengths: list[int], mode: ForwardMode, *, judged: bool = False
) -> ForwardBatch:
    """A step of prompts of these lengths, all of whose KV lies in the pool's first page."""
    device, page_size = runner.kv_pool.device, runner.kv_pool.page_size
    rows, tokens = len(lengths), sum(lengths)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    table = torch.arange(max(lengths), dtype=torch.int32, device=device) % page_size
    targets = None
    if judged:
        every = torch.arange(tokens, device=device)
        targets = PromptTargets(
            inputs=every,
            target_ids=torch.zeros_like(every),
            target_ids_cpu=[0] * tokens,
            counts=lengths,
            top=_TOP,
        )
    return ForwardBatch(
        forward_mode=mode,
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=positions,
        out_cache_loc=positions % page_size,
        req_pool_indices=torch.arange(rows, device=device),
        seq_lens=torch.tensor(lengths, device=device),
        seq_lens_cpu=lengths,
        extend_prefix_lens=[0] * rows,
        extend_lens=lengths,
        req_to_token=table.expand(rows, -1),
        sampling=_everything(rows, device),
        prompt_targets=targets,
    )


def _everything(rows: int, device: torch.device) -> SamplingBatch:
    ones = torch.ones(rows, dtype=torch.int64, device=device)
    return SamplingBatch(
        temperature=ones.float(),
        top_p=ones * 0.9,
        top_k=ones * 40,
        seed=ones,
        position=ones,
        all_greedy=False,
        any_top_k=True,
        any_top_p=True,
        any_logprobs=True,
        min_p=ones * 0.01,
        top=TopRows(rows=list(range(rows)), rows_on_device=ones.cumsum(0) - 1, count=_TOP),
    )
