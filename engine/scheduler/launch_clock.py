"""When the next step must be launched, so that the device does not wait and late comers still join.

With overlap, step N + 1 could be launched as soon as step N has begun. Whatever arrives after that
(KV that has landed, a prompt, a question for memory) would wait for the end of N and for all of
N + 1: at 8 ms a decode step that is most of a handover. So the engine holds the launch back until
shortly before N is expected to end, and listens meanwhile.

The expectation is made of steps seen here: decode steps change slowly from one to the next, and
prompts take time by the token. A launch that came too late shows: the device was done before
anybody asked. Then the margin grows. Of decode steps some are let be late, by a fraction of a
millisecond: were none, whoever arrives in the middle of one would be heard at its end, since
arrivals themselves are what disturbs the expectation. Who has arrived is known, though: to take
somebody in takes longer than to go on, and the two are expected apart.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_NEWEST = 0.3
"""Weight of the newest reading in a running mean."""

_LEAST_MARGIN_S = 0.0005


@dataclass(frozen=True, slots=True)
class _Margin:
    """How the margin of one kind of steps moves with each that ends."""

    late: float
    in_time: float
    largest_s: float

    def after(self, margin_s: float, *, late: bool) -> float:
        grown = margin_s * (self.late if late else self.in_time)
        return min(max(grown, _LEAST_MARGIN_S), self.largest_s)


_OF_EXTENDS = _Margin(late=1.5, in_time=0.99, largest_s=0.02)
"""One in forty is late at most: prompts differ, and a late one costs a large step much."""

_OF_DECODE = _Margin(late=1.1, in_time=0.98, largest_s=0.004)
"""One in six is late at most."""

_LATE_S = 0.0001
"""A wait for the device shorter than this: it had ended already, or nearly."""


@dataclass(slots=True)
class _Running:
    tokens: float
    decode: bool
    started: float
    """time.monotonic() seconds."""
    known: bool
    """Whether it began just then; else no sooner, as the step before it ended unseen."""


class LaunchClock:
    """Told of every launch and every end; all times are time.monotonic() seconds."""

    def __init__(self) -> None:
        self._steps: deque[_Running] = deque()
        self._decode_s = 0.0
        self._extend_s_per_token = 0.0
        self._prepare_s = {False: 0.0, True: 0.0}
        """Of passes in which somebody joins, and of others, which take less."""
        self._joining = False
        self._pass_began = 0.0
        self._margins_s = {True: _LEAST_MARGIN_S, False: _LEAST_MARGIN_S}
        """Of decode steps, and of others."""

    def pass_begins(self, now: float) -> None:
        """The next launch is being prepared."""
        self._pass_began = now
        self._joining = False

    def joins(self) -> None:
        """Somebody new is taken into the batch that is being prepared."""
        self._joining = True

    def launched(self, now: float, *, tokens: float, decode: bool) -> None:
        """A step of `tokens` input tokens (or a part of it, as of so many) is in the queue."""
        if self._pass_began:
            known = self._prepare_s[self._joining]
            self._prepare_s[self._joining] = _mean(known, now - self._pass_began)
            self._pass_began = 0.0
        self._steps.append(_Running(tokens, decode, now, known=not self._steps))

    def ended(self, now: float, *, waited_s: float) -> None:
        """The oldest step's results are here, after a wait of `waited_s`."""
        if not self._steps:
            return
        step = self._steps.popleft()
        seen = waited_s > _LATE_S
        if seen and step.known:
            took = now - step.started
            if step.decode:
                self._decode_s = _mean(self._decode_s, took)
            else:
                self._extend_s_per_token = _mean(self._extend_s_per_token, took / step.tokens)
        if self._steps:
            if seen:
                # The next one was in the queue: it began when this one ended.
                self._steps[0].started, self._steps[0].known = now, True
            rule = _OF_DECODE if step.decode else _OF_EXTENDS
            margin_s = self._margins_s[step.decode]
            self._margins_s[step.decode] = rule.after(margin_s, late=not seen)

    def hold_s(self, now: float, *, joining: bool = False) -> float:
        """Seconds for which nothing need be launched; 0 where that is not known. `joining`: whether
        somebody waits to be taken in."""
        if len(self._steps) != 1:
            return 0.0
        step = self._steps[0]
        expected = self._decode_s if step.decode else self._extend_s_per_token * step.tokens
        ends = step.started + expected
        prepare_s = max(self._prepare_s.values()) if joining else self._prepare_s[False]
        return max(0.0, ends - self._margins_s[step.decode] - prepare_s - now)


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else old + _NEWEST * (new - old)
