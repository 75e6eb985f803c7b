"""The plainest scheduler there can be, beside the real one on a real model.

The plain one computes one request after another, its prompt whole, then a token at a time, into
pages that nobody had before: no chunk, no cache, no batch, no admission. What it draws, it draws in
its own words, from the logits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.execution.forward_batch import BatchRunner
from engine.execution.model_runner import ModelRunner
from engine.execution.noise import gumbel_noise
from engine.memory.page_copier import make_page_copier
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.admission import Promise
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.types import RequestId
from tests.checkpoints import EOS_TOKEN_ID, random_prompt
from tests.engine.execution.harness import Harness
from tests.engine.scheduler.async_runner import AsyncRunner
from tests.engine.scheduler.handover import FakeDecodeRole, FakePrefillRole


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    max_new_tokens: int
    ignore_eos: bool
    temperature: float
    seed: int
    priority: int

    def req(self, rid: str) -> Req:
        return Req(
            RequestId(rid),
            self.prompt,
            SamplingParams(
                max_new_tokens=self.max_new_tokens,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
                seed=self.seed,
            ),
            eos_token_ids=[EOS_TOKEN_ID],
            priority=self.priority,
        )


def random_asks(seed: int, count: int) -> list[Ask]:
    """Half of them with a beginning in common and up to several chunks long; half of them short,
    to grow into more than a small pool has for all."""
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        grows = rng.random() < 0.5
        stem = 0 if grows else rng.choice([0, 16, 40])
        own = rng.choice([1, 7, 16] if grows else [1, 7, 33, 50])
        asks.append(
            Ask(
                prompt=random_prompt(40, seed=1)[:stem]
                + random_prompt(own, seed=seed * 1000 + rng.randrange(4)),
                max_new_tokens=36 if grows else rng.choice([1, 8, 24]),
                ignore_eos=not grows and rng.random() < 0.5,
                temperature=rng.choice([0.0, 0.0, 0.8]),
                seed=number,
                priority=rng.choice([0, 0, 30]),
            )
        )
    return asks


@dataclass(frozen=True)
class Plain:
    """What one request draws when it is alone in the world."""

    tokens: list[int]
    margin: float
    """By how much its least certain token was ahead of the next best, in what is compared: logits
    over temperature, plus noise."""


def plainly(model: ModelRunner, ask: Ask) -> Plain:
    harness = Harness(model.kv_pool)
    row = harness.row(ask.prompt)
    logits = model.forward_logits(harness.extend((row, len(ask.prompt))))[0]
    tokens: list[int] = []
    margin = float("inf")
    while True:
        scores = logits
        if ask.temperature > 0:
            position = torch.tensor([len(ask.prompt) + len(tokens)])
            noise = gumbel_noise(torch.tensor([ask.seed]), position, logits.shape[-1])[0]
            scores = logits / ask.temperature + noise
        best = torch.topk(scores, 2).values
        margin = min(margin, float(best[0] - best[1]))
        tokens.append(int(scores.argmax()))
        ended = tokens[-1] == EOS_TOKEN_ID and not ask.ignore_eos
        if ended or len(tokens) == ask.max_new_tokens:
            return Plain(tokens, margin)
        row.tokens.append(tokens[-1])
        logits = model.forward_logits(harness.decode(row))[0]


def _digest(pool: torch.Tensor, pages: Sequence[int]) -> torch.Tensor:
    words = pool[list(pages)].view(torch.int64)
    return (words * torch.arange(1, 2 * words.shape[1], 2)).sum(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What is on in one run."""

    policy: str
    priorities: bool
    mixed: bool
    overlap: bool
    radix: bool
    host_tier: bool
    split: bool
    chunk: int | None
    pages: int
    """Of the pool: with 20 of 16 tokens requests crowd each other out."""

    def engine(self, model: ModelRunner, role: SchedulerRole | None = None) -> "RealEngine":
        return RealEngine(model, self, role)


class RealEngine:
    """The scheduler over `model`, and what came out of it."""

    def __init__(self, model: ModelRunner, features: Features, role: SchedulerRole | None) -> None:
        pool = model.kv_pool
        self.pool = pool
        host: dict[str, Any] = {}
        if features.host_tier:
            host = {
                "host_copier": make_page_copier(pool, 40, _digest),
                "retract_copier": make_page_copier(pool, 40, _digest),
            }
        self.memory = make_memory_pools(
            num_pages=features.pages,
            page_size=pool.page_size,
            num_rows=6,
            max_context_len=model.model_config.context_length,
            enable_radix_cache=features.radix,
            **host,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=pool.page_size,
                context_length=model.model_config.context_length,
                vocab_size=model.model_config.vocab_size,
                chunked_prefill_size=features.chunk,
                max_prefill_tokens=96,
                max_running_requests=6,
                enable_mixed_chunk=features.mixed,
                enable_overlap=features.overlap,
                split_prefill_layers=int(features.split),
                schedule_policy=features.policy,  # type: ignore[arg-type]
                enable_priority_scheduling=features.priorities,
                schedule_conservativeness=0.02,
                decode_reserve_tokens=8,
            ),
            self._runner(model, features, self.memory),
            self.memory,
            role,
        )
        self.tokens: dict[str, list[int]] = {}

    @staticmethod
    def _runner(model: ModelRunner, features: Features, memory: MemoryPools) -> BatchRunner:
        if not features.overlap:
            return model
        # A copy to the host reads what launched steps have written, so these must have run.
        return AsyncRunner(model, memory, late=not features.host_tier)

    def step(self) -> None:
        """One pass, with the invariant behind it."""
        result = self.scheduler.step()
        assert not result.errors
        for output in result.outputs:
            tokens = self.tokens.setdefault(output.rid, [])
            tokens.append(output.token)
        self.scheduler.check_invariant()

    def check_idle(self) -> None:
        counts = self.scheduler.page_counts()
        assert (counts.in_use, counts.held) == (0, 0)
        assert self.scheduler.row_counts().in_use == 0


