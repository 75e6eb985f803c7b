"""What a client gets of one request: tokens in order, with their text, and how it ended."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.baton.v1 import inference_pb2, worker_pb2
from router.detokenizer import IncrementalDetokenizer
from router.ordering import TokenOrder
from router.stop_strings import Found, StopMatcher

NO_FINISH = inference_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class OutputToken:
    """One token as the client gets it."""

    index: int
    id: int
    text: str
    """What became readable with this token; empty in the middle of a character. A stop string is
    not cut out of it, nor text that is held back for one: what may be shown is `Delta.text`."""
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most likely tokens at this position with their log probabilities, most likely first."""


@dataclass(slots=True)
class Delta:
    """What became ready since the delta before; the last one has finish_reason, usage, report."""

    tokens: list[OutputToken]
    text: str = ""
    """What may be shown now."""
    prompt_tokens: list[OutputToken] = field(default_factory=list)
    """The prompt's tokens with their log probabilities; with the first delta, where asked for."""
    finish_reason: inference_pb2.FinishReason = NO_FINISH
    stop_token_id: int | None = None
    """The stop token that ended the output, where one did; it is not part of the text."""
    stop_text: str | None = None
    """The stop string that ended the output, where one did; it is not part of the text."""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    report: inference_pb2.Report = field(default_factory=inference_pb2.Report)

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
    stop_text: str | None = None


class Output:
    """Collects one output from its workers; the reader takes what is ready.

    Text is made as tokens come, not as they are read: a stop string must end the work on the
    workers also where the reader is slow.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        detokenizer: IncrementalDetokenizer | None,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        """
        Args:
            max_tokens: more are an error of the workers.
            detokenizer: makes the text; None: token ids only.
            stop: checked stop strings; they need a detokenizer.
            min_tokens: a stop string that is complete before this many tokens does not count.
        """
        self.last_at: float | None = None
        """When tokens last became ready. Seconds, monotonic."""
        self._order = TokenOrder(max_tokens=max_tokens)
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop)
        self._min_tokens = min_tokens
        self._prompt_tokens: list[OutputToken] | None = None
        """None: none came yet; empty: given to the reader."""
        self._ready: list[OutputToken] = []
        self._text: list[str] = []
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

    @property
    def ended_by_text(self) -> bool:
        """A stop string ended it: the workers do not know."""
        return self._finish is not None and self._finish.stop_text is not None

    def add(self, message: worker_pb2.RequestOutput) -> int:
        """Takes a worker's tokens; returns how many became ready.

        Raises:
            BatonError: tokens that contradict what is known (DATA_LOSS) or cannot be (INTERNAL).
        """
        if message.prompt_tokens and self._prompt_tokens is None:
            self._prompt_tokens = [_output_token(token) for token in message.prompt_tokens]
        ready = self._order.add(message.tokens)
        if message.finish_reason != NO_FINISH and self._finish is None:
            stop = message.stop_token_id if message.HasField("stop_token_id") else None
            self._finish = Finish(message.finish_reason, self._order.end, stop)
        for count, token in enumerate(ready, start=1):
            found = self._read(token)
            if found.stop is not None:
                self._order.cut(token.index + 1)
                self._finish = Finish(
                    inference_pb2.FINISH_REASON_STOP, token.index + 1, stop_text=found.stop
                )
                ready = ready[:count]
                break
        if ready:
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
        self._text.clear()

    def take(self) -> Delta | None:
        """All that is ready; None where nothing is."""
        finish = self._finish if self.ended else None
        if not self._ready and finish is None:
            return None
        tokens, self._ready = self._ready, []
        delta = Delta(tokens)
        if self._prompt_tokens:
            delta.prompt_tokens, self._prompt_tokens = self._prompt_tokens, []
        if finish is not None:
            if finish.stop_text is None:
                self._release()
            delta.finish_reason, delta.stop_token_id = finish.reason, finish.stop_token_id
            delta.stop_text = finish.stop_text
        delta.text = "".join(self._text)
        self._text.clear()
        return delta

    def _read(self, token: inference_pb2.Token) -> Found:
        finish = self._finish
        stops = (
            finish is not None
            and token.index == finish.end - 1
            and token.id == finish.stop_token_id
        )
        text = ""
        if self._detokenizer is not None and not stops:
            text = self._detokenizer.push(token.id)
        self._ready.append(_output_token(token, text))
        found = self._matcher.push(text, may_stop=token.index + 1 >= self._min_tokens)
        self._text.append(found.text)
        return found

    def _release(self) -> None:
        """The end: what was held back is part of the text after all."""
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        # No stop string ends here: nothing follows that could be withheld for it.
        self._text.append(self._matcher.push(rest, may_stop=False).text + self._matcher.flush())


def _output_token(token: inference_pb2.Token, text: str = "") -> OutputToken:
    logprob = token.logprob if token.HasField("logprob") else None
    top = [(other.id, other.logprob) for other in token.top]
    return OutputToken(token.index, token.id, text, logprob, top)
