"""A prompt's step, a few layers at a time (scheduling.md section 4).

A long chunk keeps those who decode waiting. In parts, each part is followed by a decode step of the
running batch, and what a part has computed may leave before the last layer is done. The batch under
way keeps rows and pages as any extend does; until its last part has run no other prompt starts, and
none of its KV is lent, since its upper layers do not exist yet.
"""

from collections.abc import Callable

from engine.errors import ConfigError, EngineError
from engine.execution.forward_batch import BatchRunner, ForwardBatch, SplitRunner
from engine.scheduler.in_flight import ExtendSpan, StepsInFlight, extend_spans
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.schedule_batch import ScheduleBatch


class SplitPrefill:
    """The one extend that is under way in parts, if any."""

    def __init__(
        self,
        layers_at_a_time: int,
        runner: BatchRunner,
        in_flight: StepsInFlight,
        lifecycle: RequestLifecycle,
    ) -> None:
        """Raises `ConfigError` where parts are asked of a runner that computes steps whole."""
        self._runner: SplitRunner | None = None
        if layers_at_a_time:
            if not isinstance(runner, SplitRunner):
                raise ConfigError(
                    f"split_prefill_layers is {layers_at_a_time}, but {type(runner).__name__} "
                    "computes all layers of a step at once"
                )
            if layers_at_a_time < runner.num_layers:
                self._runner = runner
        self._layers_at_a_time = layers_at_a_time
        self._in_flight = in_flight
        self._lifecycle = lifecycle
        self.batch: ScheduleBatch | None = None
        """Whose parts are not all launched."""
        self._spans: list[ExtendSpan] = []
        self._forward_batch: ForwardBatch | None = None
        self._next_layer = 0
        self._decode_is_next = False

    @property
    def enabled(self) -> bool:
        """Whether extends run in parts; one part with all layers is none."""
        return self._runner is not None

    def begin(self, batch: ScheduleBatch) -> None:
        """Takes a prepared extend. Its requests count as in flight until the last part is handled,
        so whoever of them ends meanwhile keeps its pages."""
        batch.prepare_for_split_prefill()
        self.batch, self._spans = batch, extend_spans(batch)
        self._forward_batch = batch.to_forward_batch()
        self._next_layer = 0
        self._decode_is_next = False
        for req in batch.reqs:
            req.in_flight += 1

    def decode_is_next(self) -> bool:
        """Whose turn it is; asked once a pass. Parts and decode steps take turns."""
        turn, self._decode_is_next = self._decode_is_next, False
        return turn

    def launch_part(self) -> int:
        """Launches the next layers; returns the input tokens that this begins to compute. After the
        last ones the batch is an extend like any other."""
        batch, runner, forward_batch = self.batch, self._runner, self._forward_batch
        if batch is None or runner is None or forward_batch is None:
            return 0
        first = self._next_layer
        last = min(first + self._layers_at_a_time, runner.num_layers)
        result = runner.forward_split(forward_batch, first, last)
        self._in_flight.launched_part(
            batch, result, spans=self._spans, layers=range(first, last), of=runner.num_layers
        )
        self._next_layer = last
        self._decode_is_next = True
        if last == runner.num_layers:
            batch.output_ids = result.next_token_ids
            self._forget()
        return batch.num_input_tokens if first == 0 else 0

    def drop_if_nobody_waits(self, settle: Callable[[], None]) -> None:
        """Gives the batch up where all its requests were aborted. `settle` waits for the parts that
        are launched."""
        batch, runner = self.batch, self._runner
        if batch is None or runner is None or not all(req.finished() for req in batch.reqs):
            return
        settle()
        self.give_up(None)

    def give_up(self, error: EngineError | None) -> None:
        """The batch is not continued, and no part of it is in flight: whoever of it has not ended
        ends with `error`."""
        batch, runner, spans = self.batch, self._runner, self._spans
        self._forget()
        if batch is None or runner is None:
            return
        runner.drop_split()
        for req, span in zip(batch.reqs, spans, strict=True):
            # The rest lacks its upper layers.
            self._lifecycle.on_step_lost(req, kv_len=span.start, error=error)

    def _forget(self) -> None:
        self.batch, self._forward_batch, self._spans = None, None, []
