"""Of all of cuBLASLt's algorithms for a prompt's products, which is fastest while the GPU is at its
power limit?

    python bench/gpu_algorithms.py                     # an H200, 8B-Llama shapes, a minute
    python bench/gpu_algorithms.py --rows 8448         # other numbers of rows

Large products on an H200 are not limited by its clock but by its power: the clock falls until 700 W
are kept. An algorithm that moves less data may then win though it takes more cycles, and a
measurement of a few milliseconds, before the clock has fallen, does not see that. So each is
screened in a few runs first, and the best ones run for a tenth of a second each, in turns.

1. The algorithms that the library's rules name (in their order), and those that can be put together
   from its tiles, clusters and options ("built").
2. A chunk's products with its norms and SiLU (attention is left out): the library's first choice,
   what a short comparison picks, what a long one picks, and the residual's sum inside the products.
3. A decode step's products of 512 rows.
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.gpu_products import SHAPES
from engine.models import blas_algorithms
from engine.models.blas_algorithms import BlasError
from engine.models.float32_residual import add_rms_norm, rms_norm
from engine.models.fused_ops import flashinfer_library
from engine.models.timing import replay_us

PRODUCTS = {name: (rows, columns) for name, rows, columns, _ in SHAPES if name != "vocabulary"}
SUMMED = ("o", "down")
"""Products that may add what they compute to the residual stream, in float32."""

NAMED = 64
"""Algorithms that the library is asked for."""

CLUSTERS = range(2, 17)
"""Numbers of the library's cluster shapes: of one to sixteen blocks in the usual arrangements."""

FINALISTS = 6
SCREEN_S = 0.7
"""Of a product's screening, at most."""

SUSTAINED_S = 0.08
"""Of a finalist's turn."""

LAYERS = 4
"""Whose weights are in rotation."""


@dataclass
class Candidate:
    label: str
    algorithm: Any
    screened_us: float = 0.0
    us: float = 0.0
    mhz: float = 0.0


class Search:
    """The algorithms of one product."""

    def __init__(self, name: str, *, summed: bool) -> None:
        self.name, self.summed = name, summed
        shape = PRODUCTS[name]
        device = torch.device("cuda", 0)
        self.out_dtype = torch.float32 if summed else torch.bfloat16
        self.weights = [
            torch.randn(shape, device=device).mul_(0.02).bfloat16() for _ in range(LAYERS)
        ]
        self.problem = blas_algorithms._problem(device, shape, torch.bfloat16, self.out_dtype)

    def candidates(self, rows: int, *, build: bool) -> list[Candidate]:
        named = self.problem.algorithms(rows, NAMED)
        found = [Candidate(f"#{index}", one) for index, one in enumerate(named)]
        seen = {description(one) for one in named}
        for one in self.built(rows) if build else ():
            if description(one) not in seen:
                seen.add(description(one))
                found.append(Candidate("built", one))
        return found

    def built(self, rows: int) -> list[Any]:
        """All combinations that the library calls possible, of the kinds that its rules name."""
        self.problem._use(rows)
        kinds = {config(one, 0) for one in self.problem.algorithms(rows, NAMED)}
        return [one for kind in sorted(kinds) for one in self._of_kind(kind)]

    def _of_kind(self, kind: int) -> list[Any]:
        library, base = self.problem._library, blas_algorithms._Algorithm()
        float32, bf16 = 0, 14
        out = float32 if self.summed else bf16
        library.call(
            "MatmulAlgoInit",
            *(library.handle, blas_algorithms._COMPUTE_FLOAT32, float32, bf16, bf16, out, out),
            *(kind, ctypes.byref(base)),
        )
        made = []
        stages = sorted({config(one, 6) for one in self.problem.algorithms(8192, NAMED)})
        options = range(capability(library, base, 7, 1)[0] + 1)
        swizzles = range(min(capability(library, base, 2, 1)[0], 1) + 1)
        for tile in capability(library, base, 6, 1024):
            for stage in stages:
                for cluster in CLUSTERS:
                    for option in options:
                        for swizzle in swizzles:
                            one = blas_algorithms._Algorithm()
                            ctypes.pointer(one)[0] = base
                            values = {1: tile, 2: 1, 4: swizzle, 5: option, 6: stage, 8: cluster}
                            if configure(library, one, values) and self.problem._check(one):
                                made.append(one)
        return made

    def runner(self, x: torch.Tensor, out: torch.Tensor, algorithm: Any) -> Callable[[int], None]:
        def run(index: int) -> None:
            weight = self.weights[index % LAYERS]
            if not self.problem.run(x, weight, out, algorithm, added=self.summed):
                raise BlasError("not for so many rows")

        return run

    def best(self, rows: int, candidates: list[Candidate], show: int) -> list[Candidate]:
        """The finalists, fastest first; screened where there are many."""
        x = torch.randn(rows, PRODUCTS[self.name][1], device="cuda").bfloat16()
        out = torch.zeros(rows, PRODUCTS[self.name][0], device="cuda", dtype=self.out_dtype)
        expected = torch.nn.functional.linear(x[::61], self.weights[0]).float()
        screened = []
        begin = time.perf_counter()
        for candidate in candidates:
            run = self.runner(x, out, candidate.algorithm)
            if time.perf_counter() - begin > SCREEN_S and candidate.label == "built":
                continue
            try:
                out.zero_()
                run(0)
                if not torch.allclose(out[::61].float(), expected, rtol=2e-2, atol=2e-2):
                    print(f"      WRONG: {candidate.label} {description(candidate.algorithm)}")
                    continue
                candidate.screened_us = timed(run, 3)
            except BlasError:
                continue
            screened.append(candidate)
        screened.sort(key=lambda candidate: candidate.screened_us)
        finalists = screened[:FINALISTS]
        first = next((one for one in screened if one.label == "#0"), None)
        if first is not None and first not in finalists:
            finalists.append(first)
        for turn in (1, 2):
            for candidate in finalists if turn == 1 else reversed(finalists):
                run = self.runner(x, out, candidate.algorithm)
                us, mhz = sustained(run, candidate.screened_us)
                candidate.us += us / 2
                candidate.mhz += mhz / 2
        finalists.sort(key=lambda candidate: candidate.us)
        count = len([one for one in screened if one.label == "built"])
        flop = 2 * rows * PRODUCTS[self.name][0] * PRODUCTS[self.name][1]
        kind = f"{self.name}{' + residual' if self.summed else ''}"
        print(f"   {rows} {kind}: {len(screened) - count} named, {count} built")
        for one in finalists[:show]:
            print(
                f"      {one.us:8.1f} us ({one.screened_us:8.1f} at first, {one.mhz:5.0f} MHz, "
                f"{flop / one.us * 1e-6:4.0f} TFLOP/s) {one.label} "
                f"{description(one.algorithm)}",
                flush=True,
            )
        return finalists


