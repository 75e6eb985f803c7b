"""How much of a running request's possible output is expected to be produced.

Counting all of it would leave memory idle (most requests stop early), counting none of it would
retract all the time; so the estimate sinks while nothing is retracted and jumps up when something
is (scheduling.md section 3).
"""

INITIAL_RATIO = 0.7
MIN_SHARE = 0.14
"""The floor, as a share of the initial ratio."""
DECAY_STEPS = 600
"""Decode steps without retraction from the initial ratio to the floor."""


class NewTokenRatio:
    """The estimate, updated by the scheduler at each decode step."""

    def __init__(self, schedule_conservativeness: float = 1.0) -> None:
        self.initial = min(INITIAL_RATIO * schedule_conservativeness, 1.0)
        self.floor = self.initial * MIN_SHARE
        self._decay = (self.initial - self.floor) / DECAY_STEPS
        self.current = self.initial

    def on_decode(self) -> None:
        """After a check that found memory for a decode step."""
        self.current = max(self.current - self._decay, self.floor)

    def on_retraction(self, ratio: float) -> None:
        """`ratio` is what `retract_decode` computed of those it kept."""
        self.current = ratio

    def on_idle(self) -> None:
        self.current = self.initial
