"""What one pass of the scheduler produced."""

from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.scheduler.logprobs import Alternatives, PromptToken
from engine.scheduler.req import FinishReason
from engine.types import RequestId


@dataclass(slots=True)
class TokenOutput:
    """One token of one request. Neither frozen nor with keywords only, as one is made for every
    token and either would take three times as long to make.
    """

    rid: RequestId
    token: int
    index: int
    """Absolute output index, from 0 over replayed and new outputs."""
    logprob: float | None = None
    """Natural log under the unmodified distribution; None unless asked for."""
    finish_reason: FinishReason | None = None
    """With the last token."""
    stop_token: int | None = None
    """The token that ended it, where the reason is `STOP`."""
    top: Alternatives = ()
    """The most likely tokens at this position, as many as were asked for."""
    prompt: list[PromptToken] | None = None
    """With the first token: the prompt's, where asked for."""


@dataclass(slots=True)
class StepResult:
    """Everything that happened since the result before."""

    outputs: list[TokenOutput] = field(default_factory=list)
    errors: list[tuple[RequestId, EngineError]] = field(default_factory=list)
    """Requests that the engine ended; no token comes any more."""
    aborted: list[RequestId] = field(default_factory=list)
    """Requests ended by `abort_request`."""
    released: list[RequestId] = field(default_factory=list)
    """Requests of which the engine holds nothing any more: no page, no row."""
    num_input_tokens: int = 0
    """Tokens computed by the forward that this pass launched; 0 where it launched none."""
    num_handled: int = 0
    """Forwards whose results this pass handled; with overlap, those of the pass before."""

    @property
    def ran(self) -> bool:
        """Whether a forward was launched or handled. False for long with work left means: wait
        for transfers."""
        return self.num_input_tokens > 0 or self.num_handled > 0
