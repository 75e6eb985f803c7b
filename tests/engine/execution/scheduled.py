"""A real model under the real scheduler: requests that come at random, and what was drawn."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.execution.forward_batch import BatchRunner
from engine.execution.model_runner import ModelRunner
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_result import TokenOutput
from engine.types import RequestId
from tests.checkpoints import EOS_TOKEN_ID, random_prompt


@dataclass(frozen=True)
class Ask:
    """A request that each run makes for itself."""

    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)

    def req(self, number: int) -> Req:
        params = SamplingParams(**{"max_new_tokens": 8, **self.params})
        return Req(RequestId(f"r{number}"), self.prompt, params, eos_token_ids=[EOS_TOKEN_ID])


def random_asks(seed: int, count: int, *, longest: int = 90) -> list[Ask]:
    """Prompts of any length, some with a beginning in common; greedy and sampled."""
    rng = random.Random(seed)
    asks = []
    for n in range(count):
        shared = random_prompt(40, seed=1)[: rng.choice([0, 16, 40])]
        own = random_prompt(rng.randint(1, longest - len(shared)), seed=seed * 1000 + n)
        sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": n}
        edited = {"presence_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 3}
        params: dict[str, Any] = {
            "max_new_tokens": rng.choice([1, 5, 20]),
            "ignore_eos": rng.random() < 0.5,
            "logprobs": rng.random() < 0.3,
        }
        if rng.random() < 0.5:
            params |= sampled
        if rng.random() < 0.2:
            params |= edited
        asks.append(Ask(shared + own, params))
    return asks


class ScheduledModel:
    """A scheduler over `model`, which may be behind another runner (`behind`)."""

    def __init__(
        self,
        model: ModelRunner,
        *,
        behind: Callable[[ModelRunner, MemoryPools], BatchRunner] = lambda model, memory: model,
        role: SchedulerRole | None = None,
        rows: int = 8,
        radix: bool = True,
        host: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """`host`: arguments of `make_memory_pools` for host memory."""
        pool, config = model.kv_pool, model.model_config
        self.memory = make_memory_pools(
            num_pages=pool.num_pages,
            page_size=pool.page_size,
            num_rows=rows,
            max_context_len=config.context_length,
            device=str(pool.device),
            enable_radix_cache=radix,
            **(host or {}),
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=pool.page_size,
                context_length=config.context_length,
                vocab_size=config.vocab_size,
                max_running_requests=rows,
                **settings,
            ),
            behind(model, self.memory),
            self.memory,
            role,
            device=pool.device,
        )
        self.outputs: dict[str, list[TokenOutput]] = {}

    def step(self) -> None:
        """One pass, with the invariant behind it."""
        result = self.scheduler.step()
        assert not result.errors
        for output in result.outputs:
            self.outputs.setdefault(output.rid, []).append(output)
        self.scheduler.check_invariant()

    def run(self, asks: Sequence[Ask], *, seed: int = 0) -> list[list[int]]:
        """Tokens of each, which came one by one while others ran."""
        rng = random.Random(seed)
        todo = [ask.req(number) for number, ask in enumerate(asks)]
        todo.reverse()
        while todo or self.scheduler.has_work():
            if todo and rng.random() < 0.5:
                self.scheduler.add_request(todo.pop())
            self.step()
        counts = self.scheduler.page_counts()
        assert (counts.in_use, counts.held) == (0, 0)
        return [[o.token for o in self.outputs[f"r{n}"]] for n in range(len(asks))]


def one_by_one(model: ModelRunner, asks: Sequence[Ask]) -> list[list[int]]:
    """The plainest run: each request alone, its prompt whole, nothing cached or overlapped."""
    tokens = []
    for ask in asks:
        engine = ScheduledModel(model, radix=False, chunked_prefill_size=None)
        tokens += engine.run([ask])
    return tokens
