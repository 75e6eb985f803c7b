"""What the leading rank tells the others of a step, beside the numbers that go from device to
device."""

from dataclasses import dataclass
from enum import IntEnum, auto

import numpy as np

from engine.execution.forward_batch import ForwardMode

_HEADER = 6


class StepKind(IntEnum):
    """Which of the runner's methods every rank calls."""

    FORWARD = auto()
    FORWARD_SPLIT = auto()
    DROP_SPLIT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommand:
    """One step; lists as in ForwardBatch."""

    kind: StepKind
    mode: ForwardMode = ForwardMode.IDLE
    first_layer: int = 0
    last_layer: int = 0
    num_prompt_targets: int = -1
    """-1: nobody wants log probabilities of the prompt."""
    seq_lens: tuple[int, ...] = ()
    extend_prefix_lens: tuple[int, ...] = ()
    extend_lens: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        header = (
            self.kind,
            self.mode.value,
            self.first_layer,
            self.last_layer,
            self.num_prompt_targets,
            len(self.seq_lens),
        )
        lists = (*self.seq_lens, *self.extend_prefix_lens, *self.extend_lens)
        return np.array(header + lists, dtype=np.int64).tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "StepCommand":
        numbers: list[int] = np.frombuffer(data, dtype=np.int64).tolist()
        kind, mode, first_layer, last_layer, targets, rows = numbers[:_HEADER]
        lists = [tuple(numbers[_HEADER + i * rows :][:rows]) for i in range(3)]
        return StepCommand(
            kind=StepKind(kind),
            mode=ForwardMode(mode),
            first_layer=first_layer,
            last_layer=last_layer,
            num_prompt_targets=targets,
            seq_lens=lists[0],
            extend_prefix_lens=lists[1],
            extend_lens=lists[2],
        )
