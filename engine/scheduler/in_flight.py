"""Steps that were launched and whose results are not handled yet (scheduling.md section 7).

With overlap there is one between two passes, and two while a pass handles the older one. The batch
and its requests have gone on by then, so a step carries what it was at its launch.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.execution.forward_batch import ForwardResult, PendingResult, PromptTargets, TopRows
from engine.memory.pools import MemoryPools
from engine.scheduler.launch_clock import LaunchClock
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch


class ExtendSpan(NamedTuple):
    """What one request's extend computes."""

    start: int
    """Its first position."""
    end: int
    """The position after its last."""
    draws: bool
    """Whether it reaches the last token known, so that the token drawn after it counts."""


@dataclass(eq=False, kw_only=True, slots=True)
class LaunchedStep:
    """One forward, from its launch until its results are handled."""

    reqs: list[Req]
    spans: list[ExtendSpan]
    """Of the first requests, which extend; those after them decode."""
    top: TopRows | None
    prompt_targets: PromptTargets | None
    result: PendingResult = field(init=False)
    """Set when the whole step is launched."""
    launched_at: float
    """time.monotonic() seconds."""
    split_reqs: list[Req] = field(default_factory=list)
    """Of a step that ran in parts: whose layers this part computed. Before the last part `reqs` is
    empty, as nothing is drawn."""
    layers: range = range(0)
    """Those layers."""
    parked_pages: list[int] = field(default_factory=list)
    """Pages that nobody owns any more but this step or one before it may touch."""


class StepsInFlight:
    """The launched steps, oldest first."""

    def __init__(self, memory: MemoryPools) -> None:
        self._memory = memory
        self._steps: deque[LaunchedStep] = deque()
        self.clock = LaunchClock()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def newest(self) -> LaunchedStep:
        """Launched last; there must be one."""
        return self._steps[-1]

    def begin(self, batch: ScheduleBatch) -> LaunchedStep:
        """A batch's step is about to be launched. It counts from now on, as the steps before may be
        handled half-way through its launch: where a grammar decides what may be drawn, the layers
        are launched first, and the draw when the tokens before are known."""
        for req in batch.reqs:
            req.in_flight += 1
        step = _step_of(batch, extend_spans(batch))
        self._steps.append(step)
        return step

    def give_up(self) -> None:
        """The step begun last could not be launched. What waited for its end waits for the one
        before; its requests count as in flight until whoever calls ends them."""
        step = self._steps.pop()
        if self._steps:
            self._steps[-1].parked_pages.extend(step.parked_pages)
        else:
            self._memory.free_pages(step.parked_pages)

    def launched(self, step: LaunchedStep, batch: ScheduleBatch, result: ForwardResult) -> None:
        """All of it is on its way."""
        step.result = result.start_copy()
        self.clock.launched(
            time.monotonic(), tokens=batch.num_input_tokens, decode=batch.forward_mode.is_decode()
        )

    def launched_part(
        self,
        batch: ScheduleBatch,
        result: ForwardResult,
        *,
        spans: list[ExtendSpan],
        layers: range,
        of: int,
    ) -> None:
        """Some layers `of` all of a batch's step are on their way; whoever splits it has counted
        its requests as in flight."""
        step = _step_of(batch, spans)
        step.result = result.start_copy()
        step.split_reqs, step.layers = batch.reqs, layers
        if layers.stop < of:
            step.reqs, step.prompt_targets = [], None
        self._steps.append(step)
        share = len(layers) / of
        self.clock.launched(time.monotonic(), tokens=batch.num_input_tokens * share, decode=False)

    def oldest_ended(self) -> tuple[LaunchedStep, ForwardResult]:
        """Waits for the oldest step's end; from now on it is not in flight."""
        asked = time.monotonic()
        result = self._steps[0].result.wait()
        now = time.monotonic()
        self.clock.ended(now, waited_s=now - asked)
        step = self._steps.popleft()
        self._memory.free_pages(step.parked_pages)
        self._measure(step)
        return step, result

    def _measure(self, step: LaunchedStep) -> None:
        """How fast prompts are computed here decides what becomes of retracted requests' KV. With
        overlap a step counts from its launch on, which is a little too long."""
        retracted = self._memory.retracted
        if retracted is None or not step.spans or len(step.spans) < len(step.reqs):
            return
        if not step.split_reqs:
            num_tokens = sum(span.end - span.start for span in step.spans)
            retracted.prefill_rate.observe(num_tokens, time.monotonic() - step.launched_at)

    def hold_s(self, *, joining: bool) -> float:
        """See LaunchClock.hold_s; nothing is expected of a step that has ended already."""
        hold_s = self.clock.hold_s(time.monotonic(), joining=joining)
        return 0.0 if hold_s > 0 and self._steps[0].result.ready() else hold_s

    @property
    def parked_pages(self) -> list[int]:
        """For the audit: pages that wait for a step's end."""
        return [page for step in self._steps for page in step.parked_pages]

    def cache_unfinished_req(self, req: Req, *, replace_duplicates: bool = True) -> None:
        """The tree's method of that name, for KV that ended steps have written. Own pages that the
        tree's replace go back when the last launched step that may read them has ended."""
        parked = self._steps[-1].parked_pages if req.in_flight and self._steps else None
        with self._memory.allocator.parking(parked):
            self._memory.tree_cache.cache_unfinished_req(
                req, replace_duplicates=replace_duplicates, computed_len=req.kv_ready_len
            )


def extend_spans(batch: ScheduleBatch) -> list[ExtendSpan]:
    """What the extends of a prepared batch compute."""
    num_extends = 0
    if batch.forward_mode.is_extend():
        num_extends = len(batch.reqs) - batch.num_decode_rows
    return [
        ExtendSpan(req.prefix_len, req.kv_committed_len, req.prompt_done)
        for req in batch.reqs[:num_extends]
    ]


def _step_of(batch: ScheduleBatch, spans: list[ExtendSpan]) -> LaunchedStep:
    return LaunchedStep(
        reqs=batch.reqs,
        spans=spans,
        top=batch.sampling.top if batch.sampling is not None else None,
        prompt_targets=batch.prompt_targets,
        launched_at=time.monotonic(),
    )
