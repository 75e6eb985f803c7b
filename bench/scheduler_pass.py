"""What a pass of the scheduler costs the host, apart from the model.

Microseconds of `get_next_batch_to_run` (with `prepare_for_decode`), of describing the step for the
runner, and of handling its results, in steady decode: so many requests run, so many wait, and a
prefix tree holds a million tokens. The runner draws nothing, so all that is left is bookkeeping.
What is counted is the thread's CPU time: other processes cost it caches, but not turns.

    python bench/scheduler_pass.py                       # the table; a minute or two on one core
    python bench/scheduler_pass.py --plot passes.svg     # and a picture (needs the extra `bench`)
    python bench/scheduler_pass.py --profile 256 1000    # where one cell's time goes
"""

import argparse
import cProfile
import gc
import json
import pstats
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from engine.execution.forward_batch import ForwardBatch, ForwardResult  # noqa: E402
from engine.memory.pools import MemoryPools, make_memory_pools  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402
from engine.scheduler.config import SchedulerConfig  # noqa: E402
from engine.scheduler.req import Req  # noqa: E402
from engine.scheduler.results import ResultProcessor  # noqa: E402
from engine.scheduler.scheduler import Scheduler  # noqa: E402
from engine.types import RequestId  # noqa: E402

PAGE_SIZE = 16
VOCAB = 32_000
PROMPT = 64
CONTEXT = 2048
TREE_TOKENS = 1_000_000
CONVERSATION = 2_000
"""Tokens of one conversation in the tree; all begin with the same 512."""
RUNNING = (1, 64, 256, 1024)
WAITING = (0, 1_000, 10_000)
AIM_US = 300
"""At 256 running."""


@dataclass(frozen=True)
class Cell:
    """Medians over the measured passes, in microseconds."""

    running: int
    waiting: int
    tree_tokens: int
    policy: str
    blocked_by: str
    schedule_us: float
    schedule_p90_us: float
    describe_us: float
    results_us: float


class NullRunner:
    """Draws token 1 for everybody, at once."""

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        return ForwardResult(torch.ones(len(batch.seq_lens_cpu), dtype=torch.int64), None)


