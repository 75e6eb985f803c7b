"""One engine on one device, without services: is it right, and how fast is it?

    python bench/gpu_engine_check.py --graphs             # a GPU, 8B-Llama shape, some minutes
    python bench/gpu_engine_check.py --device cpu --tiny  # the same in miniature, seconds

1. Logits of a two-layer model through every attention backend that the device offers, in the
   device's dtype, against float32 on the CPU: whole prompts, chunks, decode, mixed batches.
2. Decode: inter-token latency at a context of 1,024 tokens.
3. Prefill: tokens per second in chunks of 8,192.

Weights and KV are random, never zeros: zeros draw less power and run faster than real work.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from engine.execution.attention import create_attention, flashinfer_obstacle
from engine.execution.decode_graphs import DecodeGraphs
from engine.execution.device import resolve_device, resolve_dtype
from engine.execution.flashinfer_attention import FlashInferAttention
from engine.execution.forward_batch import ForwardBatch, ForwardMode, SamplingBatch
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.decoder import Decoder, load_decoder
from engine.models.rope import RopeConfig

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_context_length=8192),
    context_length=16_384,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(),
    checkpoint_dtype="bfloat16",
)
SMALL = replace(
    LLAMA_8B,
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    context_length=4096,
)
CHECKED = {
    "llama, 4 queries a KV head, head_dim 128": SMALL,
    "qwen3 with query and key norms, head_dim 64": replace(
        SMALL, family="qwen3", head_dim=64, qk_norm=True
    ),
    "qwen2 with biases, MHA": replace(SMALL, family="qwen2", num_kv_heads=8, qkv_bias=True),
}


@dataclass(frozen=True)
class Scale:
    """How large the measurements are."""

    model: ModelConfig
    page_size: int
    batches: tuple[int, ...]
    context: int
    decode_steps: int
    prefills: tuple[tuple[int, int], ...]
    """(requests, tokens each)."""
    chunk: int


FULL = Scale(LLAMA_8B, 64, (1, 8, 32, 64), 1024, 64, ((16, 4096), (64, 1024)), 8192)
TINY = Scale(replace(SMALL, hidden_size=256), 16, (1, 4), 64, 4, ((2, 128), (4, 64)), 128)


class Requests:
    """Rows with scattered pages, and the batches that advance them."""

    def __init__(self, pool: PageMajorKVPool, lengths: list[int], longest: int, vocab: int) -> None:
        self._pool = pool
        self._vocab = vocab
        self.lengths = list(lengths)
        pages = -(-longest // pool.page_size)
        if pages * len(lengths) > pool.num_pages:
            raise ValueError("the pool is too small for these requests")
        order = torch.randperm(pool.num_pages)[: pages * len(lengths)].view(len(lengths), pages)
        slots = order[:, :, None] * pool.page_size + torch.arange(pool.page_size)
        self._host = slots.view(len(lengths), -1)
        self._table = self._host.to(pool.device, torch.int32)

    def step(self, rows: list[int], counts: list[int], mode: ForwardMode) -> ForwardBatch:
        """The next `counts` random tokens of `rows`."""
        starts = [self.lengths[row] for row in rows]
        positions = [
            start + index for start, n in zip(starts, counts, strict=True) for index in range(n)
        ]
        slots = torch.cat(
            [
                self._host[row, start : start + n]
                for row, start, n in zip(rows, starts, counts, strict=True)
            ]
        )
        for row, n in zip(rows, counts, strict=True):
            self.lengths[row] += n
        seq_lens = [self.lengths[row] for row in rows]
        device = self._pool.device
        return ForwardBatch(
            forward_mode=mode,
            input_ids=torch.randint(self._vocab, (len(positions),)).to(device),
            positions=torch.tensor(positions, device=device),
            out_cache_loc=slots.to(device),
            req_pool_indices=torch.tensor(rows, device=device),
            seq_lens=torch.tensor(seq_lens, device=device),
            seq_lens_cpu=seq_lens,
            extend_prefix_lens=starts,
            extend_lens=counts,
            req_to_token=self._table,
            sampling=greedy(len(rows), device),
        )

    def decode(self) -> ForwardBatch:
        rows = list(range(len(self.lengths)))
        return self.step(rows, [1] * len(rows), ForwardMode.DECODE)


def greedy(count: int, device: torch.device) -> SamplingBatch:
    integers = torch.zeros(count, dtype=torch.int64, device=device)
    return SamplingBatch(
        temperature=torch.zeros(count, device=device),
        top_p=torch.ones(count, device=device),
        top_k=integers,
        seed=integers,
        position=integers,
        all_greedy=True,
        any_top_k=False,
        any_top_p=False,
        any_logprobs=False,
    )


# ---- right? --------------------------------------------------------------------------------------


def check(device: torch.device, dtype: torch.dtype, graphs: bool, head_dims: set[int]) -> bool:
    """Prints each backend's relative error of logits; True where all are small enough."""
    good = True
    print(f"\n1. logits on {device} in {dtype} against float32 on the CPU (relative error)")
    for label, config in CHECKED.items():
        if head_dims and config.head_dim not in head_dims:
            print(f"   {label:45} left out by --head-dims")
            continue
        reference = load_decoder(
            config,
            model_path="",
            device=torch.device("cpu"),
            dtype=torch.float32,
            load_format="dummy",
        )
        tested = load_decoder(
            config, model_path="", device=device, dtype=dtype, load_format="dummy"
        )
        copy_weights(reference, tested)
        expected = scenario_logits(reference, "torch")
        names = ["torch"]
        if not flashinfer_obstacle(config, small_pool(tested)):
            names += ["flashinfer", "graphs"] if graphs else ["flashinfer"]
        for name in names:
            actual = scenario_logits(tested, name)
            errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
            passed = max(errors) < (1e-4 if dtype == torch.float32 else 3e-2)
            good &= passed
            steps = "  ".join(f"{error:.1e}" for error in errors)
            print(f"   {label:45} {name:11} {steps}  {'ok' if passed else 'TOO LARGE'}")
    return good


