"""Attention by FlashInfer's paged kernels (0.6.14): tensor-core decode, FA3 prefill on Hopper.

The kernels read the page-major pool through strided views, one pair (keys, values) a layer; that
costs nothing beside a pool per layer (measurements.md section 1).
"""

from itertools import accumulate
from typing import Any

import torch

from engine.execution.forward_batch import ForwardBatch
from engine.execution.page_table import PageTable, TableBuffers, host_int32, page_table
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.fused_ops import flashinfer_library

_WORKSPACE_BYTES = 384 * 2**20
"""Partial results of split sequences; the library suggests 128 MiB, too little for a full chunk of
queries with many heads."""

_HOPPER = 9


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
        self._prefill: Any = library.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace, "NHD", backend="fa3" if hopper and not kv_pool.is_fp8 else "fa2"
        )
        self._decode: Any = library.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._wrapper: Any = self._decode
        self._planned = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def plan(self, batch: ForwardBatch) -> None:
        pages = page_table(batch, self._pool.page_size)
        if batch.forward_mode.is_decode():
            self._wrapper = self._decode
            self.plan_decode(self._decode, pages)
        else:
            self._wrapper = self._prefill
            queries = host_int32([0, *accumulate(batch.extend_lens)])
            head_dim = self._config.head_dim
            self._plan(self._prefill, queries, *_arrays(pages), head_dim_qk=head_dim, causal=True)

    def run(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self.run_with(self._wrapper, layer, q)

    def for_graph(self, buffers: TableBuffers, rows: int) -> "FlashInferGraphAttention":
        """Decode of `rows` requests, whose plan lies at fixed addresses."""
        return FlashInferGraphAttention(self, buffers, rows)

    def plan_decode(self, wrapper: Any, pages: PageTable) -> None:
        """Plans any decode wrapper: one query token a request."""
        self._plan(wrapper, *_arrays(pages), head_dim=self._config.head_dim)

    def run_with(self, wrapper: Any, layer: int, q: torch.Tensor) -> torch.Tensor:
        """`run` with a wrapper of the caller's."""
        out: torch.Tensor = wrapper.run(q, self._layers[layer])
        return out.view(out.shape[0], -1)

    def _plan(self, wrapper: Any, *arrays: torch.Tensor, **settings: Any) -> None:
        # A wrapper stages its plan in one pinned buffer and copies it asynchronously. The copy
        # runs ahead of its step's kernels, so this wait is for the past, not for the device.
        self._planned.synchronize()
        wrapper.plan(
            *arrays,
            num_qo_heads=self._config.num_heads,
            num_kv_heads=self._config.num_kv_heads,
            page_size=self._pool.page_size,
            q_data_type=self._pool.compute_dtype,
            kv_data_type=self._pool.dtype,
            **settings,
        )
        self._planned.record()


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

    def run(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        return self._shared.run_with(self._wrapper, layer, q)


def _arrays(pages: PageTable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pages.indptr, pages.indices, pages.last_page_len
