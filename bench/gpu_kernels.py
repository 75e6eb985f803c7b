"""Builds every FlashInfer kernel that the GPU tests and benchmarks use, all at once, so that the
tests after it wait for none.

    python bench/gpu_kernels.py
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from engine.execution.kernel_cache import build_all

# (head_dim, KV in float8): 128 is the 8B Llama's, 64 the trained model's.
SHAPES = [(128, False), (64, False), (128, True), (64, True)]


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to build")
        return 0
    begin = time.perf_counter()
    device = torch.device("cuda", 0)
    built = build_all(
        [(torch.bfloat16, head_dim, fp8) for head_dim, fp8 in SHAPES], device, progress=print
    )
    print(f"{built} modules built in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
