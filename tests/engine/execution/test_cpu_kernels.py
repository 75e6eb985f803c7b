"""The compiled steps of a CPU equal plain torch's; where they cannot be had torch takes over."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from engine.execution.attention import create_attention
from engine.execution.compiled_attention import CompiledAttention, can_attend
from engine.execution.torch_attention import TorchAttention
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.cpu_library import CpuLibrary, cpu_library
from engine.models.cpu_ops import CpuOps
from engine.models.ops import FreshKV, TorchOps
from engine.models.packed_weights import is_packed, pack, unpack
from engine.models.rope import RopeConfig, cos_sin_table
from native.library import keep_builds_in
from tests.checkpoints import random_prompt
from tests.engine.execution.harness import Harness

POSITIONS, PAGE, HEADS, KV_HEADS = 700, 16, 6, 2
UNUSED = FreshKV(torch.empty(0), torch.empty(0))  # a CPU reads the pool

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): plain torch is all there is"
)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.param)


def compiled() -> CpuLibrary:
    library = cpu_library()
    assert library is not None, "cc is there, so that the library can be built"
    return library


def pool_of(head_dim: int, *, page_size: int = PAGE, pages: int = 96) -> PageMajorKVPool:
    return PageMajorKVPool(
        num_pages=pages,
        page_size=page_size,
        num_layers=3,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def ops_of(head_dim: int) -> tuple[TorchOps, CpuOps]:
    table = cos_sin_table(RopeConfig(theta=1e4), head_dim, POSITIONS, torch.device("cpu"))
    return TorchOps(table), CpuOps(table, compiled())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("width", [320, 37])
def test_norms_and_activations_equal_plain_torch(rows: int, width: int) -> None:
    torch.manual_seed(rows)
    plain, ours = ops_of(16)
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    torch.testing.assert_close(ours.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    expected = plain.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(
        ours.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5), expected
    )
    gate_up = 30 * torch.randn(rows, 2 * width)
    gate_up[0, 0], gate_up[0, 1] = 200.0, -200.0
    torch.testing.assert_close(ours.silu_and_mul(gate_up), plain.silu_and_mul(gate_up))


def matrix(outputs: int, inputs: int, *, narrow: bool) -> torch.Tensor:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return weight.bfloat16().float() if narrow else weight


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16 numbers", "float32"])
def test_a_matrix_is_packed_without_loss_and_as_narrow_as_that_allows(narrow: bool) -> None:
    weight = matrix(96, 21, narrow=narrow)
    packed = pack(weight)
    assert packed.dtype is (torch.bfloat16 if narrow else torch.float32)
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(unpack(pack(weight.t().contiguous().t())), weight), "input-major in memory"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16 numbers", "float32"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1536, 96), (80, 896), (48, 12001), (40, 96)])
def test_products_equal_plain_torch_in_any_number_of_rows(
    outputs: int, inputs: int, narrow: bool
) -> None:
    torch.manual_seed(outputs)
    plain, ours = ops_of(16)
    weight, bias = matrix(outputs, inputs, narrow=narrow), torch.randn(outputs)
    packed = pack(weight)
    assert is_packed(packed) is (outputs % 16 == 0)
    for rows in (*range(1, 14), 16, 64, 700):
        x = torch.randn(rows, inputs)
        for shift in (None, bias):
            torch.testing.assert_close(
                ours.linear(x, packed, shift), plain.linear(x, weight, shift), rtol=1e-4, atol=1e-5
            )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16 numbers", "float32"])
def test_a_row_of_a_product_is_the_same_to_the_bit_whatever_is_beside_it(narrow: bool) -> None:
    torch.manual_seed(0)
    ops, packed = ops_of(16)[1], pack(matrix(336, 320, narrow=narrow))
    x = torch.randn(300, 320)
    together = ops.linear(x, packed)
    for first in (0, 7, 298):
        for count in range(1, 14):
            rows = slice(first, first + count)
            assert torch.equal(ops.linear(x[rows], packed), together[rows])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_rotating_and_storing_equals_plain_torch(tokens: int, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    plain, ours = ops_of(head_dim)
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, head_dim)
    positions = torch.randperm(POSITIONS)[:tokens]
    pools = [pool_of(head_dim), pool_of(head_dim)]
    rows = pools[0].rows(torch.randperm(96 * PAGE)[:tokens])
    rotated = [
        ops.rotate_and_store(qkv.clone(), HEADS, ops.rotation(positions), pool, 1, rows)
        for ops, pool in zip((plain, ours), pools, strict=True)
    ]
    (plain_queries, plain_kv), (queries, kv) = rotated
    torch.testing.assert_close(queries, plain_queries)
    torch.testing.assert_close(kv.keys, plain_kv.keys)
    torch.testing.assert_close(kv.values, plain_kv.values)
    torch.testing.assert_close(pools[1].data, pools[0].data)


def config_of(head_dim: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=64,
        hidden_size=HEADS * head_dim,
        intermediate_size=64,
        num_layers=3,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=head_dim,
        context_length=POSITIONS,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        eos_token_ids=(),
        checkpoint_dtype="",
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("page_size", [16, 5])
def test_attention_of_single_tokens_equals_plain_torch(head_dim: int, page_size: int) -> None:
    torch.manual_seed(head_dim)
    pool, config = pool_of(head_dim, page_size=page_size, pages=300), config_of(head_dim)
    pool.data.copy_(torch.randn(pool.data.shape))
    harness = Harness(pool)
    # Shorter than a page, at its end, just after, and much longer than the others.
    rows = [harness.row(random_prompt(length, seed=length)) for length in (2, 16, 17, 33, 400)]
    harness.extend(*((row, len(row.tokens) - 1) for row in rows))
    batch = harness.decode(*rows)
    q = 4 * torch.randn(len(rows), HEADS + 2 * KV_HEADS, head_dim)[:, :HEADS]
    plain = TorchAttention(config, pool)
    ours = CompiledAttention(config, pool, compiled())
    for backend in (plain, ours):
        backend.plan(batch)
    for layer in range(3):
        torch.testing.assert_close(
            ours.run(layer, q, UNUSED), plain.run(layer, q, UNUSED), rtol=1e-4, atol=1e-5
        )


def test_a_row_is_the_same_to_the_bit_alone_and_beside_others() -> None:
    torch.manual_seed(0)
    pool, config = pool_of(64), config_of(64)
    pool.data.copy_(torch.randn(pool.data.shape))
    harness = Harness(pool)
    rows = [harness.row(random_prompt(length, seed=length)) for length in (9, 100, 40)]
    harness.extend(*((row, len(row.tokens) - 1) for row in rows))
    q = torch.randn(3, HEADS, 64)
    backend = CompiledAttention(config, pool, compiled())
    backend.plan(harness.decode(*rows))
    together = backend.run(0, q, UNUSED)
    for index, row in enumerate(rows):
        row.computed -= 1
        backend.plan(harness.decode(row))
        assert torch.equal(backend.run(0, q[index : index + 1], UNUSED)[0], together[index])


def test_a_cpu_takes_it_for_float32_and_torch_by_name() -> None:
    pool, config = pool_of(16), config_of(16)
    assert create_attention(config, pool).name == "compiled"
    assert create_attention(config, pool, "torch").name == "torch"
    bfloat16 = PageMajorKVPool(
        num_pages=2, page_size=16, num_layers=1, num_kv_heads=1, head_dim=16,
        dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    assert not can_attend(config, bfloat16)


def test_without_a_compiler_that_works_torch_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "false")
    keep_builds_in(str(tmp_path))
    cpu_library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert create_attention(config_of(16), pool_of(16)).name == "torch"
        assert "plain torch" in caplog.text
    finally:
        keep_builds_in("")
        cpu_library.cache_clear()
