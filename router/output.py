"""What a client gets of one request: tokens in order, with their text, and how it ended."""

import time
from dataclasses import dataclass, field

from protos.baton.v1 import inference_pb2, worker_pb2
from router.detokenizer import IncrementalDetokenizer
from router.ordering import TokenOrder

NO_FINISH = inference_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class OutputToken:
    """One token as the client gets it."""

    index: int
    id: int
    text: str
    """What became readable with this token; empty in the middle of a character."""
    logprob: float | None = None


@dataclass(slots=True)
class Delta:
    """What became ready since the delta before; the last one has finish_reason, usage, report."""

    tokens: list[OutputToken]
    tail: str = ""
    """Text that was held back and that no token completed; with the last delta only."""
    finish_reason: inference_pb2.FinishReason = NO_FINISH
    stop_token_id: int | None = None
    """The stop token that ended the output, where one did; it is not part of the text."""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    report: inference_pb2.Report = field(default_factory=inference_pb2.Report)

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.tail

    @property
    def last(self) -> bool:
        return self.finish_reason != NO_FINISH

    @property
    def finish_name(self) -> str:
        """stop, length or abort; empty before the end."""
        name = inference_pb2.FinishReason.Name(self.finish_reason).removeprefix("FINISH_REASON_")
        return name.lower() if self.last else ""


@dataclass(frozen=True, slots=True)
class Finish:
    """How the output ends, known perhaps before its last tokens have arrived."""

    reason: inference_pb2.FinishReason
    end: int
    """Tokens of the whole output."""
    stop_token_id: int | None = None


class Output:
    """Collects one output from its workers; the reader takes what is ready."""

    def __init__(self, *, max_tokens: int, detokenizer: IncrementalDetokenizer | None) -> None:
        self.last_at: float | None = None
        """When tokens last became ready. Seconds, monotonic."""
        self._order = TokenOrder(max_tokens=max_tokens)
        self._detokenizer = detokenizer
        self._ready: list[inference_pb2.Token] = []
        self._finish: Finish | None = None

    @property
    def ids(self) -> list[int]:
        """Ids of the tokens so far, without a gap from index 0, taken by the reader or not."""
        return self._order.ids

    @property
    def waiting(self) -> int:
        """Tokens that the reader has not taken."""
        return len(self._ready)

    @property
    def ended(self) -> bool:
        """The finish is known and all tokens up to it are here."""
        return self._finish is not None and len(self.ids) >= self._finish.end

    def add(self, message: worker_pb2.RequestOutput) -> int:
        """Takes a worker's tokens; returns how many became ready.

        Raises:
            BatonError: tokens that contradict what is known (DATA_LOSS) or cannot be (INTERNAL).
        """
        ready = self._order.add(message.tokens)
        if message.finish_reason != NO_FINISH and self._finish is None:
            stop = message.stop_token_id if message.HasField("stop_token_id") else None
            self._finish = Finish(message.finish_reason, self._order.end, stop)
        if ready:
            self._ready += ready
            self.last_at = time.monotonic()
        return len(ready)

    def restart(self) -> None:
        """A replay begins: what waited behind a gap comes again, and so does the finish."""
        self._order.drop_held()
        self._finish = None

    def abort(self) -> None:
        """Ends the output with the tokens that are here."""
        self.restart()
        self._finish = Finish(inference_pb2.FINISH_REASON_ABORT, len(self.ids))

    def drop_ready(self) -> None:
        """The reader will get nothing more."""
        self._ready.clear()

    def take(self) -> Delta | None:
        """All that is ready; None where nothing is."""
        finish = self._finish if self.ended else None
        if not self._ready and finish is None:
            return None
        tokens, self._ready = self._ready, []
        delta = Delta([self._read(token, finish) for token in tokens])
        if finish is not None:
            delta.tail = self._detokenizer.flush() if self._detokenizer is not None else ""
            delta.finish_reason, delta.stop_token_id = finish.reason, finish.stop_token_id
        return delta

    def _read(self, token: inference_pb2.Token, finish: Finish | None) -> OutputToken:
        stops = (
            finish is not None
            and token.index == finish.end - 1
            and token.id == finish.stop_token_id
        )
        text = ""
        if self._detokenizer is not None and not stops:
            text = self._detokenizer.push(token.id)
        logprob = token.logprob if token.HasField("logprob") else None
        return OutputToken(token.index, token.id, text, logprob)
