"""`baton bench`: plan, drive, report."""

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from baton.bench.doors import Clock, Door, ask, open_door, start_clock, vocabulary
from baton.bench.drive import OnEnd, drive_closed, drive_open, lag_probe
from baton.bench.figures import Figures, Slo, figures
from baton.bench.plan import PlannedRequest, closed_loop, open_loop
from baton.bench.plot import check_matplotlib, draw
from baton.bench.sample import Sample
from baton.bench.settings import BenchConfig
from baton.bench.tables import latency_table, totals_table, write_json
from baton.client_access import ClientAccess
from baton.config import Scalar, SettingsError, fill
from baton.errors import Unavailable
from baton.tables import show

MAX_LAG_MS = 5.0
"""99th percentile of the event loop's lag beyond which the client's own times are not trusted."""
GRACE_S = 5.0
"""A door that does not keep the request's timeout itself is cut off so much later."""


def run_bench(given: dict[str, Scalar]) -> int:
    """Runs one benchmark; status 1 where no request succeeded."""
    config, access = fill(BenchConfig, given), fill(ClientAccess, given)
    if config.plot:
        check_matplotlib()
    for name in ("json", "plot"):
        target = getattr(config, name)
        if target and not Path(target).resolve().parent.is_dir():
            raise SettingsError(f"{name}: there is no directory for {target}")
    try:
        import uvloop
    except ImportError:
        result, samples, model = asyncio.run(bench(config, access))
    else:
        result, samples, model = uvloop.run(bench(config, access))
    report(config, result, samples, model=model)
    return 0 if result.succeeded else 1


async def bench(config: BenchConfig, access: ClientAccess) -> tuple[Figures, list[Sample], str]:
    """The figures, every request's sample, and the model's name.

    Raises:
        RequestError: the server is out of reach, or does not serve the model.
        SettingsError: the settings do not fit the server.
    """
    door = open_door(config.url, access=access, timeout_s=config.request_timeout_s)
    async with door:
        model = await door.model(config.model)
        vocab_size = vocabulary(model, given=config.vocab_size)
        await _warm_up(door, config, vocab_size=vocab_size)
        async with lag_probe() as lags:
            samples = await _drive(door, config, vocab_size=vocab_size)
    slo = Slo(
        ttft_ms=config.slo_ttft_ms, itl_ms=config.slo_itl_ms, p99_itl_ms=config.slo_p99_itl_ms
    )
    return figures(samples, slo=slo, lags_ms=lags), samples, model.name


def report(config: BenchConfig, result: Figures, samples: list[Sample], *, model: str) -> None:
    """Tables on standard output, warnings on standard error, and the files asked for."""
    title = f"{model} at {config.url}, {_load(config)}, seed {config.seed}"
    print(title)
    show(latency_table(result))
    show(totals_table(result))
    for kind, detail in result.error_details.items():
        print(f"baton: {kind}, for instance: {' '.join(detail.split())[:300]}", file=sys.stderr)
    lag = result.loop_lag_ms
    if lag is not None and lag.p99 > MAX_LAG_MS:
        print(
            f"baton: this client's event loop lagged by {lag.p99:.1f} ms (p99): latencies hold "
            "that much of its own; give it a core, or less load",
            file=sys.stderr,
        )
    if config.json:
        write_json(Path(config.json), config=config, model=model, figures=result, samples=samples)
    if config.plot:
        draw(Path(config.plot), samples, slo=result.slo, title=title)


async def _warm_up(door: Door, config: BenchConfig, *, vocab_size: int) -> None:
    clock = start_clock()
    # Prompts of their own, so that no measured request finds its prefix cached.
    plan = closed_loop(_other_seed(config), vocab_size=vocab_size)
    for request in [next(plan) for _ in range(config.warmup)]:
        sample = await _ask(door, config, clock, request, None)
        if sample.error:
            raise Unavailable(f"warm-up failed: {sample.error}: {sample.detail}")


async def _drive(door: Door, config: BenchConfig, *, vocab_size: int) -> list[Sample]:
    if config.concurrency:
        requests = closed_loop(config, vocab_size=vocab_size)
        with _progress(config, config.requests or None) as on_end:
            clock = start_clock()
            return await drive_closed(
                requests,
                lambda request, at: _ask(door, config, clock, request, at),
                concurrency=config.concurrency,
                bound_s=config.bound_s,
                clock=clock,
                on_end=on_end,
            )
    plan = open_loop(config, vocab_size=vocab_size)
    if not plan:
        raise SettingsError(f"no request arrives within {config.bound_s:g} s: give more time")
    with _progress(config, len(plan)) as on_end:
        clock = start_clock()
        return await drive_open(
            plan,
            lambda request, at: _ask(door, config, clock, request, at),
            clock=clock,
            on_end=on_end,
        )


async def _ask(
    door: Door, config: BenchConfig, clock: Clock, request: PlannedRequest, at: float | None
) -> Sample:
    limit = config.request_timeout_s + GRACE_S
    return await ask(door, request, clock=clock, timeout_s=limit, planned_s=at)


@contextlib.contextmanager
def _progress(config: BenchConfig, total: int | None) -> Iterator[OnEnd]:
    """A bar on standard error; standard output belongs to the figures."""
    failed = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[trouble]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        # Each refresh takes time from the event loop that measures.
        refresh_per_second=2,
    ) as progress:
        task = progress.add_task(_load(config), total=total, trouble="")

        def on_end(sample: Sample) -> None:
            nonlocal failed
            failed += bool(sample.error)
            progress.update(task, advance=1, trouble=f"{failed} failed" if failed else "")

        yield on_end


def _load(config: BenchConfig) -> str:
    if config.trace:
        return f"trace {Path(config.trace).name} × {config.trace_speed:g}"
    if config.concurrency:
        return f"{config.concurrency} at a time"
    return f"{config.rate:g} requests/s"


def _other_seed(config: BenchConfig) -> BenchConfig:
    return dataclasses.replace(
        config, seed=config.seed + 2**31, requests=max(1, config.warmup), trace="", rate=0.0,
        concurrency=max(1, config.concurrency),
    )  # fmt: skip
