"""How long a drain may take."""

import asyncio
import time

from worker.drain import DrainClock


async def test_of_several_limits_the_earliest_counts() -> None:
    clock = DrainClock()
    clock.begin(30.0)
    waiting = asyncio.create_task(clock.in_time())
    await asyncio.sleep(0.05)
    began = time.monotonic()
    clock.begin(0.1)  # noticed though the wait has begun
    clock.begin(60.0)
    assert not await waiting
    assert time.monotonic() - began < 5


async def test_a_drain_that_is_done_ends_the_wait() -> None:
    clock = DrainClock()
    clock.begin(30.0)
    waiting = asyncio.create_task(clock.in_time())
    await asyncio.sleep(0)
    clock.done.set()
    assert await asyncio.wait_for(waiting, 5)


async def test_no_time_at_all_still_sees_that_nothing_is_held() -> None:
    clock = DrainClock()
    clock.begin(0.0)
    assert not await clock.in_time()
    clock.start_again(0.05)
    assert not await clock.in_time()
    clock.done.set()
    assert await clock.in_time()