def copy_weights(source: Decoder, target: Decoder) -> None:
    """Both get the same numbers, exact in the target's dtype."""
    targets = target.weights.destinations(target.config)
    for name, tensor in source.weights.destinations(source.config).items():
        tensor.copy_(tensor.to(target.dtype))
        targets[name].copy_(tensor)


def small_pool(decoder: Decoder) -> PageMajorKVPool:
    config = decoder.config
    return PageMajorKVPool(
        num_pages=128,
        page_size=16,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
    )


def scenario_logits(decoder: Decoder, attention: str) -> list[torch.Tensor]:
    """Logits of: ragged prompts, a chunk with prefix beside a fresh prompt, decode, mixed."""
    torch.manual_seed(1)
    pool = small_pool(decoder)
    backend = create_attention(
        decoder.config, pool, "torch" if attention == "torch" else "flashinfer"
    )
    graphs = None
    if attention == "graphs" and isinstance(backend, FlashInferAttention):
        graphs = DecodeGraphs(decoder, pool, backend, max_batch=6)
    runner = ModelRunner(decoder, kv_pool=pool, attention=backend, decode_graphs=graphs)
    requests = Requests(pool, [0] * 5, 400, decoder.config.vocab_size)
    steps = [
        requests.step([0, 1, 2], [1, 16, 300], ForwardMode.EXTEND),
        requests.step([2, 3], [64, 17], ForwardMode.EXTEND),
        requests.step([3, 0, 2, 1], [1, 1, 1, 1], ForwardMode.DECODE),
        requests.step([2, 4, 0], [1, 33, 1], ForwardMode.MIXED),
    ]
    return [runner.forward_logits(step).cpu() for step in steps]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


# ---- fast? ---------------------------------------------------------------------------------------


