"""When a launch is held back, and for how long."""

import random

from engine.scheduler.launch_clock import LaunchClock

STEP_S = 0.008
PREPARE_S = 0.001
JOIN_S = 0.0015
"""More than the least margin, so that whoever expects none is late."""


class Pipeline:
    """A device that takes `step_s` a step, and an engine that holds each launch as it is told."""

    def __init__(self) -> None:
        self.clock = LaunchClock()
        self.now = 100.0
        self.device_free = self.now
        self.ends: list[float] = []
        self.idle_s = 0.0
        self.held: list[float] = []

    def step(
        self,
        step_s: float = STEP_S,
        *,
        tokens: float = 8,
        decode: bool = True,
        joining: bool = False,
    ) -> None:
        held = self.clock.hold_s(self.now, joining=joining)
        self.held.append(held)
        self.now += held
        self.clock.pass_begins(self.now)
        if joining:
            self.clock.joins()
        self.now += PREPARE_S + JOIN_S * joining
        self.clock.launched(self.now, tokens=tokens, decode=decode)
        self.idle_s += max(0.0, self.now - self.device_free)
        self.device_free = max(self.device_free, self.now) + step_s
        self.ends.append(self.device_free)
        if len(self.ends) > 1:
            waited = max(0.0, self.ends[0] - self.now)
            self.now += waited
            self.ends.pop(0)
            self.clock.ended(self.now, waited_s=waited)


def test_steady_steps_are_launched_shortly_before_the_device_is_free() -> None:
    pipeline = Pipeline()
    for _ in range(50):
        pipeline.step()
    pipeline.idle_s = 0.0
    for _ in range(200):
        pipeline.step()
    assert min(pipeline.held[-100:]) > STEP_S - PREPARE_S - 0.002
    assert pipeline.idle_s < 0.01 * 200 * STEP_S


def test_who_joins_is_launched_in_time_and_shortens_no_other_wait() -> None:
    pipeline = Pipeline()
    for index in range(100):
        pipeline.step(joining=index % 5 == 4)
    pipeline.idle_s, pipeline.held = 0.0, []
    for index in range(200):
        pipeline.step(joining=index % 5 == 4)
    waits = [
        min(held for index, held in enumerate(pipeline.held) if (index % 5 == 4) is joins)
        for joins in (False, True)
    ]
    assert waits[0] - waits[1] > 0.8 * JOIN_S
    assert waits[0] > STEP_S - PREPARE_S - 0.002
    assert pipeline.idle_s < 0.01 * 200 * STEP_S


def test_steps_that_grow_shorter_cost_little_idle_time() -> None:
    pipeline = Pipeline()
    for _ in range(20):
        pipeline.step()
    pipeline.idle_s = 0.0
    for index in range(200):
        pipeline.step(STEP_S * (1 - index / 400))
    assert pipeline.idle_s < 0.02 * 200 * STEP_S


def test_prompts_are_expected_by_their_tokens() -> None:
    pipeline = Pipeline()
    for tokens in (100, 1000, 100, 500) * 5:
        pipeline.step(tokens * 25e-6, tokens=tokens, decode=False)
    pipeline.step(1000 * 25e-6, tokens=1000, decode=False)
    pipeline.step(100 * 25e-6, tokens=100, decode=False)
    assert 0.015 < pipeline.held[-1] < 0.025


def test_nothing_is_held_before_anything_is_known_or_while_nothing_runs() -> None:
    clock = LaunchClock()
    assert clock.hold_s(1.0) == 0.0
    clock.launched(1.0, tokens=4, decode=True)
    assert clock.hold_s(1.0) == 0.0
    clock.ended(1.008, waited_s=0.008)
    assert clock.hold_s(1.01) == 0.0
    clock.launched(1.02, tokens=4, decode=True)
    assert clock.hold_s(1.02) > 0.006
    clock.launched(1.021, tokens=4, decode=True)
    assert clock.hold_s(1.021) == 0.0, "two are in the queue: the older one's results come first"


def test_steps_and_hosts_that_vary_still_leave_time_to_listen() -> None:
    draw = random.Random(3)
    pipeline = Pipeline()
    for _ in range(3000):
        pipeline.now += draw.expovariate(1 / 0.001)
        pipeline.step(STEP_S + draw.gauss(0, 0.0012))
    assert sum(held > 0.003 for held in pipeline.held) > 0.85 * 3000
    assert pipeline.idle_s < 0.02 * 3000 * STEP_S
