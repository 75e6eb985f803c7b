"""One request inside the engine: its tokens, the KV it owns, and why it ended."""

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto

from engine.errors import EngineError
from engine.grammar.backend import GrammarMatcher
from engine.memory.chain_hash import namespace_key
from engine.memory.prefix_cache import BasePrefixCache, PrefixMatch, TreeNode
from engine.sampling_params import SamplingParams
from engine.scheduler.config import CLIP_MAX_NEW_TOKENS
from engine.scheduler.logprobs import PromptToken
from engine.types import RequestId


class FinishReason(Enum):
    STOP = "stop"
    """A stop token, the model's end of sequence, or a grammar after which nothing may follow."""
    LENGTH = "length"
    """max_new_tokens, or the end of the context."""
    ABORT = "abort"
    """The client or a peer gave it up."""
    ERROR = "error"
    """Ended by the engine; an `EngineError` says why."""


class RequestPhase(Enum):
    """Where a live request is; each is owned by one list of the scheduler."""

    WAITING = auto()
    """No pages, no row (also after a retraction)."""
    CHUNKED = auto()
    """Part of the prompt is computed; at most one request at a time."""
    RUNNING = auto()
    """In a batch: its prompt's last part, or decode."""
    PREBUILT = auto()
    """KV arrived by transfer; joins the running batch on the next pass."""
    TRANSFERRING = auto()
    """Prompt done on a prefill-only worker; keeps row and pages until the role lets go."""
    ENDING = auto()
    """Ended, but a launched step still touches its pages; they go back when that has ended."""
    HELD = auto()
    """Ended, but somebody still reads its pages."""
    ENDED = auto()
    """Owns nothing any more."""


