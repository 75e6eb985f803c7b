"""Tokens by absolute index: two workers speak for one output, and either may be heard first."""

from collections.abc import Iterable

from protos.baton.v1 import inference_pb2
from protos.errors import BatonError, ErrorCode


class TokenOrder:
    """Puts one output's tokens in order, without a gap or a double."""

    def __init__(self, *, max_tokens: int) -> None:
        self.ids: list[int] = []
        """Ids of the tokens so far, without a gap from index 0."""
        self._max_tokens = max_tokens
        self._held: dict[int, inference_pb2.Token] = {}

    def add(self, tokens: Iterable[inference_pb2.Token]) -> list[inference_pb2.Token]:
        """Takes tokens in any order; returns those that are next, in order.

        A double is dropped. Raises BatonError (DATA_LOSS) where it contradicts the first one, and
        INTERNAL for an index that the request cannot have: no answer is better than a wrong one.
        """
        for token in tokens:
            if token.index >= self._max_tokens:
                raise BatonError(
                    ErrorCode.INTERNAL,
                    f"a worker sent token {token.index} of at most {self._max_tokens}",
                )
            known = self._known(token.index)
            if known is None:
                self._held[token.index] = token
            elif known != token.id:
                raise BatonError(
                    ErrorCode.DATA_LOSS,
                    f"two workers disagree on token {token.index}: {known} and {token.id}",
                )
        ready = []
        while (token_next := self._held.pop(len(self.ids), None)) is not None:
            self.ids.append(token_next.id)
            ready.append(token_next)
        return ready

    def _known(self, index: int) -> int | None:
        if index < len(self.ids):
            return self.ids[index]
        held = self._held.get(index)
        return None if held is None else held.id

    @property
    def end(self) -> int:
        """One past the highest index seen, held ones included."""
        return max(self._held, default=len(self.ids) - 1) + 1

    def drop_held(self) -> None:
        """Forgets tokens that wait behind a gap: a replay produces them again."""
        self._held.clear()

    def cut(self, end: int) -> None:
        """The output ends before this index: forgets what is there beyond it."""
        del self.ids[end:]
        self._held.clear()
