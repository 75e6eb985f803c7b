"""What the machine sees of each step at its launch, between the scheduler and the runner."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.execution.forward_batch import ForwardBatch, ForwardMode, ForwardResult, SplitRunner
from engine.scheduler.req import Req
from tests.engine.scheduler.machine.chain import ChainRunner


@dataclass(frozen=True)
class Launch:
    """One step, as it was asked for."""

    mode: ForwardMode
    reqs: list[Req]
    extend_lens: list[int]
    prefix_lens: list[int]


class LaunchRecorder:
    """Implements `SplitRunner` in front of another one."""

    def __init__(
        self, runner: SplitRunner, chain: ChainRunner, owner_of_row: Callable[[int], Req]
    ) -> None:
        self._runner = runner
        self._chain = chain
        self._owner_of_row = owner_of_row
        self.launches: list[Launch] = []
        """A step in parts counts once, at its first."""
        self.num_parts = 0

    @property
    def num_layers(self) -> int:
        return self._runner.num_layers

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        self._record(batch)
        return self._runner.forward(batch)

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        self.num_parts += 1
        if first_layer == 0:
            self._record(batch)
        return self._runner.forward_split(batch, first_layer, last_layer)

    def drop_split(self) -> None:
        self._runner.drop_split()

    def _record(self, batch: ForwardBatch) -> None:
        reqs = [self._owner_of_row(row) for row in batch.req_pool_indices.tolist()]
        self._chain.tenants.append([req.extra_key for req in reqs])
        self.launches.append(
            Launch(
                batch.forward_mode, reqs, list(batch.extend_lens), list(batch.extend_prefix_lens)
            )
        )