@dataclass
class RunResult:
    tokens: list[list[int]]
    retractions: int


def unified(model: ModelRunner, features: Features, asks: Sequence[Ask], seed: int) -> RunResult:
    engine = features.engine(model)
    rng = random.Random(seed)
    todo = [ask.req(f"r{number}") for number, ask in enumerate(asks)][::-1]
    while todo or engine.scheduler.has_work():
        if todo and rng.random() < 0.5:
            engine.scheduler.add_request(todo.pop())
        engine.step()
    engine.check_idle()
    return RunResult(
        [engine.tokens[f"r{n}"] for n in range(len(asks))], engine.scheduler.num_retractions
    )


@dataclass
class Pair:
    """A prefill and a decode engine with pools of their own, and the road between them."""

    sender: ModelRunner
    receiver: ModelRunner
    features: Features
    rng: random.Random
    waiting: list[tuple[Req, Req]] = field(default_factory=list)
    arriving: dict[RequestId, Req] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sending, self.tickets = FakePrefillRole(), FakeDecodeRole()
        self.prefill = self.features.engine(self.sender, self.sending)
        self.decode = self.features.engine(self.receiver, self.tickets)

    def busy(self) -> bool:
        engines = (self.prefill, self.decode)
        return bool(self.waiting) or any(engine.scheduler.has_work() for engine in engines)

    def step(self) -> None:
        self._grant()
        if self.rng.random() < 0.8:
            self.prefill.step()
        for rid in list(self.sending.sending):
            if self.rng.random() < 0.5:
                self._deliver(rid)
        if self.rng.random() < 0.8:
            self.decode.step()

    def _grant(self) -> None:
        while self.waiting:
            at_prefill, at_decode = self.waiting[0]
            if not self.decode.scheduler.admission.can_admit(
                at_decode.seqlen, 0, at_decode.remaining_new_tokens
            ):
                return
            del self.waiting[0]
            self.arriving[at_decode.rid] = at_decode
            self.tickets.tickets[at_decode.rid] = Promise(
                prompt_len=at_decode.seqlen,
                max_new_tokens=at_decode.remaining_new_tokens,
                pages_allocated=False,
            )
            self.prefill.scheduler.add_request(at_prefill)

    def _deliver(self, rid: RequestId) -> None:
        sending = self.sending.sending[rid]
        if sending.first_token is None:
            return
        req, ended = self.arriving.pop(rid), sending.req.finished()
        if not ended:
            count = -(-req.seqlen // self.decode.pool.page_size)
            pages = self.decode.memory.alloc_pages(count)
            self.decode.pool.data[pages] = self.prefill.pool.data[sending.pages]
        del self.sending.sending[rid], self.tickets.tickets[rid]
        self.prefill.scheduler.release_request(sending.req)
        if not ended:
            self.decode.scheduler.add_prebuilt(req, pages, sending.first_token)


def handed_over(
    sender: ModelRunner, receiver: ModelRunner, features: Features, asks: Sequence[Ask], seed: int
) -> RunResult:
    pair = Pair(sender, receiver, features, random.Random(seed))
    todo = [(ask.req(f"r{n}"), ask.req(f"r{n}")) for n, ask in enumerate(asks)][::-1]
    while todo or pair.busy():
        if todo and pair.rng.random() < 0.5:
            pair.waiting.append(todo.pop())
        pair.step()
    pair.prefill.check_idle()
    pair.decode.check_idle()
    return RunResult(
        [
            pair.prefill.tokens[f"r{n}"] + pair.decode.tokens.get(f"r{n}", [])
            for n in range(len(asks))
        ],
        pair.decode.scheduler.num_retractions,
    )


def pairwise(factors: dict[str, Sequence[Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Rows in which each two factors take each pair of their values at least once."""
    names = list(factors)

    def pairs_of(row: dict[str, Any]) -> set[tuple[str, str, str, str]]:
        return {
            (a, repr(row[a]), b, repr(row[b])) for i, a in enumerate(names) for b in names[i + 1 :]
        }

    def random_row() -> dict[str, Any]:
        return {name: rng.choice(values) for name, values in factors.items()}

    needed = sum(
        len(factors[a]) * len(factors[b]) for i, a in enumerate(names) for b in names[i + 1 :]
    )
    covered: set[tuple[str, str, str, str]] = set()
    rows: list[dict[str, Any]] = []
    while len(covered) < needed:
        best = max((random_row() for _ in range(60)), key=lambda row: len(pairs_of(row) - covered))
        if pairs_of(best) - covered:
            rows.append(best)
            covered |= pairs_of(best)
    return rows
