"""Attention backends: which is taken, how rows are grouped, what FlashInfer is told."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.execution import attention as attention_module
from engine.execution import decode_graphs, flashinfer_attention
from engine.execution.attention import AttentionBackend, create_attention
from engine.execution.decode_graphs import DecodeGraphs
from engine.execution.flashinfer_attention import (
    FlashInferAttention,
    FlashInferGraphAttention,
    WholeRequestsGraphAttention,
)
from engine.execution.forward_batch import ForwardMode
from engine.execution.model_runner import ModelRunner
from engine.execution.page_table import page_table
from engine.execution.torch_attention import TorchAttention
from tests.checkpoints import random_prompt
from tests.engine.execution.conftest import PAGE_SIZE
from tests.engine.execution.harness import Harness

MakeRunner = Callable[[str], ModelRunner]


def test_flashinfer_by_name_on_a_cpu_is_a_config_error(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    with pytest.raises(ConfigError, match="the device is cpu"):
        create_attention(model.model_config, model.kv_pool, "flashinfer")


def test_flashinfer_is_refused_for_what_its_kernels_lack(
    runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner("llama-gqa")
    pool = SimpleNamespace(device=torch.device("cuda", 0), compute_dtype=torch.float32)

    def obstacle(dtype: torch.dtype) -> str:
        pool.compute_dtype = dtype
        return attention_module.flashinfer_obstacle(model.model_config, pool)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "flashinfer_installed", lambda: False)
    assert "not installed" in obstacle(torch.bfloat16)
    monkeypatch.setattr(attention_module, "flashinfer_installed", lambda: True)
    assert "float32" in obstacle(torch.float32)
    assert "head_dim of 16" in obstacle(torch.bfloat16)


def test_decode_rows_of_similar_length_share_a_call(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    backend = TorchAttention(model.model_config, model.kv_pool)
    harness = Harness(model.kv_pool)
    rows = [harness.row(random_prompt(length, seed=1)) for length in (500, 9, 300, 20, 120, 70)]
    harness.extend(*((row, len(row.tokens) - 1) for row in rows))
    backend.plan(harness.decode(*rows))
    widths = [group.blocks.shape[-1] for group in backend._singles]
    members = [group.tokens.tolist() for group in backend._singles if group.tokens is not None]
    assert widths == [32, 8, 2]
    assert members == [[0, 2], [4, 5], [1, 3]]


@pytest.mark.parametrize("known", [False, True])
def test_a_page_table_lists_each_requests_pages_in_order(runner: MakeRunner, known: bool) -> None:
    harness = Harness(runner("llama-gqa").kv_pool)
    rows = [harness.row(random_prompt(length, seed=1)) for length in (PAGE_SIZE, 40, 1)]
    batch = harness.extend(*((row, len(row.tokens)) for row in rows))
    if known:  # with pages to come, which this step does not reach
        batch = replace(batch, pages=[[*row.pages, 99] for row in rows])
    table = page_table(batch, PAGE_SIZE)
    assert table.indptr.tolist() == [0, 1, 4, 5]
    assert table.last_page_len.tolist() == [PAGE_SIZE, 40 - 2 * PAGE_SIZE, 1]
    assert table.indices.tolist() == [page for row in rows for page in row.pages]
    assert table.indices.dtype == table.indptr.dtype == torch.int32


class FakeWrapper:
    """A paged attention wrapper with FlashInfer's parameters, in the slowest of ways."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **kwargs: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        self.plans = 0
        self._rows: list[tuple[int, int, list[int], int]] = []

    def _plan(self, qo: list[int], indptr: Any, indices: Any, last: Any, page_size: int) -> None:
        self.plans += 1
        self._rows = []
        for row, (first, end) in enumerate(pairwise(indptr)):
            pages = indices[first:end].tolist()
            length = (len(pages) - 1) * page_size + int(last[row])
            self._rows.append((qo[row], qo[row + 1], pages, length))

    def run(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert q.shape[0] == self._rows[-1][1]
        out = torch.empty(q.shape) if out is None else out
        for start, end, pages, length in self._rows:
            k, v = (cache[pages].flatten(0, 1)[:length] for cache in kv)
            out[start:end] = causal_attention(q[start:end], k, v)
        return out


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of one request's last tokens."""
    (count, heads, head_dim), length = q.shape, k.shape[0]
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim)
    hidden = torch.ones(count, length).triu(length - count + 1).bool()
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


