"""Deterministic mode's promise, written once for every device: bit-equal tokens, log probabilities
and KV, however a request is computed."""

import random
from collections.abc import Sequence

import torch

from engine.execution.model_runner import ModelRunner
from engine.memory.kv_pool import PageMajorKVPool
from engine.scheduler.req import Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.step_result import TokenOutput
from engine.types import RequestId
from tests.engine.execution.harness import Harness
from tests.engine.execution.scheduled import Ask, ScheduledModel

Output = list[tuple[int, float | None]]
"""(token, log probability) in order."""


def output_of(outputs: Sequence[TokenOutput]) -> Output:
    return [(output.token, output.logprob) for output in outputs]


def alone(model: ModelRunner, ask: Ask, *, prior: Sequence[int] = (), chunk: int = 8192) -> Output:
    """What is drawn where nobody else is there; `prior`: a replay that knows these tokens."""
    engine = ScheduledModel(model, rows=2, radix=False, chunked_prefill_size=chunk)
    engine.scheduler.add_request(_replayed(ask, prior))
    while engine.scheduler.has_work():
        engine.step()
    return output_of(engine.outputs["r0"])


def _replayed(ask: Ask, prior: Sequence[int]) -> Req:
    return Req(
        RequestId("r0"),
        ask.prompt,
        ask.req(0).sampling_params,
        eos_token_ids=[],
        prior_output_ids=list(prior),
    )


def among(
    model: ModelRunner,
    ask: Ask,
    strangers: Sequence[Ask],
    *,
    chunk: int,
    seed: int,
    **settings: bool,
) -> Output:
    """The same request among others that come and go at random."""
    engine = ScheduledModel(
        model, rows=len(strangers) + 1, radix=False, chunked_prefill_size=chunk, **settings
    )
    everybody = [ask, *strangers]
    rng = random.Random(seed)
    order = list(range(len(everybody)))
    rng.shuffle(order)
    while order or engine.scheduler.has_work():
        if order and rng.random() < 0.7:
            number = order.pop()
            engine.scheduler.add_request(everybody[number].req(number))
        engine.step()
    return output_of(engine.outputs["r0"])


def after_a_prefix_hit(model: ModelRunner, ask: Ask) -> tuple[Output, Output]:
    """The same request twice: computed, and from cached KV of its own prompt and output."""
    engine = ScheduledModel(model, rows=2, radix=True)
    for number in (0, 1):
        engine.scheduler.add_request(ask.req(number))
        while engine.scheduler.has_work():
            engine.step()
    return output_of(engine.outputs["r0"]), output_of(engine.outputs["r1"])


class _PromptsOnly(SchedulerRole):
    """Keeps a copy of a prompt's KV, page by page."""

    decodes = False

    def __init__(self, pool: PageMajorKVPool) -> None:
        self._pool = pool
        self.kv = torch.empty(0)

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
        if prompt_done:
            pages = torch.tensor(self.scheduler.request_pages(req), device=self._pool.device)
            self.kv = self._pool.data[pages].clone()


def after_a_handover(model: ModelRunner, ask: Ask, *, prior: Sequence[int] = ()) -> Output:
    """The prompt by an engine that computes nothing else, the rest by another one with its KV in
    other pages."""
    role = _PromptsOnly(model.kv_pool)
    prefill = ScheduledModel(model, role=role, rows=1, radix=False, chunked_prefill_size=512)
    prefill.scheduler.add_request(_replayed(ask, prior))
    while prefill.scheduler.has_work():
        prefill.step()
    (first,) = prefill.outputs["r0"]

    decode = ScheduledModel(model, rows=2, radix=False)
    others = decode.memory.alloc_pages(len(role.kv) + 1)
    pages = decode.memory.alloc_pages(len(role.kv))
    decode.memory.free_pages(others)
    model.kv_pool.data.zero_()
    model.kv_pool.data[torch.tensor(pages, device=model.kv_pool.device)] = role.kv
    decode.scheduler.add_prebuilt(_replayed(ask, prior), pages, first.token)
    while decode.scheduler.has_work():
        decode.step()
    return output_of([first, *decode.outputs["r0"]])


def kv_of(model: ModelRunner, tokens: list[int], cuts: Sequence[int], seed: int) -> torch.Tensor:
    """KV [layers, 2, tokens, kv_heads, head_dim] of `tokens`, computed in steps that end at `cuts`
    and at the end; steps of one token are decode steps."""
    harness = Harness(model.kv_pool, seed=seed)
    row = harness.row(tokens)
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        one = end - start == 1 and start > 0
        model.forward(harness.decode(row) if one else harness.extend((row, end - start)))
    pages = torch.tensor(row.pages, device=model.kv_pool.device)
    stored = model.kv_pool.data.view(torch.uint8)[pages]
    by_token = stored.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
    return by_token[:, :, : len(tokens)].clone()