def timed(run: Callable[[int], None], count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for index in range(count):
        run(index)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / count


def sustained(run: Callable[[int], None], about_us: float) -> tuple[float, float]:
    """(microseconds of one, the clock in MHz) when it has run for a while."""
    count = max(2, int(SUSTAINED_S / 2 * 1e6 / about_us))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for index in range(count):
        run(index)
    begin.record()
    for index in range(count):
        run(index)
    end.record()
    begin.synchronize()
    time.sleep(SUSTAINED_S / 4)
    mhz = clock_mhz()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / count, mhz


def clock_mhz() -> float:
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # no NVML for Python here: the clock is only shown
        return float("nan")


def config(algorithm: Any, attribute: int) -> int:
    value, written = ctypes.c_int32(), ctypes.c_size_t()
    library = blas_algorithms._library(torch.device("cuda", 0))
    library.call(
        "MatmulAlgoConfigGetAttribute",
        *(ctypes.byref(algorithm), attribute, ctypes.byref(value)),
        *(ctypes.c_size_t(2 if attribute > 6 else 4), ctypes.byref(written)),
    )
    return value.value


def description(algorithm: Any) -> tuple[int, ...]:
    """Its kind, tile, split, reduction, swizzle, option, stages, inner shape and cluster."""
    return tuple(config(algorithm, attribute) for attribute in range(9))


def configure(library: Any, algorithm: Any, values: dict[int, int]) -> bool:
    for attribute, number in values.items():
        value = ctypes.c_uint16(number) if attribute > 6 else ctypes.c_uint32(number)
        try:
            library.call(
                "MatmulAlgoConfigSetAttribute",
                *(ctypes.byref(algorithm), attribute, ctypes.byref(value)),
                ctypes.c_size_t(ctypes.sizeof(value)),
            )
        except BlasError:
            return False
    return True


def capability(library: Any, algorithm: Any, attribute: int, most: int) -> list[int]:
    values, written = (ctypes.c_uint32 * most)(), ctypes.c_size_t()
    try:
        library.call(
            "MatmulAlgoCapGetAttribute",
            *(ctypes.byref(algorithm), attribute, values),
            *(ctypes.c_size_t(ctypes.sizeof(values)), ctypes.byref(written)),
        )
    except BlasError:
        return [0]
    return list(values[: written.value // 4])


def chunk(
    rows: int, searches: dict[str, Search], chosen: dict[str, Any] | None, *, summed: bool
) -> Callable[[int], None]:
    """A layer's products, norms and SiLU for `rows` rows; `chosen` None: as torch calls them."""
    silu = flashinfer_library().silu_and_mul
    device = torch.device("cuda", 0)
    x0 = torch.randn(rows, 4096, device=device).bfloat16()
    heads = torch.randn(rows, 4096, device=device).bfloat16()
    residual = torch.zeros(rows, 4096, device=device)
    gain = torch.ones(4096, device=device, dtype=torch.bfloat16)

    def product(name: str, x: torch.Tensor, index: int) -> torch.Tensor:
        weight = searches[name].weights[index % LAYERS]
        if chosen is None:
            return torch.nn.functional.linear(x, weight)
        out = x.new_empty((rows, weight.shape[0]))
        searches[name].problem.run(x, weight, out, chosen[name])
        return out

    def into_residual(name: str, x: torch.Tensor, index: int) -> torch.Tensor:
        nonlocal residual
        if not summed or chosen is None:
            normed, residual = add_rms_norm(product(name, x, index), residual, gain, 1e-5)
            return normed
        search = searches[name + "+"]
        weight = search.weights[index % LAYERS]
        search.problem.run(x, weight, residual, chosen[name + "+"], added=True)
        return rms_norm(residual, gain, 1e-5)

    normed = x0

    def layer(index: int) -> None:
        nonlocal normed
        product("qkv", normed, index)
        normed = into_residual("o", heads, index)
        normed = into_residual("down", silu(product("gate_up", normed, index)), index)

    return layer


def show_chunks(
    rows: int, searches: dict[str, Search], found: dict[str, list[Candidate]]
) -> dict[str, float]:
    first = {name: min(c, key=lambda one: one.label != "#0") for name, c in found.items()}
    short = {name: min(c, key=lambda one: one.screened_us) for name, c in found.items()}
    long = {name: c[0] for name, c in found.items()}
    ways: dict[str, tuple[dict[str, Any] | None, bool]] = {"as torch calls them": (None, False)}
    for label, picked in (("first named", first), ("short", short), ("long", long)):
        ways[label] = ({name: one.algorithm for name, one in picked.items()}, False)
    ways["long, residual inside"] = (ways["long"][0], True)
    times: dict[str, float] = dict.fromkeys(ways, 0.0)
    hot = chunk(rows, searches, None, summed=False)
    timed(hot, 200 * 8192 // rows)  # until the clock has fallen, or the first looks best
    for turn in (1, 2):
        for label in ways if turn == 1 else reversed(ways):
            layer = chunk(rows, searches, ways[label][0], summed=ways[label][1])
            layer(0)
            us = timed(layer, 48 * 8192 // rows)
            times[label] += us / 2
    print(f"   {rows} rows, 32 layers, ms and tok/s:")
    for label, us in times.items():
        print(f"      {us * 32e-3:8.2f}  {rows / us / 32e-6:8.0f}  {label}", flush=True)
    return times


def show_step(rows: int, searches: dict[str, Search]) -> None:
    """Of a decode step's products, every algorithm in a graph."""
    for name in PRODUCTS:
        search = searches[name]
        x = torch.randn(rows, PRODUCTS[name][1], device="cuda").bfloat16()
        out = torch.empty(rows, PRODUCTS[name][0], device="cuda", dtype=torch.bfloat16)
        candidates = search.candidates(rows, build=True)[:160]
        steps: dict[str, Callable[[], object]] = {}
        for index, candidate in enumerate(candidates):
            run = search.runner(x, out, candidate.algorithm)
            try:
                run(0)
            except BlasError:
                continue
            steps[str(index)] = lambda run=run: [run(i) for i in range(LAYERS)]
        steps["torch"] = lambda s=search, x=x: [torch.nn.functional.linear(x, w) for w in s.weights]
        times = replay_us(steps, torch.device("cuda", 0))
        line = [f"torch {times.pop('torch') / LAYERS:.1f}"]
        for key in sorted(times, key=lambda key: times[key])[:4]:
            one = candidates[int(key)]
            line.append(f"{times[key] / LAYERS:.1f} {one.label} {description(one.algorithm)}")
        print(f"   {rows} {name} ({len(times)}): " + "; ".join(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", default="8448,8192,16896")
    parser.add_argument("--step-rows", default="512,384,256")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    searches = {name: Search(name, summed=False) for name in PRODUCTS}
    searches |= {f"{name}+": Search(name, summed=True) for name in SUMMED}
    figures: dict[str, Any] = {}
    known: dict[str, Sequence[Candidate]] = {}
    sizes = [int(rows) for rows in arguments.rows.split(",") if rows]
    for rows in sizes:
        found = {}
        for name, search in searches.items():
            begin = time.perf_counter()
            candidates = search.candidates(rows, build=name not in known)
            listed_already = {description(one.algorithm) for one in candidates}
            candidates += [
                Candidate("before", one.algorithm)
                for one in known.get(name, ())
                if description(one.algorithm) not in listed_already
            ]
            listed = time.perf_counter() - begin
            found[name] = search.best(rows, candidates, 5)
            known.setdefault(name, found[name])
            print(f"      ({time.perf_counter() - begin:.1f} s, {listed:.1f} of them listing)")
        figures[f"chunk_{rows}"] = show_chunks(rows, searches, found)
        for name, finalists in found.items():
            figures[f"{name}_{rows}"] = [
                (one.us, one.screened_us, one.mhz, one.label, description(one.algorithm))
                for one in finalists
            ]
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    for rows in [int(rows) for rows in arguments.step_rows.split(",") if rows]:
        show_step(rows, searches)
    return 0


if __name__ == "__main__":
    sys.exit(main())
