"""Attention by FlashInfer's paged kernels (0.6.14): tensor-core decode, FA3 prefill on Hopper.

The kernels read the page-major pool through strided views, one pair (keys, values) a layer; that
costs nothing beside a pool per layer (measurements.md section 1).
"""

import logging
from itertools import accumulate
from typing import Any

import torch

from engine.execution.forward_batch import ForwardBatch, ForwardMode
from engine.execution.page_table import PageTable, TableBuffers, host_int32, page_table
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import flashinfer_library
from engine.models.ops import FreshKV

_WORKSPACE_BYTES = 384 * 2**20
"""Partial results of split sequences; the library suggests 128 MiB, too little for a full chunk of
queries with many heads."""

_HOPPER = 9

_INTERNALS_KNOWN_OF = "0.6.14"
"""Of the library, whose decode wrapper has no public way to keep a page table in one place but its
mode for graphs (see WholeRequestsGraphAttention)."""

logger = logging.getLogger(__name__)


class FlashInferAttention:
    """`AttentionBackend` on CUDA, for bfloat16 and float16."""

    name = "flashinfer"

    def __init__(self, config: ModelConfig, kv_pool: PageMajorKVPool) -> None:
        library = flashinfer_library()
        self._config = config
        self._pool = kv_pool
        views = [kv_pool.layer(index) for index in range(kv_pool.num_layers)]
        self._layers = [(view[:, 0], view[:, 1]) for view in views]
        # Zeroed: the library asks for it at first use. Wrappers never run at once, so they share
        # it.
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=kv_pool.device)
        hopper = torch.cuda.get_device_capability(kv_pool.device)[0] == _HOPPER
        # The FA3 kernels take queries and KV of one dtype only.
        backend = "fa3" if hopper and not kv_pool.is_fp8 else "fa2"
        self._prefill: Any = library.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace, "NHD", backend=backend
        )
        # From float8 pages attention would read rounded keys, from the step itself exact ones.
        self._fresh: Any = None
        if not kv_pool.is_fp8:
            self._fresh = library.BatchPrefillWithRaggedKVCacheWrapper(
                self.workspace, "NHD", backend=backend
            )
        self._decode: Any = library.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._cuts = (0, 0)
        """Tokens of the planned step: up to the first, prompts that read cached KV; up to the
        second, prompts that are all there is of their request; the tokens after them decode."""
        self._planned: dict[int, torch.cuda.Event] = {}
        version = getattr(library, "__version__", "of no known version")
        self._whole_requests = version == _INTERNALS_KNOWN_OF
        if not self._whole_requests:
            logger.warning(
                "FlashInfer is %s; where its decode wrapper keeps a page table is known of %s "
                "only: captured decode steps of many requests write and merge partial results, "
                "which takes them a few percent longer",
                version,
                _INTERNALS_KNOWN_OF,
            )

    def plan(self, batch: ForwardBatch) -> None:
        pages = page_table(batch, self._pool.page_size)
        prompts = num_prompts(batch)
        cached = prompts if self._fresh is None else num_cached(batch, prompts)
        lengths = batch.extend_lens[:prompts]
        self._cuts = (sum(lengths[:cached]), sum(lengths))
        causal = {"head_dim_qk": self._config.head_dim, "causal": True}
        if cached:
            queries = host_int32([0, *accumulate(lengths[:cached])])
            arrays = _arrays(pages.first(cached))
            self._plan(self._prefill, queries, *arrays, page_size=self._pool.page_size, **causal)
        if cached < prompts:
            tokens = host_int32([0, *accumulate(lengths[cached:])])
            self._plan(self._fresh, tokens, tokens, **causal)
        if prompts < len(batch.extend_lens):
            self.plan_decode(self._decode, pages.after(prompts))

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        cached, prompts = self._cuts
        pages = self._layers[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if cached:
            self._prefill.run(q[:cached], pages, out=out[:cached])
        if cached < prompts:
            span = slice(cached, prompts)
            self._fresh.run(q[span], fresh.keys[span], fresh.values[span], out=out[span])
        if prompts < q.shape[0]:
            self._decode.run(q[prompts:], pages, out=out[prompts:])
        return out.view(out.shape[0], -1)

    def for_graph(self, buffers: TableBuffers, rows: int) -> "FlashInferGraphAttention":
        """Decode of `rows` requests, whose plan lies at fixed addresses."""
        # The library cuts requests into parts until there are two programs for each multiprocessor:
        # with so many requests none, however long it is.
        device = torch.cuda.get_device_properties(self._pool.device)
        none_is_split = rows * self._config.num_kv_heads > 2 * device.multi_processor_count
        if none_is_split and self._whole_requests:
            return WholeRequestsGraphAttention(self, buffers, rows)
        return FlashInferGraphAttention(self, buffers, rows)

    def plan_decode(self, wrapper: Any, pages: PageTable, **settings: Any) -> None:
        """Plans any decode wrapper: one query token a request."""
        shape = {"head_dim": self._config.head_dim, "page_size": self._pool.page_size}
        self._plan(wrapper, *_arrays(pages), **shape, **settings)

    def run_with(self, wrapper: Any, layer: int, q: torch.Tensor) -> torch.Tensor:
        """`run` with a wrapper of the caller's."""
        out: torch.Tensor = wrapper.run(q, self._layers[layer])
        return out.view(out.shape[0], -1)

    def _plan(self, wrapper: Any, *arrays: torch.Tensor, **settings: Any) -> None:
        # A wrapper stages its plan in a pinned buffer of its own and copies it asynchronously. The
        # copy runs ahead of its step's kernels, so this wait is for the past, not for the device.
        planned = self._planned.get(id(wrapper))
        if planned is None:
            planned = self._planned[id(wrapper)] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        planned.synchronize()
        wrapper.plan(
            *arrays,
            num_qo_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            q_data_type=self._pool.compute_dtype,
            kv_data_type=self._pool.dtype,
            **settings,
        )
        planned.record()


class FlashInferGraphAttention:
    """One captured batch size's attention: `plan` before each replay."""

    def __init__(self, shared: FlashInferAttention, buffers: TableBuffers, rows: int) -> None:
        self._shared = shared
        self._wrapper: Any = flashinfer_library().BatchDecodeWithPagedKVCacheWrapper(
            shared.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=buffers.indptr[: rows + 1],
            paged_kv_indices_buffer=buffers.indices,
            paged_kv_last_page_len_buffer=buffers.last_page_len[:rows],
            backend="fa2",
        )

    def plan(self, pages: PageTable) -> None:
        """`pages` lists as many requests as were captured, each with one new token."""
        self._shared.plan_decode(self._wrapper, pages)

    def run(self, layer: int, q: torch.Tensor, fresh: FreshKV) -> torch.Tensor:
        return self._shared.run_with(self._wrapper, layer, q)


class WholeRequestsGraphAttention(FlashInferGraphAttention):
    """As FlashInferGraphAttention, for so many requests that none is split.

    In its mode for graphs the library writes partial results in float32 and merges them in a kernel
    of its own even then. In its other mode a plan for whole requests has one program for each of
    them, whatever their lengths, so it is as fit for a graph; only its page table has to be kept at
    addresses that stay. The library keeps what it is given on the device, but of the two arrays
    that a plan is made from it must be given the host's: so its own fields are set, for which it
    has to be the version that was read.
    """

    def __init__(self, shared: FlashInferAttention, buffers: TableBuffers, rows: int) -> None:
        self._shared = shared
        self._buffers = buffers
        self._rows = rows
        self._wrapper: Any = flashinfer_library().BatchDecodeWithPagedKVCacheWrapper(
            shared.workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._queries = torch.arange(rows + 1, dtype=torch.int32, device=buffers.indptr.device)

    def plan(self, pages: PageTable) -> None:
        buffers, wrapper = self._buffers, self._wrapper
        indices = buffers.indices[: pages.indices.shape[0]].copy_(pages.indices)
        kept = PageTable(pages.indptr, indices, pages.last_page_len)
        self._shared.plan_decode(wrapper, kept, disable_split_kv=True)
        indptr, last_page_len = (
            buffers.indptr[: self._rows + 1],
            buffers.last_page_len[: self._rows],
        )
        wrapper._paged_kv_indptr_buf = indptr.copy_(wrapper._paged_kv_indptr_buf)
        wrapper._paged_kv_last_page_len_buf = last_page_len.copy_(
            wrapper._paged_kv_last_page_len_buf
        )
        wrapper._paged_kv_indices_buf = buffers.indices
        wrapper._qo_indptr_buf = self._queries


def num_prompts(batch: ForwardBatch) -> int:
    """Requests at the batch's beginning that go through the prefill kernels.

    In a mixed step those who decode stand last; through prefill's kernels each would take a tile of
    128 queries for its one, and the step longer than prefill and decode apart.
    """
    if batch.forward_mode.is_decode():
        return 0
    count = len(batch.extend_lens)
    if batch.forward_mode is ForwardMode.MIXED:
        while count and batch.extend_lens[count - 1] == 1:
            count -= 1
    return count


def num_cached(batch: ForwardBatch, prompts: int) -> int:
    """Of the first `prompts` requests, those up to the last that has KV from before this step."""
    while prompts and batch.extend_prefix_lens[prompts - 1] == 0:
        prompts -= 1
    return prompts


def _arrays(pages: PageTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pages.indptr, pages.indices, pages.last_page_len
