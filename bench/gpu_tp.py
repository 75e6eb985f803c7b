"""What a second GPU does for a decode step: tensor parallelism of 2 beside one device.

    python bench/gpu_tp.py                       # two GPUs, 8B-Llama shape, about a minute
    python bench/gpu_tp.py --device cpu --tiny   # the same in miniature over gloo, seconds

Random weights and KV; captured steps where there are GPUs. One step at a context of 1,024 tokens is
repeated, so a figure is the time between two tokens of every request in the batch.
"""

import argparse
import faulthandler
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B, TINY
from engine.execution.forward_batch import BatchRunner, ForwardBatch, ForwardMode, SamplingBatch
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.parallel.commands import StepCommand
from engine.parallel.group import ALONE, TensorGroup, join_group
from engine.parallel.runners import FollowingRunner, LeadingRunner

RANKS = 2
PAGE_SIZE = 64
LIMIT_S = 55.0
"""What hangs for so long ends with the stacks of all threads."""


def load(arguments: argparse.Namespace, group: TensorGroup) -> ModelRunner:
    on_gpu = arguments.device == "cuda"
    device = torch.device(arguments.device, group.rank if on_gpu else None)
    if on_gpu:
        torch.cuda.set_device(device)
    pages = -(-(arguments.context + 1) // PAGE_SIZE)
    return load_model_runner(
        TINY.model if arguments.tiny else LLAMA_8B,
        model_path="",
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        page_size=PAGE_SIZE,
        max_total_tokens=max(arguments.batches) * pages * PAGE_SIZE,
        load_format="dummy",
        graphs_up_to=max(arguments.batches) if on_gpu else 0,
        group=group,
    )


def device_of(arguments: argparse.Namespace, rank: int) -> torch.device:
    return torch.device(arguments.device, rank if arguments.device == "cuda" else None)


def follow(pipe: Connection, arguments: argparse.Namespace, meeting_point: str) -> None:
    """The second rank, from start to end."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    if arguments.device == "cuda":
        torch.cuda.set_device(1)
    device = device_of(arguments, 1)
    group = join_group(1, RANKS, device=device, meeting_point=meeting_point)
    follower = FollowingRunner(load(arguments, group), group)
    while (command := pipe.recv_bytes()) != b"":
        follower.follow(StepCommand.from_bytes(command))
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    group.leave()


def decode_batch(runner: ModelRunner, rows: int, context: int) -> ForwardBatch:
    """The next token of `rows` requests with `context` tokens of KV each, in pages of their own."""
    device = runner.kv_pool.device
    length = context + 1
    pages = -(-length // PAGE_SIZE)
    table = torch.arange(rows * pages * PAGE_SIZE, dtype=torch.int32, device=device)
    table = table.view(rows, pages * PAGE_SIZE)
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=torch.arange(rows, device=device),
        positions=zeros + context,
        out_cache_loc=table[:, context].to(torch.int64),
        req_pool_indices=torch.arange(rows, device=device),
        seq_lens=zeros + length,
        seq_lens_cpu=[length] * rows,
        extend_prefix_lens=[context] * rows,
        extend_lens=[1] * rows,
        req_to_token=table,
        sampling=SamplingBatch(
            temperature=zeros.float(),
            top_p=zeros.float() + 1,
            top_k=zeros,
            seed=zeros,
            position=zeros + length,
            all_greedy=True,
            any_top_k=False,
            any_top_p=False,
            any_logprobs=False,
        ),
    )


def step_ms(runner: ModelRunner, leading: BatchRunner, rows: int, context: int) -> float:
    """Median over runs of ten steps, without a pause between steps."""
    batch = decode_batch(runner, rows, context)

    def run(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            result = leading.forward(batch)
        result.next_token_ids.cpu()
        return (time.perf_counter() - started) / steps * 1e3

    run(5)
    return statistics.median(run(10) for _ in range(9))


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    found = {}
    runner = load(arguments, ALONE)
    runner.kv_pool.data.normal_()
    found["1"] = [step_ms(runner, runner, rows, arguments.context) for rows in arguments.batches]
    del runner
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as directory:
        meeting_point = str(Path(directory) / "meeting")
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=follow, args=(there, arguments, meeting_point), daemon=True
        )
        process.start()
        group = join_group(0, RANKS, device=device_of(arguments, 0), meeting_point=meeting_point)
        runner = load(arguments, group)
        runner.kv_pool.data.normal_()
        leading = LeadingRunner(runner, group, here.send_bytes)
        found[str(RANKS)] = [
            step_ms(runner, leading, rows, arguments.context) for rows in arguments.batches
        ]
        here.send_bytes(b"")
        group.leave()
        process.join(20)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU computes")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    if arguments.device == "cuda" and torch.cuda.device_count() < RANKS:
        print(f"needs {RANKS} GPUs; torch sees {torch.cuda.device_count()}")
        return 1
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    started = time.monotonic()
    found = measure(arguments)
    faulthandler.cancel_dump_traceback_later()
    took_s = time.monotonic() - started
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, gloo"
    print(f"\n{name}, torch {torch.__version__}, context {arguments.context}, {took_s:.0f} s")
    print("| ranks | " + " | ".join(f"ITL ms, batch {rows}" for rows in arguments.batches) + " |")
    print("|---" * (1 + len(arguments.batches)) + "|")
    for ranks, values in found.items():
        print(f"| {ranks} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
