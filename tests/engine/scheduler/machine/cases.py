"""What the machine is run on: a setup of the engine and a script of requests.

All of it is data, drawn before the run, so hypothesis shrinks a failure to few requests with
small numbers; the run itself draws nothing.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from hypothesis import strategies as st

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
    """One request, and what happens to it from outside."""

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
    salt: str
    lora: str
    priority: int
    patience: int | None
    """Passes after its arrival that somebody waits for it to begin; None: for ever."""
    logprobs: bool
    replayed: int
    """Outputs that an earlier attempt delivered, at most all but the last."""
    abort_after: int | None
    """Passes after its arrival."""
    transfer: int
    """Passes that its KV travels, in the roles with a transfer."""
    lost: bool
    """The transfer fails half-way."""
    oversize: bool
    """It may be longer than the pool."""
    grammar: int | None
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


any_setup: dict[str, st.SearchStrategy[Any]] = {
    "rows": st.sampled_from([8, 8, 8, 5, 3, 2]),
    "max_running": st.sampled_from([8, 8, 8, 4, 2, 1]),
    "chunk_pages": st.sampled_from([2, 1, 5, 16, 300, None]),
    "max_prefill_pages": st.sampled_from([300, 8, 3, 1]),
    "radix": st.sampled_from([True, True, False]),
    "mixed": st.booleans(),
    "overlap": st.booleans(),
    "split_layers": st.sampled_from([0, 0, 0, 0, 1, 2]),
    "host_pages": st.sampled_from([0, 0, 40, 5]),
    "host_write": st.sampled_from(get_args(HostWritePolicy)),
    "retract_pages": st.sampled_from([0, 0, 60, 5]),
    "copy_looks": st.sampled_from([0, 1, 4]),
    "compile_passes": st.sampled_from([0, 1, 6]),
    "policy": st.sampled_from(get_args(SchedulePolicyName)),
    "eviction": st.sampled_from(get_args(RadixEvictionPolicy)),
    "priorities": st.booleans(),
    "max_loras": st.sampled_from([8, 2, 1]),
    "max_queued": st.sampled_from([64, 64, 64, 64, 64, 2]),
    "conservativeness": st.sampled_from([1.0, 0.3, 0.02]),
}
# A low estimate of growth in a pool that many may enter and few may fill.
tight: dict[str, st.SearchStrategy[Any]] = {
    "rows": st.just(8),
    "max_running": st.just(8),
    "conservativeness": st.just(0.02),
    "chunk_pages": st.sampled_from([16, 5, 300]),
    "max_prefill_pages": st.just(300),
    "max_queued": st.just(64),
}


def setups(role: RoleName) -> st.SearchStrategy[Setup]:
    def of(page_size: int, pages: tuple[int, int]) -> st.SearchStrategy[Setup]:
        page: dict[str, st.SearchStrategy[Any]] = {
            "role": st.just(role),
            "page_size": st.just(page_size),
            "pages": st.integers(*pages),
        }
        return st.builds(Setup, **(any_setup | page))

    return st.one_of(of(16, (3, 14)), of(1, (30, 130)), of(64, (2, 6)))


def tight_setups(role: RoleName) -> st.SearchStrategy[Setup]:
    def of(page_size: int, pages: tuple[int, int]) -> st.SearchStrategy[Setup]:
        page: dict[str, st.SearchStrategy[Any]] = {
            "role": st.just(role),
            "page_size": st.just(page_size),
            "pages": st.integers(*pages),
        }
        return st.builds(Setup, **(any_setup | tight | page))

    return st.one_of(of(16, (9, 13)), of(1, (75, 130)), of(64, (5, 7)))


any_request: dict[str, st.SearchStrategy[Any]] = {
    "gap": st.sampled_from([0, 0, 1, 1, 1, 2, 4, 9]),
    "stem": st.sampled_from([0, 0, 5, 16, 16, 33, 64, 70]),
    "own_len": st.sampled_from([1, 1, 2, 8, 15, 16, 17, 40, 66]),
    "own": st.integers(0, 3),
    "max_new_tokens": st.sampled_from([1, 2, 9, 20, 34, 60, 400]),
    "ignore_eos": st.sampled_from([False, False, True]),
    "seed": st.integers(0, 1),
    "salt": st.sampled_from(["", "", "", "", "salt"]),
    "lora": st.sampled_from(["", "", "", "A", "B", "C"]),
    "priority": st.sampled_from([0, 0, 0, 5, 20]),
    "patience": st.sampled_from([None] * 12 + [0, 1, 3, 8]),
    "logprobs": st.sampled_from([False, False, False, True]),
    "replayed": st.sampled_from([0, 0, 0, 0, 1, 7]),
    "abort_after": st.sampled_from([None] * 30 + [0, 1, 2, 5, 12]),
    "transfer": st.sampled_from([0, 1, 2, 6, 15]),
    "lost": st.sampled_from([False] * 9 + [True]),
    "oversize": st.sampled_from([False] * 9 + [True]),
    "grammar": st.sampled_from([None] * 12 + [1, 4, 20, 0]),
}
# Small when they come and large when they go: what nobody's estimate of growth foresees.
growing: dict[str, st.SearchStrategy[Any]] = {
    "gap": st.sampled_from([1, 1, 2]),
    "stem": st.sampled_from([0, 0, 16]),
    "own_len": st.sampled_from([1, 8, 17]),
    "max_new_tokens": st.sampled_from([30, 44]),
    "abort_after": st.sampled_from([None] * 30 + [5, 12]),
    "ignore_eos": st.just(False),
    "lora": st.just(""),
    "patience": st.just(None),
    "oversize": st.just(False),
}
scripts = st.builds(RequestScript, **any_request)
growers = st.builds(RequestScript, **(any_request | growing))


squeezes = st.lists(
    st.builds(Squeeze, st.integers(0, 25), st.sampled_from([4, 8, 16]), st.sampled_from([3, 12])),
    max_size=2,
)


def examples(role: RoleName) -> st.SearchStrategy[Example]:
    few = st.lists(scripts, min_size=1, max_size=4)
    many = st.lists(scripts, min_size=5, max_size=10)
    crowd = st.lists(st.one_of(growers, growers, growers, scripts), min_size=6, max_size=9)
    return st.one_of(
        st.builds(fitted, setups(role), few, squeezes),
        st.builds(fitted, setups(role), many, squeezes),
        st.builds(fitted, tight_setups(role), crowd, squeezes),
    )


def fitted(setup: Setup, requests: list[RequestScript], taken: list[Squeeze]) -> Example:
    """Cuts most requests to what the pool holds, since one that is refused tests little."""
    memory = min(setup.pages * setup.page_size, CONTEXT)

    def fit(script: RequestScript) -> RequestScript:
        if script.oversize:
            return script
        stem = min(script.stem, memory // 2)
        own_len = min(script.own_len, memory // 2 - 1)
        room = memory - stem - own_len
        return replace(
            script, stem=stem, own_len=own_len, max_new_tokens=min(script.max_new_tokens, room)
        )

    return Example(setup, [fit(script) for script in requests], taken)


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