class FakePrefill(FakeWrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        q_data_type: str = "float16",
        kv_data_type: str | None = None,
    ) -> None:
        assert causal
        self._plan(
            qo_indptr.tolist(),
            paged_kv_indptr.tolist(),
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
        )


class FakeRagged:
    """Attention over keys and values that are given, request after request."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **kwargs: Any) -> None:
        assert kv_layout == "NHD"
        self.plans = 0
        self._starts: list[int] = []

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        causal: bool = False,
        q_data_type: str = "float16",
        kv_data_type: str | None = None,
    ) -> None:
        assert causal
        assert torch.equal(qo_indptr, kv_indptr)
        self.plans += 1
        self._starts = qo_indptr.tolist()

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        assert q.shape[0] == k.shape[0] == v.shape[0] == self._starts[-1]
        for start, end in pairwise(self._starts):
            out[start:end] = causal_attention(q[start:end], k[start:end], v[start:end])
        return out


class FakeDecode(FakeWrapper):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: str = "float16",
        kv_data_type: str | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        if disable_split_kv:  # as the library keeps them outside its mode for graphs
            self._paged_kv_indptr_buf = indptr.clone()
            self._paged_kv_last_page_len_buf = last_page_len.clone()
        rows = list(range(len(last_page_len) + 1))
        self._plan(rows, indptr.tolist(), indices, last_page_len, page_size)


class FakeGraphDecode(FakeDecode):
    def __init__(
        self,
        workspace: torch.Tensor,
        kv_layout: str,
        *,
        paged_kv_indptr_buffer: torch.Tensor,
        paged_kv_indices_buffer: torch.Tensor,
        paged_kv_last_page_len_buffer: torch.Tensor,
        **settings: Any,
    ) -> None:
        super().__init__(workspace, kv_layout)
        rows = paged_kv_last_page_len_buffer.shape[0]
        assert paged_kv_indptr_buffer.shape[0] == rows + 1
        self._limits = (rows, paged_kv_indices_buffer.shape[0])

    def _plan(self, qo: list[int], indptr: Any, indices: Any, last: Any, page_size: int) -> None:
        assert len(last) == self._limits[0]
        assert len(indices) <= self._limits[1]
        super()._plan(qo, indptr, indices, last, page_size)


def fake_decode(*arguments: Any, use_cuda_graph: bool = False, **settings: Any) -> FakeDecode:
    kind = FakeGraphDecode if use_cuda_graph else FakeDecode
    return kind(*arguments, **settings)


def run_again(step: Callable[[], torch.Tensor], memory: Any) -> tuple[Any, torch.Tensor]:
    """A capture without CUDA: replaying computes the step anew, into the same tensor."""
    output = step()
    graph = SimpleNamespace(replay=lambda: output.copy_(step()), reset=lambda: None)
    return graph, output


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    library = SimpleNamespace(
        __version__="0.6.14",
        BatchPrefillWithPagedKVCacheWrapper=FakePrefill,
        BatchPrefillWithRaggedKVCacheWrapper=FakeRagged,
        BatchDecodeWithPagedKVCacheWrapper=fake_decode,
    )
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(flashinfer_attention, "flashinfer_library", lambda: library)
    monkeypatch.setattr(decode_graphs, "capture", run_again)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(flashinfer_attention, "_WORKSPACE_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    use_processors(monkeypatch, 132)
    return library


def use_processors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    gpu = SimpleNamespace(multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


@pytest.mark.usefixtures("fake_flashinfer")
def test_flashinfer_is_told_the_same_story_as_torch(runner: MakeRunner) -> None:
    model = runner("llama-gqa")
    backends: list[AttentionBackend] = [
        TorchAttention(model.model_config, model.kv_pool),
        FlashInferAttention(model.model_config, model.kv_pool),
    ]
    outcomes = []
    for backend in backends:
        harness = Harness(model.kv_pool)
        a, b, c, d = (harness.row(random_prompt(length, seed=length)) for length in (61, 40, 31, 5))
        model.attention = backend
        steps = [
            harness.extend((a, 40), (b, 16)),
            harness.extend((a, 18), (c, 29)),
            harness.decode(a, c),
            harness.extend((b, 14), (a, 1), (c, 1), mode=ForwardMode.MIXED),
            harness.extend((b, 1), (a, 1), mode=ForwardMode.MIXED),
            harness.extend((b, 1), (d, 1)),
        ]
        outcomes.append([model.forward_logits(step) for step in steps])
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    # In a mixed step those who decode go through decode's kernels, whoever has a token to compute
    # in a prompt's step through prefill's: from its pages where it had some before the step.
    flashinfer = backends[1]
    assert isinstance(flashinfer, FlashInferAttention)
    assert (flashinfer._prefill.plans, flashinfer._decode.plans) == (3, 3)
    assert flashinfer._fresh.plans == 3


@pytest.mark.parametrize(
    ("max_batch", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_the_ladder_ends_at_the_largest_batch(max_batch: int, expected: list[int]) -> None:
    assert decode_graphs.ladder(max_batch) == expected


def test_a_long_ladder_is_dense_at_small_batches() -> None:
    sizes = decode_graphs.ladder(256)
    assert sizes[0] == 1
    assert sizes[-1] == 256
    assert all(b - a <= max(2, a) for a, b in pairwise(sizes))


@pytest.mark.usefixtures("fake_flashinfer")
@pytest.mark.parametrize(
    ("processors", "kinds"),
    [
        (132, {FlashInferGraphAttention}),
        (2, {FlashInferGraphAttention, WholeRequestsGraphAttention}),
    ],
)
def test_padded_decode_steps_equal_plain_ones(
    runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, processors: int, kinds: set[type]
) -> None:
    use_processors(monkeypatch, processors)
    model = runner("llama-gqa")
    attention = FlashInferAttention(model.model_config, model.kv_pool)
    with torch.no_grad():
        graphs = DecodeGraphs(model.decoder, model.kv_pool, attention, max_batch=6)
    assert {type(graph.attention) for graph in graphs._graphs.values()} == kinds
    padded = ModelRunner(
        model.decoder, kv_pool=model.kv_pool, attention=attention, decode_graphs=graphs
    )
    harness = Harness(model.kv_pool)
    rows = [harness.row(random_prompt(length, seed=length)) for length in (33, 5, 17, 20, 64)]
    model.forward_logits(harness.extend(*((row, len(row.tokens) - 3) for row in rows)))
    for count in (5, 3, 1):
        step = harness.decode(*rows[:count])
        expected = model.forward_logits(step)
        torch.testing.assert_close(padded.forward_logits(step), expected, atol=1e-4, rtol=0)
    assert not graphs.can_run(harness.extend((rows[4], 2)))


def test_a_flashinfer_whose_internals_are_not_known_is_used_as_it_documents(
    runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
    fake_flashinfer: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_processors(monkeypatch, 2)
    fake_flashinfer.__version__ = "0.7.0"
    model = runner("llama-gqa")
    attention = FlashInferAttention(model.model_config, model.kv_pool)
    with torch.no_grad():
        graphs = DecodeGraphs(model.decoder, model.kv_pool, attention, max_batch=6)
    kinds = {type(graph.attention) for graph in graphs._graphs.values()}
    assert kinds == {FlashInferGraphAttention}
    assert "FlashInfer is 0.7.0" in caplog.text
