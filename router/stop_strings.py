"""Stop strings: texts that end an output wherever they begin or end within tokens.

The text is read character by character, so what is found does not depend on how it was cut into
tokens: the stop string that is complete first ends the output, and of several complete at the same
character the longest. Text that may be the beginning of one is held back until it is known. Each
string is followed by its own Knuth-Morris-Pratt automaton: linear in the text, and two bytes of
memory for each character of a stop string.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from protos.errors import BatonError, ErrorCode

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
"""Of one stop string."""


def check_stop(stop: Sequence[str], *, most: int = MAX_STOP_STRINGS) -> tuple[str, ...]:
    """The stop strings without doubles.

    Raises:
        BatonError: INVALID_ARGUMENT; too many, too long, or an empty one.
    """
    if len(stop) > most:
        raise _invalid(f"stop has {len(stop)} strings; at most {most} are taken")
    for text in stop:
        if not text:
            raise _invalid("stop contains an empty string, which every text contains")
        if len(text) > MAX_STOP_CHARACTERS:
            raise _invalid(
                f"stop contains a string of {len(text)} characters; at most {MAX_STOP_CHARACTERS} "
                "are taken"
            )
    return tuple(dict.fromkeys(stop))


@dataclass(frozen=True, slots=True)
class Found:
    """What a piece of text brought."""

    text: str
    """Certain to be part of the output."""
    stop: str | None = None
    """The stop string that ended the output; nothing after it is read."""


class StopMatcher:
    """Finds the first stop string in one output."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Args: checked stop strings (`check_stop`)."""
        self._automata = [_Automaton(text) for text in sorted(stop, key=len, reverse=True)]
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> Found:
        """Reads more of the output.

        Args:
            text: what was added.
            may_stop: False: a stop string that is complete in this piece does not count.
        """
        if not self._automata:
            return Found(text)
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = None
            for automaton in self._automata:  # the longest first
                if automaton.step(character) and complete is None:
                    complete = automaton.text
            if complete is not None and may_stop:
                self._held = ""
                return Found(pending[: end - len(complete)], complete)
        held = max(automaton.matched for automaton in self._automata)
        certain = len(pending) - held
        self._held = pending[certain:]
        return Found(pending[:certain])

    def flush(self) -> str:
        """What was held back, at the end of an output without a stop string."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters of `text` that the input ends with; fewer than all."""
        # For each prefix: the longest shorter prefix that it also ends with.
        self._fallback = array("H", [0])
        longest = 0
        for character in text[1:]:
            while longest and text[longest] != character:
                longest = self._fallback[longest - 1]
            longest += text[longest] == character
            self._fallback.append(longest)

    def step(self, character: str) -> bool:
        """Whether `text` is complete with this character."""
        text, matched = self.text, self.matched
        while matched and text[matched] != character:
            matched = self._fallback[matched - 1]
        matched += text[matched] == character
        complete = matched == len(text)
        self.matched = self._fallback[matched - 1] if complete else matched
        return complete


def _invalid(message: str) -> BatonError:
    return BatonError(ErrorCode.INVALID_ARGUMENT, message, param="stop")