class Req:
    """A request. Two are equal only if they are the same object.

    Tokens are `origin_input_ids` (the prompt) then `output_ids`; an output's index counts from the
    prompt's end, replayed tokens included, so that sampling noise and the client see the same
    positions however often the request has moved. KV exists for the first `kv_committed_len`
    tokens, in `pages`; the KV of the last drawn token does not exist until it has been an input.
    """

    def __init__(
        self,
        rid: RequestId,
        origin_input_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        prior_output_ids: Sequence[int] = (),
        priority: int = 0,
        extra_key: str = "",
        lora_id: str = "",
        deadline: float | None = None,
        t_arrival: float | None = None,
    ) -> None:
        """`prior_output_ids`: tokens that the client has from an earlier attempt. `extra_key`: the
        cache salt; requests share cached prefixes only within a salt and an adapter. `lora_id`: the
        adapter, empty for the base model. `deadline`: nobody waits for the answer after it.
        `t_arrival` and `deadline` are `time.monotonic()` seconds.
        """
        self.rid = rid
        self.origin_input_ids = list(origin_input_ids)
        self.output_ids = list(prior_output_ids)
        self.prior_output_len = len(self.output_ids)
        """Leading outputs that an earlier attempt produced."""
        self.sampling_params = sampling_params
        self.stop_token_ids = sampling_params.stop_token_ids
        if not sampling_params.ignore_eos:
            self.stop_token_ids = self.stop_token_ids | frozenset(eos_token_ids)
        self.ending_token_ids = sampling_params.stop_token_ids | frozenset(eos_token_ids)
        """What may not be drawn before `min_tokens`; with ignore_eos, too, that is a text without
        an end in it."""
        self.wants_only_tokens = not sampling_params.wants_logprobs
        self.max_new_tokens = sampling_params.max_new_tokens
        """All outputs, replayed ones included; the scheduler lowers it to the context's end."""
        self.priority = priority
        self.lora_id = lora_id
        self.lora_slot: int | None = None
        """Where its adapter's weights are, while it is computed; None: not now, or no adapter."""
        self.deadline = deadline
        self.extra_key = namespace_key(lora_id, extra_key)
        """Name space of the prefix cache."""
        self.grammar: GrammarMatcher | None = None
        """Where its grammar stands after `output_ids`; None: it has none, or it compiles still.
        A draw for it needs the previous token first (scheduling.md section 7)."""

        self.phase = RequestPhase.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None
        self.logprobs: list[float] = []
        """Natural-log probability of each output drawn here, if wanted; prior ones have none."""
        self.prompt_tokens: list[PromptToken] = []
        """The prompt as far as it is judged, until it leaves with the first token, if wanted."""
        self.retraction_count = 0

        self.req_pool_idx: int | None = None
        self.pages: list[int] = []
        """KV pages in order of position; those of the first `tree_len` tokens are the tree's."""
        self.last_node: TreeNode | None = None
        """The tree node this request locks; None: it locks nothing."""
        self.tree_len = 0
        """Tokens in pages that belong to the prefix tree; whole pages."""
        self.host_hit_len = 0
        """Tokens right behind the match whose KV is in host memory only."""
        self.last_host_node: TreeNode | None = None
        """The tree node where those end."""
        self._last_match: tuple[tuple[int, int], PrefixMatch] | None = None
        """The prefix found last, with the tree's version and the number of tokens looked up."""
        self.kv_committed_len = 0
        """Tokens whose KV exists, or is written by a launched step. With overlap that may be one
        token more than are known."""
        self.kv_ready_from = 0
        self.kv_ready_len = 0
        """The extend whose result was handled last wrote the KV of positions `kv_ready_from ..
        kv_ready_len - 1`; that of the positions before existed. Decode steps leave both alone."""
        self._kv_check: Callable[[], bool] | None = None
        self._kv_spoilt = False
        self.in_flight = 0
        """Launched steps with this request whose results are not handled yet."""
        self.prefix_len = 0
        """Tokens whose KV existed before the current extend."""
        self.extend_input_len = 0
        """Input tokens of the current extend."""
        self.cached_tokens = 0
        """Prompt tokens that came from the prefix cache when it was first admitted."""

        self.t_arrival = time.monotonic() if t_arrival is None else t_arrival
        """`time.monotonic()` seconds, like the other stamps; 0.0: not yet."""
        self.t_first_forward = 0.0
        self.t_first_token = 0.0
        self.t_first_decode = 0.0
        """When its first decode step was prepared here."""
        self.arrival_order = 0
        """Set by the scheduler: breaks ties of arrival."""

    def __repr__(self) -> str:
        return (
            f"Req({self.rid!r}, {self.phase.name}, prompt={self.prompt_len}, "
            f"out={len(self.output_ids)}, kv={self.kv_committed_len})"
        )

    @property
    def prompt_len(self) -> int:
        return len(self.origin_input_ids)

    @property
    def seqlen(self) -> int:
        """Prompt and output so far."""
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def fill_ids(self) -> list[int]:
        """All tokens so far: what an extend must have KV for."""
        return self.origin_input_ids + self.output_ids

    def check_kv_by(self, check: Callable[[], bool]) -> None:
        """Its KV came by transfer and is still being checked: `check` waits for that, once, and
        says whether it is good. Nobody may use that KV, or lend it, before `kv_is_good`."""
        self._kv_check = check

    def kv_is_good(self) -> bool:
        """Whether its KV may be used; waits where it is still being checked."""
        if self._kv_check is not None:
            check, self._kv_check = self._kv_check, None
            self._kv_spoilt = not check()
        return not self._kv_spoilt

    @property
    def grammar_error(self) -> EngineError | None:
        """Why its grammar cannot go on."""
        return self.grammar.error if self.grammar is not None else None

    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def takes_no_step(self) -> bool:
        """Whether no further step is for it: it is finished, or its launched step draws the last
        token that its length allows. Asked between passes of a request that is past its prompt."""
        return (
            self.finish_reason is not None
            or len(self.output_ids) + self.in_flight >= self.max_new_tokens
        )

    @property
    def remaining_new_tokens(self) -> int:
        return self.max_new_tokens - len(self.output_ids)

    @property
    def clipped_new_tokens(self) -> int:
        """Tokens it may still produce, as far as estimates of memory count them."""
        return max(0, min(self.remaining_new_tokens, CLIP_MAX_NEW_TOKENS))

    @property
    def prompt_done(self) -> bool:
        """Whether the current extend reaches the last token known."""
        return self.prefix_len + self.extend_input_len == self.seqlen

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether they are still to be computed: they leave with the first token."""
        return self.sampling_params.prompt_logprobs is not None and not self.output_ids

    def token_ids(self, end: int) -> list[int]:
        """The first `end` tokens of prompt and output."""
        if end <= len(self.origin_input_ids):
            return self.origin_input_ids[:end]
        return self.origin_input_ids + self.output_ids[: end - len(self.origin_input_ids)]

    def input_ids(self, start: int, end: int) -> list[int]:
        """Tokens of positions `start .. end - 1`."""
        return self.token_ids(end)[start:]

    def init_next_round_input(
        self, tree_cache: BasePrefixCache | None = None, *, computed_here: bool = True
    ) -> None:
        """Describes the next extend: everything that has no KV yet.

        With a tree, the request owns nothing yet: takes the longest cached prefix of all but the
        last token, which must be an input to draw from, and none where all of the prompt must be
        an input to be judged. The match is not locked: `drop_match` unless it is locked before
        anything may evict. `computed_here`: False where the KV comes by transfer.
        """
        if tree_cache is not None:
            end = self.seqlen - 1
            if computed_here and self.wants_prompt_logprobs:
                end = 0
            match = self._match(tree_cache, end)
            self.pages = list(match.pages)
            self.last_node = match.last_node
            self.tree_len = self.kv_committed_len = len(match.pages) * tree_cache.page_size
            self.host_hit_len = match.host_hit_pages * tree_cache.page_size
            self.last_host_node = match.last_host_node
            self.kv_ready_from = self.kv_ready_len = self.tree_len
        self.prefix_len = self.kv_committed_len
        self.extend_input_len = self.seqlen - self.prefix_len

    def _match(self, tree_cache: BasePrefixCache, end: int) -> PrefixMatch:
        """Whoever waits for memory is looked at in every pass, and finds the same until the tree
        has changed."""
        asked = (tree_cache.version, end)
        if self._last_match is None or self._last_match[0] != asked:
            match = tree_cache.match_prefix(self.token_ids(end), self.extra_key)
            self._last_match = (asked, match)
        return self._last_match[1]

    def begin_extend(self) -> None:
        """Called when an extend that was admitted is about to run."""
        self.phase = RequestPhase.RUNNING
        self._last_match = None
        if self.t_first_forward == 0.0:
            self.t_first_forward = time.monotonic()
            self.cached_tokens = self.prefix_len

    def drop_match(self) -> None:
        """Forgets a match that was not locked."""
        self.pages = []
        self.last_node = self.last_host_node = None
        self.tree_len = self.kv_committed_len = self.prefix_len = self.extend_input_len = 0
        self.kv_ready_from = self.kv_ready_len = self.host_hit_len = 0

    def resume_at(self, kv_len: int) -> None:
        """Called when the KV of a retracted request's first `kv_len` tokens is in its pages again:
        the next extend computes the rest."""
        self.kv_committed_len = self.kv_ready_from = self.kv_ready_len = kv_len

    def append_output(self, token: int, logprob: float | None) -> None:
        """Takes the token drawn after the last one, and sees whether it ends the request. The one
        place where a grammar goes on, so that it does exactly once a token, wherever it was drawn.
        """
        self.output_ids.append(token)
        if self.grammar is not None:
            self.grammar.advance(token)
        if self.t_first_token == 0.0:
            self.t_first_token = time.monotonic()
        if logprob is not None and self.sampling_params.wants_logprobs:
            self.logprobs.append(logprob)
        if (
            token in self.stop_token_ids
            or len(self.output_ids) >= self.max_new_tokens
            or self.grammar is not None
        ):
            self.check_finished()

    def check_finished(self) -> None:
        """Sets the reason if the last output ends the request. A stop token counts before the
        length, as a client that sees both wants to know that the text is complete; so does the end
        of a grammar after which nothing may follow, with or without a token that says so.
        """
        if self.finished() or not self.output_ids:
            return
        if self.grammar_error is not None:
            self.finish_reason = FinishReason.ERROR
        elif self.output_ids[-1] in self.stop_token_ids:
            self.finish_reason = FinishReason.STOP
            self.stop_token = self.output_ids[-1]
        elif self.grammar is not None and self.grammar.is_complete:
            self.finish_reason = FinishReason.STOP
        elif len(self.output_ids) >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def reset_for_retract(self) -> None:
        """Back to the queue: pages and row were given back, tokens stay."""
        self.retraction_count += 1
        self.phase = RequestPhase.WAITING
        self.prompt_tokens = []
        self.drop_match()
