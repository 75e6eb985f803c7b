"""A device that is as late as it can be: steps run when somebody waits for them, not before.

`AsyncRunner` wraps any `BatchRunner`. What it draws are placeholders, negative numbers that the
scheduler may carry from step to step like tokens of a device, and that show wherever a host takes
them for real ones. A step runs, in launch order, when its result is waited for. Until then its
pages must stay those of the launch: a page that is free or was granted again in between is an
error, as it would be for a device that still reads it.

The masks of grammars are asked for at a step's launch, as a real runner does behind the layers:
whatever they depend on must be known then, or made known.

Batches with penalties count their drawn tokens in place, which no placeholder can do: with
`late=False` steps run at their launch, and only their results come late.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.execution.forward_batch import (
    BatchRunner,
    ForwardBatch,
    ForwardResult,
    SplitRunner,
)
from engine.execution.token_mask import TokenMask
from engine.memory.pools import MemoryPools


class PageTakenAwayError(AssertionError):
    """A page of a launched step went to somebody else before the step had ended."""


@dataclass(frozen=True, kw_only=True)
class LateResult(ForwardResult):
    """Placeholders; `start_copy` gives what `wait` waits for."""

    copy: "LateCopy"

    def start_copy(self) -> "LateCopy":
        return self.copy


class LateCopy:
    """`PendingResult` of one launched step."""

    def __init__(self, runner: "AsyncRunner", number: int) -> None:
        self._runner = runner
        self._number = number

    def wait(self) -> ForwardResult:
        return self._runner.result_of(self._number)

    def ready(self) -> bool:
        return False  # nothing ends before somebody asks


@dataclass(frozen=True)
class Launched:
    number: int
    run: Callable[[], ForwardResult]
    generations: dict[int, int]
    """Of each page it reads or writes, at its launch."""
    placeholders: torch.Tensor


class AsyncRunner:
    """Implements `BatchRunner` over another one, and `SplitRunner` where that one does."""

    def __init__(self, inner: BatchRunner, memory: MemoryPools, *, late: bool = True) -> None:
        self.inner = inner
        self.deepest = 0
        """Most steps that were ever launched and not waited for."""
        self._allocator = memory.allocator
        self._late = late
        self._launched: deque[Launched] = deque()
        self._results: dict[int, ForwardResult] = {}
        self._tokens: dict[int, int] = {}
        self._masks: dict[int, torch.Tensor] = {}
        """Of launched steps with grammars."""
        self._steps = 0
        self._draws = 0

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        return self._launch(batch, self.inner.forward, draws=len(batch.seq_lens_cpu))

    @property
    def num_layers(self) -> int:
        return self._split_runner.num_layers

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        def part(batch: ForwardBatch) -> ForwardResult:
            return self._split_runner.forward_split(batch, first_layer, last_layer)

        whole = last_layer == self.num_layers
        return self._launch(batch, part, draws=len(batch.seq_lens_cpu) if whole else 0)

    def drop_split(self) -> None:
        if self._launched:
            raise AssertionError("a batch is dropped while its parts may run")
        self._split_runner.drop_split()

    @property
    def _split_runner(self) -> SplitRunner:
        if not isinstance(self.inner, SplitRunner):
            raise AssertionError(f"{type(self.inner).__name__} computes steps whole")
        return self.inner

    def _launch(
        self, batch: ForwardBatch, step: Callable[[ForwardBatch], ForwardResult], *, draws: int
    ) -> ForwardResult:
        self._steps += 1
        if self._late:
            placeholders = -torch.arange(self._draws + 1, self._draws + draws + 1)
            self._draws += draws
            shown = ForwardResult(placeholders, None)
            as_launched = replace(
                batch,
                req_to_token=batch.req_to_token.clone(),
                pages=None if batch.pages is None else [list(pages) for pages in batch.pages],
            )
            run = self._later(step, as_launched, self._steps)
        else:
            shown = step(batch)
            placeholders = shown.next_token_ids[:0]
            run = _already(shown)
        number = self._steps
        self._launched.append(Launched(number, run, self._generations(batch), placeholders))
        self.deepest = max(self.deepest, len(self._launched))
        if draws and self._late:
            self._fetch_masks(number, batch)
        return LateResult(shown.next_token_ids, None, copy=LateCopy(self, number))

    def _fetch_masks(self, number: int, batch: ForwardBatch) -> None:
        edits = batch.sampling.edits
        if edits is not None and edits.mask is not None:
            self._masks[number] = edits.mask.masks().clone()

    def result_of(self, number: int) -> ForwardResult:
        """Runs all steps up to `number`, and none after it."""
        self.run_up_to(number)
        return self._results.pop(number)

    @property
    def last_step(self) -> int:
        """Number of the step that was launched last."""
        return self._steps

    def run_up_to(self, number: int) -> None:
        """As a copy behind that step does."""
        while self._launched and self._launched[0].number <= number:
            step = self._launched.popleft()
            self._check_pages(step)
            result = step.run()
            drawn = result.next_token_ids.tolist()
            self._tokens.update(zip(step.placeholders.tolist(), drawn, strict=False))
            self._results[step.number] = result

    def check_pages(self) -> None:
        """Raises `PageTakenAwayError` if a launched step has lost a page by now."""
        for step in self._launched:
            self._check_pages(step)

    def _later(
        self,
        step: Callable[[ForwardBatch], ForwardResult],
        batch: ForwardBatch,
        number: int,
    ) -> Callable[[], ForwardResult]:
        def run() -> ForwardResult:
            ids = [self._tokens[i] if i < 0 else i for i in batch.input_ids.tolist()]
            known = replace(batch, input_ids=torch.tensor(ids, dtype=torch.int64))
            return step(self._with_masks(known, number))

        return run

    def _with_masks(self, batch: ForwardBatch, number: int) -> ForwardBatch:
        masks, edits = self._masks.pop(number, None), batch.sampling.edits
        if masks is None or edits is None or edits.mask is None:
            return batch
        mask = TokenMask(rows=edits.mask.rows, masks=lambda: masks)
        sampling = replace(batch.sampling, edits=replace(edits, mask=mask))
        return replace(batch, sampling=sampling)

    def _generations(self, batch: ForwardBatch) -> dict[int, int]:
        pages: set[int] = set()
        size = self._allocator.page_size
        for row, length in zip(batch.req_pool_indices.tolist(), batch.seq_lens_cpu, strict=True):
            pages.update((batch.req_to_token[row, :length:size] // size).tolist())
        return {page: self._allocator.generation(page) for page in pages}

    def _check_pages(self, step: Launched) -> None:
        for page, generation in step.generations.items():
            if self._allocator.is_free(page) or self._allocator.generation(page) != generation:
                raise PageTakenAwayError(
                    f"page {page} of step {step.number} is free or somebody else's before the "
                    "step has ended"
                )


def _already(result: ForwardResult) -> Callable[[], ForwardResult]:
    return lambda: result
