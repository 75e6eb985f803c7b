"""Which workers take a request."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from router.worker_link import WorkerLink


@dataclass(frozen=True, slots=True)
class Pair:
    """Who computes a request's two phases: a prefill worker and the decode worker it can write to,
    or a unified worker as both.
    """

    prefill: WorkerLink
    decode: WorkerLink | None
    """None: one token is wanted, so nothing has to move."""

    @property
    def unified(self) -> bool:
        """One worker does both phases, so nothing moves."""
        return self.prefill is self.decode

    def involves(self, instance_ids: frozenset[str]) -> bool:
        return self.prefill.id in instance_ids or (
            self.decode is not None and self.decode.id in instance_ids
        )


class Policy(ABC):
    """Chooses among usable pairs; health, connection and size have been checked before."""

    @abstractmethod
    def choose(self, pairs: Sequence[Pair], *, prompt_tokens: int) -> Pair:
        """Called once per attempt, with at least one pair; must not wait."""


class LeastLoaded(Policy):
    """The prefill worker with the fewest tokens to compute, and the emptiest decode worker.

    A unified worker is judged by the same two figures, of its own. So it takes a request where less
    waits to be computed than at the prefill workers, or as much and more of its rows are free than
    of the decode workers'. Among equals a pair goes first: on it, nobody's prompt delays a token.

    A worker's own figures are up to a ping old and count every router's work; the router's own
    counts are exact but see only its own. The larger of the two is the load. Equal loads take
    turns.
    """

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, pairs: Sequence[Pair], *, prompt_tokens: int) -> Pair:
        self._turn += 1
        turned = [pairs[(self._turn + i) % len(pairs)] for i in range(len(pairs))]
        return min(turned, key=self._load)

    def _load(self, pair: Pair) -> tuple[int, float, bool, int]:
        prefill, decode = pair.prefill, pair.decode
        tokens = max(prefill.pending_tokens, prefill.record.status.queued_tokens)
        if decode is None:
            return tokens, 0.0, False, prefill.requests
        status = decode.record.status
        requests = max(decode.requests, status.running + status.waiting)
        # Workers of unequal size are compared by how full they are.
        rows = max(1, status.rows_total)
        return tokens, requests / rows, pair.unified, prefill.requests
