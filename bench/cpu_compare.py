"""Baton beside `transformers` on this machine's CPU: output tokens a second, in one run.

The same weights (fp32), the same prompts as token ids, greedy, the same number of new tokens, the
same cores; each takes the threads that it takes by itself (Baton's engines share the cores: two of
them with all cores each would only be in each other's way) unless --threads says otherwise. One
round measures each engine in turn, so that whatever else the machine does is felt by all; ratios
are taken within a round, and the median round is shown, with the least and the greatest. Beside it
stand the milliseconds of CPU time that a token took, of all processes of the engine (not of the
client that asks Baton): they vary less where others use the machine, too.

    python bench/cpu_compare.py                    # models/baton-tiny
    python bench/cpu_compare.py --threads 1 --rounds 5 --json result.json

`transformers` runs in this process, without any server: `generate` with its KV cache (at 16 as one
padded batch, its best case) and `generate_batch`, its continuous batching. Baton is asked over
gRPC, through router, prefill, KV transfer and decode, one call a request, for whole answers, as
`generate` gives them.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig  # noqa: E402

from baton import AsyncClient  # noqa: E402
from baton.bench.workload import mix, token_ids  # noqa: E402

CONCURRENCIES = (1, 16)
LONGEST_PROMPT = 512


def prompts_of(count: int, vocab: int) -> list[list[int]]:
    """The mixed workload's lengths, a quarter as long: the embedded model's context is short."""
    lengths = [min(LONGEST_PROMPT, max(8, length // 4)) for length in mix(count)[0]]
    return [[4 + token % (vocab - 4) for token in ids]
            for ids in token_ids(lengths, vocab_size=vocab)]  # fmt: skip


class Transformers:
    """Both of its ways to generate."""

    def __init__(self, model: Path, new_tokens: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._new = new_tokens
        # No end-of-sequence token: every request produces the same number of tokens.
        self._settings = GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
        )
        self._model.generation_config = self._settings
        self.vocab: int = self._model.config.vocab_size

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = self._model.generate(ids, attention_mask=mask, generation_config=self._settings)
        return [row[longest:].tolist() for row in out]

    # It generates on a thread of its own, where this one's inference mode does not hold.
    def continuous(self, prompts: list[list[int]]) -> list[list[int]]:
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self._new, eos_token_id=-1, pad_token_id=0
        )
        # Sized by hand: left to itself it takes most of the machine's memory for its cache.
        cache = ContinuousBatchingConfig(
            page_size=64, num_blocks=256, max_batch_tokens=2048, allow_block_sharing=False
        )
        done = self._model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            continuous_batching_config=cache,
            progress_bar=False,
            persistent_manager=True,
        )
        ordered = sorted(done.values(), key=lambda output: int(output.request_id.split("_")[-1]))
        return [list(output.generated_tokens) for output in ordered]


class Baton:
    """A running `baton up`."""

    def __init__(self, model: Path, new_tokens: int, flags: list[str], log: Path) -> None:
        self._new = new_tokens
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "baton", "up", "--model", str(model), "--device", "cpu",
                 "--dtype", "float32", "--http-port", "0", "--grpc-port", "0",
                 # A cached prefix would spare Baton work that the others do.
                 "--no-enable-radix-cache", *flags],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
            )  # fmt: skip
        stdout = self._process.stdout
        line = stdout.readline() if stdout is not None else ""
        found = re.search(r"grpc://(\S+)", line)
        if found is None:
            raise SystemExit(f"baton up did not start:\n{log.read_text()[-3000:]}")
        self._address = found.group(1)

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        async def run() -> list[list[int]]:
            async with AsyncClient(self._address) as client:
                await client.models()
                answers = await asyncio.gather(*(
                    client.complete(prompt, max_tokens=self._new, temperature=0, ignore_eos=True)
                    for prompt in prompts
                ))  # fmt: skip
            return [answer.token_ids for answer in answers]

        return asyncio.run(run())

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        main = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(timeout=60)


class Engine(NamedTuple):
    generate: Callable[[list[list[int]]], list[list[int]]]
    cpu_s: Callable[[], float]


class Measured(NamedTuple):
    tokens_per_s: float
    cpu_ms: float
    """A token."""
    outputs: list[list[int]]


def measure(engine: Engine, prompts: list[list[int]], new: int) -> Measured:
    began, cpu_began = time.perf_counter(), engine.cpu_s()
    outputs = engine.generate(prompts)
    seconds, cpu_s = time.perf_counter() - began, engine.cpu_s() - cpu_began
    if [len(output) for output in outputs] != [new] * len(prompts):
        raise SystemExit(f"not {new} tokens each: {[len(output) for output in outputs]}")
    tokens = len(prompts) * new
    return Measured(tokens / seconds, 1e3 * cpu_s / tokens, outputs)


def compare(engines: dict[str, Engine], arguments: argparse.Namespace, vocab: int) -> Any:
    results: list[dict[str, Any]] = []
    for concurrency in arguments.at_once:
        prompts = prompts_of(concurrency, vocab)
        rounds: list[dict[str, Measured]] = []
        for number in range(arguments.rounds + 1):
            taken: dict[str, Measured] = {}
            for name, engine in engines.items():
                taken[name] = measure(engine, prompts, arguments.new_tokens)
                print(f"{concurrency} at once, {name}: {taken[name].tokens_per_s:.0f} tokens/s",
                      file=sys.stderr, flush=True)  # fmt: skip
            if number:  # the first round warms everything up
                rounds.append(taken)
        last = rounds[-1]
        for name in engines:
            ratios = [r["baton"].tokens_per_s / r[name].tokens_per_s for r in rounds]
            results.append({
                "concurrency": concurrency,
                "engine": name,
                "tokens_per_s": statistics.median(r[name].tokens_per_s for r in rounds),
                "cpu_ms": statistics.median(r[name].cpu_ms for r in rounds),
                "baton_is_faster_by": statistics.median(ratios),
                "least": min(ratios),
                "greatest": max(ratios),
                "same_tokens": agreement(last["baton"].outputs, last[name].outputs),
                "rounds": [r[name].tokens_per_s for r in rounds],
            })  # fmt: skip
    return results


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of positions with the same token; greedy fp32 engines should agree on nearly all."""
    pairs = [a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def table(results: list[dict[str, Any]]) -> None:
    print("| at once | engine | tokens/s | CPU ms a token | Baton is faster by | same tokens |")
    print("|---|---|---|---|---|---|")
    for row in results:
        spread = f"{row['least']:.2f} to {row['greatest']:.2f}"
        print(f"| {row['concurrency']} | {row['engine']} | {row['tokens_per_s']:.0f} "
              f"| {row['cpu_ms']:.2f} | {row['baton_is_faster_by']:.2f}× ({spread}) "
              f"| {row['same_tokens']:.1%} |")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "baton-tiny")
    parser.add_argument("--at-once", type=int, nargs="+", default=CONCURRENCIES,
                        help="numbers of requests to be measured")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads of each engine process")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", default="", help="further flags of `baton up`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # So that `finally` also stops Baton when this is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    flags = arguments.flags.split()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        flags += ["--threads", str(arguments.threads)]
    transformers = Transformers(arguments.model, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as directory:
        baton = Baton(arguments.model, arguments.new_tokens, flags, Path(directory) / "up.log")
        try:
            engines: dict[str, Engine] = {
                "baton": Engine(baton.generate, baton.cpu_s),
                "transformers generate": Engine(transformers.generate, time.process_time),
                "transformers continuous": Engine(transformers.continuous, time.process_time),
            }
            results = compare(engines, arguments, transformers.vocab)
        finally:
            baton.stop()
    table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
