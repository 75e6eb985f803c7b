"""On a CUDA device: every backend and fused kernel against float32 on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.attention import create_attention, flashinfer_obstacle
from engine.execution.flashinfer_attention import (
    FlashInferAttention,
    WholeRequestsGraphAttention,
)
from engine.execution.model_runner import ModelRunner
from engine.execution.noise import gumbel_noise
from engine.execution.page_table import TableBuffers, page_table
from engine.execution.sampler import Sampler
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.blas_algorithms import blas_products
from engine.models.decoder import Decoder, load_decoder
from engine.models.few_rows import MOST_ROWS, few_rows_gated, few_rows_linear
from engine.models.float32_residual import add_rms_norm
from engine.models.fused_ops import FusedOps, flashinfer_installed
from engine.models.invariant_ops import InvariantOps
from engine.models.ops import FreshKV, TorchOps
from engine.models.products import GATED_TILES, LINEAR_TILES, Kind, Product
from engine.models.remembered_choices import keep_choices_in
from engine.models.rope import RopeConfig, cos_sin_table
from engine.models.rotary_store import rotate_and_store
from engine.models.single_row import single_row_linear
from tests.checkpoints import random_prompt, write_config
from tests.engine.execution.harness import Harness
from tests.engine.execution.test_logit_edits import everything
from tests.gpu_waits import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tiny_model(family: str, directory: Path) -> ModelConfig:
    """Its weights lie in `directory`."""
    from transformers import LlamaConfig, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,  # as the models in use: kernels of one shape are built once
        "max_position_embeddings": 1024,
        "eos_token_id": 0,
    }
    config = LlamaConfig(**shape) if family == "llama" else Qwen3Config(**shape)
    write_config(directory, config)
    return ModelConfig.from_directory(directory)


def run(decoder: Decoder, attention: str) -> list[torch.Tensor]:
    config = decoder.config
    pool = PageMajorKVPool(
        num_pages=64,
        page_size=16,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    backend = create_attention(config, pool, "torch" if attention == "torch" else "flashinfer")
    runner = ModelRunner(decoder, kv_pool=pool, attention=backend)
    harness = Harness(pool)
    a, b, c = (harness.row(random_prompt(length, seed=length)) for length in (200, 40, 30))
    steps = [
        harness.extend((a, 128), (b, 38), (c, 1)),
        harness.extend((a, 70), (c, 28)),
        harness.decode(c, a, b),
    ]
    return [runner.forward_logits(step).cpu() for step in steps]


@pytest.mark.parametrize("attention", ["torch", "flashinfer"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_in_bfloat16_are_close_to_the_reference(
    family: str, attention: str, tmp_path: Path
) -> None:
    parsed = tiny_model(family, tmp_path)

    def load(device: str, dtype: torch.dtype) -> Decoder:
        where = torch.device(device)
        return load_decoder(parsed, model_path=str(tmp_path), device=where, dtype=dtype)

    expected = run(load("cpu", torch.float32), "torch")
    decoder = load("cuda", torch.bfloat16)
    pool = PageMajorKVPool(
        num_pages=1,
        page_size=16,
        num_layers=1,
        num_kv_heads=1,
        head_dim=64,
        dtype=torch.bfloat16,
        device=decoder.device,
    )
    obstacle = flashinfer_obstacle(parsed, pool)
    if attention == "flashinfer" and obstacle:
        pytest.skip(obstacle)
    for actual, wanted in zip(run(decoder, attention), expected, strict=True):
        assert float((actual - wanted).norm() / wanted.norm()) < 3e-2


def test_sampling_noise_is_that_of_the_cpu() -> None:
    seed, position = torch.tensor([1, -5, 2**62]), torch.tensor([0, 7, 4096])
    expected = gumbel_noise(seed, position, 10_000)
    actual = gumbel_noise(seed.cuda(), position.cuda(), 10_000).cpu()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_draw_with_everything_waits_for_nothing_and_equals_the_cpu() -> None:
    on_cpu = Sampler().sample(*everything(torch.device("cpu")))
    logits, batch = everything(torch.device("cuda"))
    with no_waiting():
        result = Sampler().sample(logits, batch)
    assert result.next_token_ids.tolist() == on_cpu.next_token_ids.tolist()
    assert result.top is not None
    assert on_cpu.top is not None
    assert result.top.top_ids.tolist() == on_cpu.top.top_ids.tolist()


@pytest.mark.parametrize(("rows", "columns"), [(1, 320), (3, 4096), (300, 5000)])
def test_sum_and_norm_in_one_kernel_round_nothing_of_the_residual(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the first sum makes the residual float32, later ones work in place
        total = x.double() + residual.double()
        expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
        normed, residual = add_rms_norm(x.clone(), residual, weight, 1e-5)
        assert normed.dtype == torch.bfloat16
        assert residual.dtype == torch.float32
        torch.testing.assert_close(residual.double(), total, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(normed.double(), expected, atol=1e-2, rtol=8e-3)


@pytest.mark.parametrize("rows", [1, 2, 8, 70])
@pytest.mark.parametrize("deterministic", [False, True])
def test_logits_are_not_rounded_to_the_weights_dtype(rows: int, deterministic: bool) -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    table = cos_sin_table(RopeConfig(theta=10_000.0), 128, 64, torch.device("cuda"))
    ops = InvariantOps(table) if deterministic else FusedOps(table)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    expected = x.double() @ weight.double().t()
    room = torch.zeros(rows, 1000, device="cuda")
    for logits in (ops.logits(x, weight), ops.logits(x, weight, room), room):
        assert logits.dtype == torch.float32
        # bfloat16 alone would be off by 2e-3.
        assert float((logits.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_rotating_and_storing_in_one_kernel_equals_the_steps(tokens: int, page_size: int) -> None:
    heads, kv_heads, head_dim, layers = 12, 3, 128, 2
    device, dtype = torch.device("cuda"), torch.bfloat16

    def pool(where: torch.device, kind: torch.dtype) -> PageMajorKVPool:
        return PageMajorKVPool(
            num_pages=512 // page_size,
            page_size=page_size,
            num_layers=layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=kind,
            device=where,
        )

    table = cos_sin_table(RopeConfig(theta=10_000.0), head_dim, 1024, torch.device("cpu"))
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    positions = torch.randint(1024, (tokens,))
    slots = torch.randperm(512)[:tokens]
    expected, actual = pool(torch.device("cpu"), torch.float32), pool(device, dtype)
    plain = TorchOps(table)
    for layer in range(layers):
        rows = expected.rows(slots)
        rotation = plain.rotation(positions)
        q, fresh = plain.rotate_and_store(qkv.float(), heads, rotation, expected, layer, rows)
        fused = qkv.clone().cuda()
        rotate_and_store(fused, heads, positions.cuda(), table.cuda(), actual, layer, rows.cuda())
        whole = torch.cat((q, *fresh), dim=1)
        torch.testing.assert_close(fused.float().cpu(), whole, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(actual.data.float().cpu(), expected.data, atol=2e-2, rtol=2e-2)
    # Values are copied, not computed, and nothing else is touched.
    assert torch.equal(actual.data[:, :, 1].cpu(), expected.data[:, :, 1].to(dtype))


def test_whole_requests_of_mixed_lengths_equal_split_ones(tmp_path: Path) -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    torch.manual_seed(0)
    device, rows = torch.device("cuda"), 140
    config = tiny_model("llama", tmp_path)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    pool = PageMajorKVPool(
        num_pages=2500,
        page_size=16,
        num_layers=2,
        num_kv_heads=kv_heads,
        head_dim=128,
        dtype=torch.bfloat16,
        device=device,
    )
    pool.data.normal_()
    harness = Harness(pool, max_rows=rows)
    lengths = [1 + int(n) for n in torch.randint(1, 400, (rows,))]
    requests = [harness.row(random_prompt(n + 1, seed=n)) for n in lengths]
    harness.extend(*((row, n) for row, n in zip(requests, lengths, strict=True)))
    batch = harness.decode(*requests)
    split = create_attention(config, pool, "flashinfer")
    assert isinstance(split, FlashInferAttention)
    whole = split.for_graph(TableBuffers(rows, 2500, device), rows)
    assert isinstance(whole, WholeRequestsGraphAttention)
    q = torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16)
    fresh = FreshKV(q[:, :kv_heads], q[:, :kv_heads])  # a decode step reads the pool
    split.plan(batch)
    expected = split.run(1, q, fresh)
    whole.plan(page_table(batch, 16))
    torch.testing.assert_close(whole.run(1, q, fresh), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (4095, 320), (6144, 4096), (130, 14_336)])
def test_the_product_of_one_row_equals_float64(rows: int, columns: int, bias: bool) -> None:
    x = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    added = torch.randn(rows, device="cuda", dtype=torch.bfloat16) if bias else None
    actual = single_row_linear(x, weight, added).double()
    expected = x.double() @ weight.double().t()
    if added is not None:
        expected = expected + added.double()
    assert float((actual - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64])
def test_products_of_few_rows_equal_float64(rows: int, bias: bool) -> None:
    columns, depth = 512, 2048
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2 * columns, depth, device="cuda", dtype=torch.bfloat16) / 45
    added = torch.randn(2 * columns, device="cuda", dtype=torch.bfloat16) if bias else None
    expected = x.double() @ weight.double().t()
    if added is not None:
        expected = expected + added.double()
    gate, up = expected.chunk(2, dim=-1)
    gated = torch.nn.functional.silu(gate) * up
    for tiles in LINEAR_TILES:
        room = torch.full((rows, 2 * columns), torch.nan, device="cuda")
        few_rows_linear(x, weight, added, tiles, room)
        assert float((room.double() - expected).norm() / expected.norm()) < 1e-5, tiles
        actual = few_rows_linear(x, weight, added, tiles).double()
        assert float((actual - expected).norm() / expected.norm()) < 5e-3, tiles
    for tiles in GATED_TILES:
        actual = few_rows_gated(x, weight, added, tiles).double()
        assert float((actual - gated).norm() / gated.norm()) < 5e-3, tiles


def test_every_way_to_compute_a_product_is_right() -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    table = cos_sin_table(RopeConfig(theta=10_000.0), 128, 64, torch.device("cuda"))
    ops = FusedOps(table)
    weights = [torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    kinds: tuple[Kind, ...] = ("linear", "gated", "logits")
    for rows in (1, 8, 96):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        for kind in kinds:
            ways = ops.products.ways(kind, rows, weights[0])
            assert {"library", "algorithm 0", "algorithm 1"} <= ways.keys()
            assert any(name.startswith("few rows") for name in ways) == (rows <= MOST_ROWS)
            full = x.double() @ weights[0].double().t()
            if kind == "gated":
                gate, up = full.chunk(2, dim=-1)
                full = torch.nn.functional.silu(gate) * up
            for name, way in ways.items():
                room = torch.empty(rows, 1024, device="cuda") if kind == "logits" else None
                got = way(x, weights[0], None, room).double()
                bound = 1e-5 if kind == "logits" else 8e-3
                assert float((got - full).norm() / full.norm()) < bound, (rows, kind, name)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_an_algorithm_serves_other_numbers_of_rows_than_it_was_asked_for(
    out_dtype: torch.dtype,
) -> None:
    weight = torch.randn(1536, 1024, device="cuda", dtype=torch.bfloat16)
    products = blas_products(2048, weight, out_dtype)
    assert len(products) > 1
    served = 0
    for rows in (2048, 1025, 1999):
        x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        expected = x.double() @ weight.double().t()
        for product in products:
            out = torch.full((rows, 1536), torch.nan, device="cuda", dtype=out_dtype)
            if product(x, weight, out):
                served += 1
                error = float((out.double() - expected).norm() / expected.norm())
                assert error < (8e-3 if out_dtype is torch.bfloat16 else 1e-5), rows
    assert served > len(products), "at least some are not for one number of rows alone"
    aside = torch.randn(2048 * 1024 + 8, device="cuda", dtype=torch.bfloat16)[8:].view(2048, 1024)
    assert not products[0](aside, weight, torch.empty(2048, 1536, device="cuda", dtype=out_dtype))


def test_prompts_of_any_length_are_right_with_products_as_measured() -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    table = cos_sin_table(RopeConfig(theta=10_000.0), 128, 64, torch.device("cuda"))
    ops = FusedOps(table)
    weight = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16) / 32
    for name in [n for n in ops.products.ways("linear", 2048, weight) if n != "library"]:
        for kind in ("linear", "gated"):
            product = Product("p", kind, [weight])  # type: ignore[arg-type]
            ops.products._take([product], 2048, {"p": name})
        for rows in (1025, 1500, 2048):
            x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
            full = x.double() @ weight.double().t()
            got = ops.linear(x, weight).double()
            assert float((got - full).norm() / full.norm()) < 8e-3, (name, rows)
            gate, up = full.chunk(2, dim=-1)
            full = torch.nn.functional.silu(gate) * up
            got = ops.gated_linear(x, weight).double()
            assert float((got - full).norm() / full.norm()) < 1e-2, (name, rows)


def test_a_prompts_product_is_added_to_the_residual_in_float32() -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    table = cos_sin_table(RopeConfig(theta=10_000.0), 128, 64, torch.device("cuda"))
    ops = FusedOps(table)
    weight = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16) / 32
    gain = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    ways = ops.products.ways("onto", 2048, weight)
    assert len(ways) > 1
    for name in ways:
        ops.products._take([Product("p", "onto", [weight])], 2048, {"p": name})
        for rows in (1025, 1500, 2048):
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
                residual = torch.randn(rows, 2048, device="cuda").to(dtype)
                full = residual.double() + x.double() @ weight.double().t()
                hidden, total = ops.linear_onto(residual, x, weight)
                assert hidden is None
                assert total.dtype is torch.float32
                assert float((total.double() - full).norm() / full.norm()) < 1e-5, (name, rows)
                normed = ops.rms_norm(total, gain, 1e-5)
                full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-5) * gain
                assert normed.dtype is torch.bfloat16
                assert float((normed.double() - full).norm() / full.norm()) < 5e-3
    hidden, _ = ops.linear_onto(torch.randn(8, 2048, device="cuda"), x[:8], weight)
    assert hidden is not None


def test_a_start_measures_what_the_last_one_did_not(tmp_path: Path) -> None:
    if not flashinfer_installed():
        pytest.skip("flashinfer-python is not installed")
    config = tiny_model("llama", tmp_path)
    decoder = load_decoder(
        config, model_path=str(tmp_path), device=torch.device("cuda"), dtype=torch.bfloat16
    )
    buffer = torch.ones(8, device="cuda")
    ran: list[int] = []

    def layers(rows: int) -> Callable[[], object]:
        ran.append(rows)
        return buffer.zero_

    keep_choices_in(str(tmp_path / "kernels"))
    try:
        first = decoder.choose_products([1, 8], layers)
        assert [line.partition(":")[0] for line in first] == [
            *("qkv", "o", "gate_up", "down", "logits")
        ]
        assert set(ran) == {1, 8}
        ran.clear()
        assert decoder.choose_products([1, 8], layers) == first
        assert ran == []
        prompts = decoder.choose_prompt_products(2048)
        assert [line.partition(":")[0] for line in prompts] == [
            *("qkv", "o onto the residual", "gate_up", "down onto the residual")
        ]
        assert decoder.choose_prompt_products(2048) == prompts
        decoder.choose_products([1, 8, 16], layers)
        assert set(ran) == {16}
    finally:
        keep_choices_in("")
