"""Decode steps as captured CUDA graphs, for a ladder of batch sizes.

A decode step of an 8B model is some 450 kernel launches; at small batches the host takes longer to
launch them than the GPU to run them. A graph replays them in one call. Shapes in a graph are fixed,
so a batch is padded to the next size of the ladder with rows that read and write the pool's
padding page only. Attention's plan is made outside the graph, into buffers at fixed addresses.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from engine.execution.attention import GraphableAttention, GraphAttention
from engine.execution.decode_inputs import DecodeInputs
from engine.execution.forward_batch import ForwardBatch
from engine.execution.page_table import PageTable, host_int32
from engine.execution.progress import progress_bar
from engine.memory.kv_pool import PageMajorKVPool
from engine.models.decoder import Decoder

_WARM_UP_RUNS = 2
"""Before a capture, so that libraries build, tune and allocate outside it."""


_MEASURED_LAYERS = 8
"""In which the ways to compute a product are compared: enough that no cache holds their weights."""

_MEASURED_CONTEXT = 1024
"""Tokens of the requests in them: beside an attention that reads nothing, other products win."""


def ladder(max_batch: int) -> list[int]:
    """Batch sizes to capture: dense where padding would cost most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_batch + 32, 32)]
    return sorted({min(size, max_batch) for size in sizes})


class DecodeGraphs:
    """Captures at construction; afterwards `forward_logits` replays."""

    def __init__(
        self,
        decoder: Decoder,
        kv_pool: PageMajorKVPool,
        attention: GraphableAttention,
        *,
        max_batch: int,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`progress` is told, line by line, how far the capture is."""
        device = kv_pool.device
        self._decoder = decoder
        self._pool = kv_pool
        self._sizes = ladder(max_batch)
        largest = self._sizes[-1]
        # Requests that share a prefix list its pages once each, so the pool's size is no bound.
        pages = largest * -(-decoder.config.context_length // kv_pool.page_size)
        self._inputs = DecodeInputs(largest, pages, kv_pool)
        # One for all sizes, as only one graph runs at a time: of its own each would take half a MiB
        # a row for a vocabulary of 128,256.
        self._logits = torch.empty(
            (largest, decoder.config.vocab_size), dtype=torch.float32, device=device
        )
        memory: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, _Graph] = {}
        attentions = {size: attention.for_graph(self._inputs.tables, size) for size in self._sizes}
        self._choose_products(attentions, progress)
        # From large to small, so that the smaller ones reuse the largest one's memory.
        for done, size in enumerate(reversed(self._sizes)):
            progress(progress_bar("capturing decode graphs", done, len(self._sizes)))
            graph_attention = attentions[size]
            graph_attention.plan(self._inputs.padding(size))
            self._graphs[size] = _Graph(
                graph_attention, *capture(self._step(size, graph_attention), memory)
            )

        progress(progress_bar("capturing decode graphs", len(self._sizes), len(self._sizes)))

    def can_run(self, batch: ForwardBatch) -> bool:
        return batch.forward_mode.is_decode() and len(batch.seq_lens_cpu) <= self._sizes[-1]

    def forward_logits(self, batch: ForwardBatch) -> torch.Tensor:
        """As ModelRunner.forward_logits. The result is overwritten by the next call."""
        count = len(batch.seq_lens_cpu)
        size = self._sizes[bisect_left(self._sizes, count)]
        graph = self._graphs[size]
        graph.attention.plan(self._inputs.write(batch, size))
        graph.replay()
        return graph.logits[:count]

    def release(self) -> None:
        """No step is replayed any more."""
        torch.cuda.synchronize(self._pool.device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._sizes = [0]

    def _step(self, size: int, attention: GraphAttention) -> Callable[[], torch.Tensor]:
        inputs = self._inputs

        def step() -> torch.Tensor:
            hidden = self._decoder.forward(
                inputs.input_ids[:size],
                inputs.positions[:size],
                self._pool.rows(inputs.out_cache_loc[:size]),
                self._pool,
                attention,
                None,
            )
            return self._decoder.logits(hidden, self._logits[:size])

        return step

    def _choose_products(
        self, attentions: dict[int, GraphAttention], progress: Callable[[str], None]
    ) -> None:
        def layers(size: int) -> Callable[[], object]:
            attentions[size].plan(self._usual(size))
            return lambda: self._layers(size, attentions[size])

        def report(done: int) -> None:
            progress(progress_bar("measuring products", done, len(self._sizes)))

        for line in self._decoder.choose_products(self._sizes, layers, report):
            progress(f"products by rows, {line}")

    def _layers(self, size: int, attention: GraphAttention) -> None:
        """A step's first layers, and its logits."""
        decoder, inputs = self._decoder, self._inputs
        state = decoder.run_layers(
            range(min(_MEASURED_LAYERS, decoder.config.num_layers)),
            decoder.embed(inputs.input_ids[:size]),
            inputs.positions[:size],
            self._pool.rows(inputs.out_cache_loc[:size]),
            self._pool,
            attention,
        )
        decoder.logits(decoder.hidden_states(state), self._logits[:size])

    def _usual(self, rows: int) -> PageTable:
        """Requests of a usual length, with whatever the pool's pages hold."""
        page_size, num_pages = self._pool.page_size, self._pool.num_pages
        length = min(_MEASURED_CONTEXT, self._decoder.config.context_length)
        pages = -(-length // page_size)
        indices = torch.arange(rows * pages, device=self._pool.device) % num_pages
        return PageTable(
            indptr=host_int32([row * pages for row in range(rows + 1)]),
            indices=indices.to(torch.int32),
            last_page_len=host_int32([(length - 1) % page_size + 1] * rows),
        )


class _Graph:
    """A captured step and the tensor that it leaves its logits in."""

    __slots__ = ("attention", "logits", "replay", "reset")

    def __init__(
        self,
        attention: GraphAttention,
        captured: torch.cuda.CUDAGraph,
        logits: torch.Tensor,
    ) -> None:
        self.attention = attention
        self.replay: Callable[[], None] = captured.replay
        self.reset: Callable[[], None] = captured.reset
        self.logits = logits


def capture(
    step: Callable[[], torch.Tensor], memory: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """(the graph, the step's output, which each replay overwrites)."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_RUNS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on calling CUDA (NCCL's watchdog does, where several ranks capture).
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        output = step()
    return graph, output
