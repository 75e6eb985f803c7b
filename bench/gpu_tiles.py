"""Our kernel for products of few rows in many tiles, beside the library's: which to offer?

    python bench/gpu_tiles.py --rows 8 32       # an H200, 8B-Llama shape, half a minute

A decode graph chooses among few ways, measured at a start in a step's layers
(`engine/models/products.py`); this is how those few were found. Weights go in rotation, so that no
cache helps.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_engine_check import LLAMA_8B
from engine.models.decoder import load_decoder
from engine.models.few_rows import Tiles, few_rows_gated, few_rows_linear
from engine.models.fused_ops import flashinfer_library
from engine.models.products import Products, Way, alone_us, products_of

LINEAR = [
    Tiles(64, 128, 5),
    Tiles(64, 128, 5, ahead=0),
    Tiles(64, 64, 8),
    Tiles(64, 128, 5, splits=2),
    Tiles(64, 128, 5, splits=4),
    Tiles(64, 64, 8, splits=2),
    Tiles(64, 64, 8, splits=4),
    Tiles(128, 64, 5, splits=4),
    Tiles(128, 128, 3, splits=4),
]
GATED = [
    Tiles(64, 64, 5),
    Tiles(64, 128, 3),
    Tiles(64, 128, 3, ahead=0),
    Tiles(64, 128, 2),
    Tiles(128, 64, 3),
    Tiles(128, 64, 4, warps=8),
]
_BUILDERS = 12


def build(job: tuple[bool, int, Tiles]) -> None:
    """One kernel, into Triton's cache."""
    gated, rows, tiles = job
    weight = torch.zeros(8192, 4096, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(rows, 4096, device="cuda", dtype=torch.bfloat16)
    if gated:
        few_rows_gated(x, weight, None, tiles)
    else:
        few_rows_linear(x, weight, None, tiles)
    torch.cuda.synchronize()


def way_of(tiles: Tiles, gated: bool) -> Way:
    if gated:
        return lambda x, weight, bias, out: few_rows_gated(x, weight, bias, tiles)
    return lambda x, weight, bias, out: few_rows_linear(x, weight, bias, tiles, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    jobs = [(False, rows, tiles) for rows in arguments.rows for tiles in LINEAR]
    jobs += [(True, rows, tiles) for rows in arguments.rows for tiles in GATED]
    with ProcessPoolExecutor(_BUILDERS, mp_context=get_context("spawn")) as builders:
        list(builders.map(build, jobs))
    decoder = load_decoder(
        LLAMA_8B,
        model_path="",
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        load_format="dummy",
    )
    library = Products(flashinfer_library().silu_and_mul, triton=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us, fastest first")
    for rows in arguments.rows:
        for product in products_of(decoder.weights):
            if product.kind == "logits":
                continue
            gated = product.kind == "gated"
            weights = product.weights
            ways = library.ways(product.kind, rows, weights[0])
            weight_rows, depth = product.shape
            for tiles in GATED if gated else LINEAR:
                if tiles.fit(weight_rows // 2 if gated else weight_rows, depth):
                    ways[f"{tiles.short} ahead {tiles.ahead}"] = way_of(tiles, gated)
            found = alone_us(ways, rows, product)
            ordered = sorted(found.items(), key=lambda item: item[1])
            cells = ", ".join(f"{name} {us:.1f}" for name, us in ordered)
            print(f"   {rows:3} {product.name:8} {cells}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
