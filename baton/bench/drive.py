"""Sends a plan: at its own times (open loop), or one request after another (closed loop)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from baton.bench.doors import Clock
from baton.bench.plan import PlannedRequest
from baton.bench.sample import Sample

PROBE_S = 0.01

Ask = Callable[[PlannedRequest, float | None], Awaitable[Sample]]
"""Sends a request, planned for a time or for now, and returns its sample."""
OnEnd = Callable[[Sample], None]


async def drive_open(
    plan: Sequence[PlannedRequest], ask: Ask, *, clock: Clock, on_end: OnEnd
) -> list[Sample]:
    """Sends each request when it is due, however many are under way; all samples, by index."""

    async def one(request: PlannedRequest) -> Sample:
        sample = await ask(request, request.at_s)
        on_end(sample)
        return sample

    tasks: list[asyncio.Task[Sample]] = []
    async with asyncio.TaskGroup() as group:
        for request in plan:
            await asyncio.sleep(max(0.0, request.at_s - clock()))
            tasks.append(group.create_task(one(request)))
    return [task.result() for task in tasks]


async def drive_closed(
    plan: Iterator[PlannedRequest],
    ask: Ask,
    *,
    concurrency: int,
    bound_s: float,
    clock: Clock,
    on_end: OnEnd,
) -> list[Sample]:
    """Keeps so many requests under way until the plan or the time is over; samples by index."""
    samples: list[Sample] = []

    async def client() -> None:
        while clock() < bound_s:
            request = next(plan, None)
            if request is None:
                return
            sample = await ask(request, None)
            samples.append(sample)
            on_end(sample)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return sorted(samples, key=lambda sample: sample.index)


@contextlib.asynccontextmanager
async def lag_probe() -> AsyncIterator[list[float]]:
    """How late this event loop wakes a sleeper, in ms: what it adds to every time it takes."""
    lags: list[float] = []
    loop = asyncio.get_running_loop()

    async def probe() -> None:
        while True:
            began = loop.time()
            await asyncio.sleep(PROBE_S)
            lags.append(max(0.0, loop.time() - began - PROBE_S) * 1e3)

    task = asyncio.create_task(probe(), name="lag probe")
    try:
        yield lags
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