def fill_tree(memory: MemoryPools, tokens: int) -> None:
    rng = random.Random(0)
    shared = [rng.randrange(VOCAB) for _ in range(512)]
    for _ in range(tokens // CONVERSATION):
        own = [rng.randrange(VOCAB) for _ in range(CONVERSATION - len(shared))]
        pages = memory.allocator.alloc(CONVERSATION // PAGE_SIZE)
        if pages is None:
            raise RuntimeError("the pool is smaller than the tree")
        existing = memory.tree_cache.insert(shared + own, pages).existing_pages
        memory.allocator.free(pages[: len(existing)])


def make_req(number: int, rng: random.Random) -> Req:
    return Req(
        RequestId(f"r{number}"),
        [rng.randrange(VOCAB) for _ in range(PROMPT)],
        SamplingParams(max_new_tokens=CONTEXT - PROMPT),
    )


def engine(
    *, running: int, waiting: int, tree_tokens: int, policy: str, blocked_by: str, passes: int
) -> Scheduler:
    """In steady decode. The waiting ones wait for a place in the batch (`places`), or for memory
    although places are free (`memory`), for `passes` passes."""
    own_pages = running * CONTEXT // PAGE_SIZE
    memory = make_memory_pools(
        num_pages=tree_tokens // PAGE_SIZE + own_pages,
        page_size=PAGE_SIZE,
        num_rows=running + 8,
        max_context_len=CONTEXT,
    )
    fill_tree(memory, tree_tokens)
    scheduler = Scheduler(
        SchedulerConfig(
            page_size=PAGE_SIZE,
            context_length=CONTEXT,
            vocab_size=VOCAB,
            max_running_requests=running + 8 * (blocked_by == "memory"),
            max_queued_requests=waiting + running + 1,
            schedule_policy=policy,  # type: ignore[arg-type]
        ),
        NullRunner(),
        memory,
    )
    rng = random.Random(1)
    for number in range(running):
        scheduler.add_request(make_req(number, rng))
    while scheduler.waiting_queue or scheduler.chunked_req is not None:
        scheduler.step()
    if blocked_by == "memory":
        # Somebody else keeps what a newcomer would need; those who run keep a few pages.
        room = memory.available_tokens() // PAGE_SIZE
        memory.alloc_pages(room - running * (passes // PAGE_SIZE + 3))
    for number in range(running, running + waiting):
        scheduler.add_request(make_req(number, rng))
    return scheduler


class Stopwatch:
    """Wraps methods; CPU seconds of each call."""

    def __init__(self) -> None:
        self.schedule: list[float] = []
        self.results: list[float] = []
        self.step: list[float] = []

    @contextmanager
    def on(self, owner: Any, name: str, times: list[float]) -> Iterator[None]:
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return plain(*args, **kwargs)
            finally:
                times.append(time.thread_time() - began)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, plain)


def measure(passes: int, **setup: Any) -> Cell:
    scheduler = engine(**setup, passes=passes)
    for _ in range(10):
        scheduler.step()
    watch = Stopwatch()
    gc.collect()
    gc.disable()
    try:
        with (
            watch.on(scheduler, "get_next_batch_to_run", watch.schedule),
            watch.on(ResultProcessor, "process_oldest", watch.results),
            watch.on(scheduler, "step", watch.step),
        ):
            for _ in range(passes):
                scheduler.step()
    finally:
        gc.enable()
    if len(scheduler.running_batch.reqs) != setup["running"]:
        raise RuntimeError("the decode was not steady")
    rest = [
        step - schedule - results
        for step, schedule, results in zip(watch.step, watch.schedule, watch.results, strict=True)
    ]
    return Cell(
        **setup,
        schedule_us=statistics.median(watch.schedule) * 1e6,
        schedule_p90_us=sorted(watch.schedule)[int(passes * 0.9)] * 1e6,
        describe_us=statistics.median(rest) * 1e6,
        results_us=statistics.median(watch.results) * 1e6,
    )


def print_table(cells: list[Cell]) -> None:
    print(
        f"{'running':>8} {'waiting':>8} {'tree':>10} {'policy':>11} {'waits for':>10} "
        f"{'schedule':>9} {'p90':>7} {'describe':>9} {'results':>8}   µs"
    )
    for cell in cells:
        print(
            f"{cell.running:>8,} {cell.waiting:>8,} {cell.tree_tokens:>10,} {cell.policy:>11} "
            f"{cell.blocked_by:>10} {cell.schedule_us:>9.0f} {cell.schedule_p90_us:>7.0f} "
            f"{cell.describe_us:>9.0f} {cell.results_us:>8.0f}"
        )


def plot(cells: list[Cell], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    main = [c for c in cells if c.tree_tokens == TREE_TOKENS and c.policy == "fcfs"]
    for waiting in WAITING:
        line = [c for c in main if c.waiting == waiting and c.blocked_by == "places"]
        label = f"{waiting:,} waiting"
        left.plot([c.running for c in line], [c.schedule_us for c in line], "o-", label=label)
        right.plot([c.running for c in line], [c.results_us for c in line], "o-", label=label)
    left.axhline(AIM_US, color="grey", linestyle=":", label=f"aim at 256: {AIM_US} µs")
    for axis, title in ((left, "choose and prepare the step"), (right, "handle its results")):
        axis.set(title=title, xlabel="running requests", xscale="log", yscale="log")
        axis.set_xticks(RUNNING, [f"{n:,}" for n in RUNNING])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.set_ylabel("µs a pass, median")
    left.legend(frameon=False)
    figure.suptitle("The scheduler's own time in steady decode, 1M tokens in the prefix tree")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def setups(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table asked for; then, at 256 running, what the tree, the policy and a lack of memory
    change."""
    basic = {"tree_tokens": TREE_TOKENS, "policy": "fcfs", "blocked_by": "places"}
    grid = [{"running": r, "waiting": w, **basic} for r in args.running for w in args.waiting]
    if args.grid_only:
        return grid
    at = {"running": 256, "waiting": 1_000, **basic}
    return [
        *grid,
        *({**at, "tree_tokens": tokens} for tokens in (0, 100_000)),
        *({**at, "blocked_by": "memory", "waiting": w} for w in (1, 1_000, 10_000)),
        *({**at, "blocked_by": "memory", "tree_tokens": tokens} for tokens in (0, 100_000)),
        *(
            {**at, "policy": policy, "waiting": waiting, "blocked_by": "memory"}
            for policy in ("lpm", "dfs-weight", "lof", "random")
            for waiting in (100, 10_000)
        ),
    ]


def profile(setup: dict[str, Any], passes: int) -> None:
    scheduler = engine(**setup, passes=passes)
    for _ in range(10):
        scheduler.step()
    profiler = cProfile.Profile()

    def run(step: Callable[[], object]) -> None:
        for _ in range(passes):
            step()

    profiler.runcall(run, scheduler.step)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=200, help="measured passes a cell")
    parser.add_argument("--running", type=int, nargs="*", default=RUNNING)
    parser.add_argument("--waiting", type=int, nargs="*", default=WAITING)
    parser.add_argument("--grid-only", action="store_true", help="only running x waiting")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=int, nargs=2, metavar=("RUNNING", "WAITING"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        running, waiting = args.profile
        basic = {"tree_tokens": TREE_TOKENS, "policy": "fcfs", "blocked_by": "places"}
        profile({"running": running, "waiting": waiting, **basic}, args.passes)
        return
    cells = []
    todo = setups(args)
    for done, setup in enumerate(todo, start=1):
        print(f"[{done}/{len(todo)}] {setup}", file=sys.stderr, flush=True)
        cells.append(measure(args.passes, **setup))
    print_table(cells)
    for cell in cells:
        if (cell.running, cell.waiting, cell.policy) == (256, 0, "fcfs"):
            verdict = "within" if cell.schedule_us < AIM_US else "above"
            print(f"\n256 running: {cell.schedule_us:.0f} µs, {verdict} the aim of {AIM_US} µs")
    if args.json:
        args.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    if args.plot:
        plot(cells, args.plot)


if __name__ == "__main__":
    main()