def measure(
    device: torch.device, dtype: torch.dtype, scale: Scale, graphs: bool
) -> dict[str, float]:
    requests = max(scale.batches)
    longest = scale.context + scale.decode_steps + 8
    tokens = max(
        requests * (longest + scale.page_size), *(n * length for n, length in scale.prefills)
    )
    runner = load_model_runner(
        scale.model,
        model_path="",
        device=device,
        dtype=dtype,
        page_size=scale.page_size,
        max_total_tokens=tokens,
        load_format="dummy",
        graphs_up_to=requests if graphs else 0,
    )
    runner.kv_pool.data.normal_()
    how = f"attention {runner.attention.name}, {'with' if graphs else 'without'} CUDA graphs"
    print(f"\n2. decode, context {scale.context}, {how}")
    print("   batch  ITL median ms   p90 ms   of it host ms   tok/s")
    figures: dict[str, float] = {}
    for batch in scale.batches:
        itl, p90, host = decode_latency(runner, batch, scale)
        figures[f"itl_ms_batch_{batch}"] = itl
        print(f"   {batch:5}  {itl:13.2f}  {p90:7.2f}  {host:13.2f}  {batch / itl * 1e3:6.0f}")
    print(f"\n3. prefill in chunks of {scale.chunk}")
    for count, length in scale.prefills:
        rate = prefill_rate(runner, count, length, scale.chunk)
        figures[f"prefill_tok_s_{count}x{length}"] = rate
        print(f"   {count:3} x {length:5}: {rate:9.0f} tok/s")
    return figures


def decode_latency(runner: ModelRunner, batch: int, scale: Scale) -> tuple[float, float, float]:
    """(median, 90th percentile, median of the host's part) of a step, milliseconds; every step
    waits for its tokens, as a scheduler without overlap does."""
    longest = scale.context + scale.decode_steps + 8
    vocab = runner.model_config.vocab_size
    requests = Requests(runner.kv_pool, [scale.context] * batch, longest, vocab)
    times, host_times = [], []
    for index in range(scale.decode_steps + 3):
        step = requests.decode()
        start = time.perf_counter()
        tokens = runner.forward(step).next_token_ids
        launched = time.perf_counter()
        tokens.tolist()
        if index >= 3:
            times.append((time.perf_counter() - start) * 1e3)
            host_times.append((launched - start) * 1e3)
    p90 = sorted(times)[int(len(times) * 0.9)]
    return statistics.median(times), p90, statistics.median(host_times)


def prefill_rate(runner: ModelRunner, count: int, length: int, chunk: int) -> float:
    """Tokens per second over `count` fresh prompts; the better of two rounds."""
    rates = []
    for _ in range(2):
        vocab = runner.model_config.vocab_size
        requests = Requests(runner.kv_pool, [0] * count, length, vocab)
        steps = [
            requests.step(rows, counts, ForwardMode.EXTEND)
            for rows, counts in chunks(count, length, chunk)
        ]
        start = time.perf_counter()
        for step in steps:
            tokens = runner.forward(step).next_token_ids
        tokens.tolist()
        rates.append(count * length / (time.perf_counter() - start))
    return max(rates)


def chunks(count: int, length: int, chunk: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts in order, cut where a chunk is full."""
    rows: list[int] = []
    counts: list[int] = []
    room = chunk
    for row in range(count):
        left = length
        while left:
            taken = min(left, room)
            rows.append(row)
            counts.append(taken)
            left -= taken
            room -= taken
            if not room:
                yield rows, counts
                rows, counts, room = [], [], chunk
    if rows:
        yield rows, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps")
    parser.add_argument("--graphs", action="store_true", help="decode as captured CUDA graphs")
    parser.add_argument(
        "--head-dims",
        type=int,
        nargs="*",
        default=[],
        help="check these alone: each builds kernels",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}")
    with torch.no_grad():
        good = check(device, dtype, arguments.graphs, set(arguments.head_dims))
        figures = measure(device, dtype, TINY if arguments.tiny else FULL, arguments.graphs)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
