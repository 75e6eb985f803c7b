"""What the machine is run on: a setup of the engine and a script of requests.

All of it is data, drawn before the run, so hypothesis shrinks a failure to few requests with
small numbers; the run itself draws nothing.
"""

from dataclasses import dataclass
from typing import Literal

from engine.grammar.spec import Grammar
from engine.memory.chain_hash import namespace_key
from engine.memory.hi_radix_cache import HostWritePolicy
from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulePolicyName
from engine.scheduler.req import FinishReason, Req
from engine.types import RadixEvictionPolicy, RequestId
from tests.engine.scheduler.machine.chain import CONTEXT, EOS, extend_chain, next_token, root
from tests.engine.scheduler.machine.grammars import WRONG, allowed_tokens, stub_grammar

RoleName = Literal["unified", "prefill", "decode"]
PROMPT_VOCAB = 11


@dataclass(frozen=True, kw_only=True)
class RequestScript:
    """One request, and what happens to it from outside; the defaults are an undisturbed life."""

    gap: int
    """Passes since the arrival before."""
    stem: int
    """Leading tokens shared with all other requests."""
    own_len: int
    own: int
    """Which own tokens; equal ones are shared, too."""
    max_new_tokens: int
    ignore_eos: bool
    seed: int
    salt: str = ""
    lora: str = ""
    priority: int = 0
    patience: int | None = None
    """Passes after its arrival that somebody waits for it to begin; None: for ever."""
    logprobs: bool = False
    replayed: int = 0
    """Outputs that an earlier attempt delivered, at most all but the last."""
    abort_after: int | None = None
    """Passes after its arrival."""
    transfer: int = 0
    """Passes that its KV travels, in the roles with a transfer."""
    lost: bool = False
    """The transfer fails half-way."""
    described: bool = False
    """Decode hears that its last pages are coming, and prepares for it."""
    spoilt: bool = False
    """Its KV arrives otherwise than it was sealed, which is seen when it has joined."""
    oversize: bool = False
    """It may be longer than the pool."""
    judged: bool = False
    """It wants the log probabilities of its prompt."""
    grammar: int | None = None
    """Tokens of its grammar; 0: a wrong one; None: it has none."""

    def prompt(self) -> list[int]:
        stem = [(i * 7 + 3) % (PROMPT_VOCAB) + 1 for i in range(self.stem)]
        own = [(self.own * 5 + i * (self.own + 1)) % PROMPT_VOCAB + 1 for i in range(self.own_len)]
        return stem + own

    def spec(self) -> Grammar | None:
        if self.grammar is None:
            return None
        return stub_grammar(self.grammar) if self.grammar else WRONG


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The engine of one example."""

    role: RoleName
    page_size: int
    pages: int
    rows: int
    max_running: int
    chunk_pages: int | None
    """chunked_prefill_size in pages; None: prompts whole."""
    max_prefill_pages: int
    radix: bool
    mixed: bool
    overlap: bool
    split_layers: int
    """Layers of a prompt's step that run at a time; 0: all."""
    host_pages: int
    """Pages of host memory for evicted prefixes; 0: none."""
    host_write: HostWritePolicy
    retract_pages: int
    """Pages of host memory for retracted requests; 0: none."""
    copy_looks: int
    """Looks at a copy that find it under way."""
    compile_passes: int
    """Passes that a grammar compiles."""
    policy: SchedulePolicyName
    eviction: RadixEvictionPolicy
    priorities: bool
    max_loras: int
    max_queued: int
    conservativeness: float


@dataclass(frozen=True)
class Squeeze:
    """Memory that is somebody else's for some passes."""

    start: int
    """Pass."""
    sixteenths: int
    """Of the pool, as far as they are free or evictable then."""
    passes: int


@dataclass(frozen=True)
class Example:
    setup: Setup
    requests: list[RequestScript]
    squeezes: list[Squeeze]
    """Only a unified worker has them."""


@dataclass(frozen=True)
class Expected:
    """All outputs of a request that nobody disturbs, replayed ones included."""

    tokens: list[int]
    finish_reason: FinishReason


def reference(script: RequestScript) -> Expected:
    """The rules of a request's end, written once more and plainly."""
    digest = root(namespace_key(script.lora, script.salt))
    prompt = script.prompt()
    for token in prompt:
        digest = extend_chain(digest, token)
    tokens: list[int] = []
    while True:
        allowed = allowed_tokens(script.grammar, tokens) if script.grammar else None
        token = next_token(digest, script.seed, allowed)
        tokens.append(token)
        digest = extend_chain(digest, token)
        if token == EOS and not script.ignore_eos:
            return Expected(tokens, FinishReason.STOP)
        if len(tokens) == script.grammar:
            return Expected(tokens, FinishReason.STOP)
        if len(tokens) == min(script.max_new_tokens, CONTEXT - len(prompt)):
            return Expected(tokens, FinishReason.LENGTH)


def make_req(rid: str, script: RequestScript, expected: Expected, *, now: float) -> Req:
    return Req(
        RequestId(rid),
        script.prompt(),
        SamplingParams(
            max_new_tokens=script.max_new_tokens,
            ignore_eos=script.ignore_eos,
            seed=script.seed,
            logprobs=script.logprobs,
            prompt_logprobs=0 if script.judged else None,
            grammar=script.spec(),
        ),
        eos_token_ids=[EOS],
        prior_output_ids=expected.tokens[: min(script.replayed, len(expected.tokens) - 1)],
        priority=script.priority,
        extra_key=script.salt,
        lora_id=script.lora,
        deadline=None if script.patience is None else now + script.patience,
        t_arrival=now,
    )
