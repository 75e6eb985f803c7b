"""What a grammar library must offer, so that it can be exchanged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.grammar.spec import Grammar

if TYPE_CHECKING:
    import torch

    from engine.execution.token_mask import MaskBuffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Endings:
    """How one request may end, beside what its grammar says."""

    allowed: frozenset[int] = frozenset()
    """Tokens that end the output; may be drawn wherever the text so far is complete."""
    held_back: frozenset[int] = frozenset()
    """Tokens that may not be drawn among the first `min_tokens` outputs, while there are others."""
    min_tokens: int = 0


class GrammarMatcher(ABC):
    """Where one request stands in its grammar. Used by the scheduler's thread only.

    Nothing here raises for what a client's grammar does: the first thing that goes wrong is kept
    in `error`, from then on every token is allowed, and the scheduler ends the request with it.
    """

    error: EngineError | None = None
    """Why the request cannot go on; None: all is well."""

    backend: GrammarBackend

    @abstractmethod
    def advance(self, token: int) -> None:
        """Called exactly once for each output, in order, with the first to the last; a token that
        ends the request by being in `Endings.allowed` is none of the text's."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the text so far is complete and nothing may follow it."""


class CompiledGrammar(ABC):
    """A grammar ready for use; shared by all requests that sent the same."""

    @abstractmethod
    def matcher(self, endings: Endings) -> GrammarMatcher:
        """A new one, before the first output. Safe from any thread; quick."""


class GrammarBackend(ABC):
    """One tokenizer's grammars."""

    buffer: MaskBuffer
    """Where masks are filled; for the scheduler's thread."""

    @property
    @abstractmethod
    def mask_words(self) -> int:
        """int32 words of a mask; bit `t % 32` of word `t // 32` is token `t`."""

    @abstractmethod
    def warm_up(self) -> None:
        """Does what every grammar needs (the tokenizer's tables). Safe from any thread, repeatable.

        Raises `GrammarsUnavailableError`.
        """

    @abstractmethod
    def compile(self, grammar: Grammar, *, limit_s: float) -> CompiledGrammar:
        """Called on a compiler's thread, by several at once; blocks for `limit_s` seconds or a
        little more at most.

        Raises `InvalidRequestError` for a grammar that is wrong, asks for what the library does not
        have, or does not compile within the limits; `GrammarsUnavailableError`.
        """

    @abstractmethod
    def fill_masks(self, matchers: Sequence[GrammarMatcher], masks: torch.Tensor) -> None:
        """Writes each matcher's mask into its row of `masks` [n, mask_words] int32, on the host.
        A row is never empty. What goes wrong is left in the matcher."""

    @abstractmethod
    def close(self) -> None:
        """Ends helper processes; a compilation that runs fails."""
