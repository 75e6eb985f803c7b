"""What a hit in host memory is worth: the first token of a long prompt that is computed, loaded
back from host memory, or still on the device; and how fast pages move.

    python bench/host_tier.py                        # a GPU, 8B-Llama shape, a minute
    python bench/host_tier.py --device cpu --tiny    # the same in miniature, seconds

One engine with its scheduler, no services. Weights are random; every page that comes back is
compared with its digest, as in service.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B, TINY
from engine.execution.device import resolve_device, resolve_dtype
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.page_copier import PageCopier, make_page_copier
from engine.memory.pools import make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from kvtransfer.digest import digest_pages, queue_digests
from kvtransfer.layout import PageLayout

ROUNDS = 5


def copier_of(runner: ModelRunner, page_size: int, num_pages: int) -> PageCopier:
    config = runner.model_config
    layout = PageLayout(
        layers=config.num_layers,
        page_size=page_size,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        itemsize=runner.kv_pool.dtype.itemsize,
    )

    def digest_of(pool: torch.Tensor, pages: Sequence[int]) -> torch.Tensor:
        digest = queue_digests if pool.is_cuda else digest_pages
        return digest(pool, pages, [page_size] * len(pages), layout)

    return make_page_copier(runner.kv_pool, num_pages, digest_of)


def show_copies(copier: PageCopier, num_pages: int) -> dict[str, float]:
    """GB/s of `num_pages` neighbours, digests included."""
    pages = list(range(num_pages))
    figures: dict[str, list[float]] = {"to_host": [], "to_device": []}
    for _ in range(ROUNDS):
        for name, start in (("to_host", copier.to_host), ("to_device", copier.to_device)):
            copy = start(pages, pages)
            copy.wait()
            figures[name].append(num_pages * copier.page_bytes / copy.duration_s() / 1e9)
    result = {f"{name}_gb_per_s": statistics.median(rates) for name, rates in figures.items()}
    for name, rate in result.items():
        print(f"{name}: {rate:.1f} GB/s ({num_pages} pages of {copier.page_bytes / 2**20:.2f} MiB)")
    return result


class Engine:
    """A scheduler over a pool, a tree and host memory."""

    def __init__(self, runner: ModelRunner, page_size: int, copier: PageCopier) -> None:
        self.memory = make_memory_pools(
            num_pages=runner.kv_pool.num_pages,
            page_size=page_size,
            num_rows=4,
            max_context_len=runner.model_config.context_length,
            device=str(runner.kv_pool.device),
            host_copier=copier,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=page_size,
                context_length=runner.model_config.context_length,
                vocab_size=runner.model_config.vocab_size,
            ),
            runner,
            self.memory,
            device=runner.kv_pool.device,
        )
        self._requests = 0

    def first_token_ms(self, prompt: list[int]) -> tuple[float, int]:
        """Until its only token is there, and the prompt tokens that were not computed."""
        self._requests += 1
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        req = Req(RequestId(f"r{self._requests}"), prompt, params)
        started = time.perf_counter()
        self.scheduler.add_request(req)
        while not req.finished():
            self.scheduler.step()
        took_ms = (time.perf_counter() - started) * 1e3
        while self.scheduler.has_work():
            self.scheduler.step()
        return took_ms, req.cached_tokens

    def evict(self) -> None:
        self.memory.tree_cache.evict(self.memory.allocator.total_tokens)
        if self.memory.tree_cache.total_pages():
            raise RuntimeError("something is left on the device")


def show_prompt(engine: Engine, length: int, vocab: int) -> dict[str, float]:
    """The median over prompts of `length` tokens, each computed, loaded and hit once."""
    times: dict[str, list[float]] = {"computed": [], "from host": [], "on the device": []}
    for seed in range(ROUNDS + 1):
        torch.manual_seed(seed * 100_000 + length)
        prompt = torch.randint(1, vocab, (length,)).tolist()
        for how, wanted in (("computed", 0), ("from host", length), ("on the device", length)):
            if how == "from host":
                engine.evict()
            took_ms, cached = engine.first_token_ms(prompt)
            if cached < wanted * 0.9 or (not wanted and cached):
                raise RuntimeError(f"{how}: {cached} of {length} tokens were cached")
            if seed > 0:  # the first round warms up
                times[how].append(took_ms)
    result = {how: statistics.median(values) for how, values in times.items()}
    ratio = result["computed"] / result["from host"]
    shown = ", ".join(f"{how} {value:.1f} ms" for how, value in result.items())
    print(f"first token of {length:,} tokens: {shown}; loading is {ratio:.1f} times as fast")
    return {f"{length} {how}": value for how, value in result.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a miniature, for a CPU")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    model = TINY.model if arguments.tiny else LLAMA_8B
    page_size, lengths = (16, [256, 1024]) if arguments.tiny else (64, [1024, 4096, 15_360])
    runner = load_model_runner(
        model,
        model_path="",
        device=device,
        dtype=resolve_dtype("auto", device),
        page_size=page_size,
        max_total_tokens=2 * max(lengths),
        load_format="dummy",
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {runner.kv_pool.dtype}")
    copier = copier_of(runner, page_size, 4 * max(lengths) // page_size)
    figures = show_copies(copier, max(lengths) // page_size)
    engine = Engine(runner, page_size, copier)
    for length in lengths:
        figures |= show_prompt(engine, length, model.vocab_size)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
