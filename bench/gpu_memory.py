"""Where a GPU's memory goes, as a worker's start says it, and that the largest steps then fit.

python bench/gpu_memory.py            # 8B-Llama shape, a worker's defaults
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B
from engine.execution.forward_batch import ForwardMode
from engine.execution.model_runner import load_model_runner
from engine.execution.step_memory import CudaMeter, LargestStep, peak_activations, step_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192 + 256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--mem-fraction", type=float, default=0.85)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    largest = LargestStep(tokens=arguments.tokens, rows=arguments.rows)
    begin = time.perf_counter()
    runner = load_model_runner(
        LLAMA_8B,
        model_path="",
        device=device,
        dtype=torch.bfloat16,
        page_size=64,
        mem_fraction=arguments.mem_fraction,
        load_format="dummy",
        graphs_up_to=arguments.rows,
        largest_step=largest,
        progress=lambda line: print(line) if line.startswith("memory") else None,
    )
    print(f"started in {time.perf_counter() - begin:.1f} s, {runner.kv_pool.num_pages} pages")
    again = peak_activations(runner, largest, CudaMeter(device))
    print(f"the largest steps, run again beside the pool: {again / 2**30:.2f} GiB")
    runner.forward(step_of(runner, [1] * arguments.rows, ForwardMode.DECODE))
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(device)
    taken = (total - free) / total
    print(f"taken then: {taken:.1%} of the GPU; the fraction is {arguments.mem_fraction:.1%}")
    return 0 if taken <= arguments.mem_fraction + 0.005 else 1


if __name__ == "__main__":
    sys.exit(main())
