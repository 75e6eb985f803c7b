"""Deterministic mode's promise, written once for every device: bit-equal tokens, log probabilities
and KV, however a request is computed."""

import random
from collections.abc import Sequence

import torch

from engine.execution.model_runner import ModelRunner
from engine.scheduler.req import Req
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
    plain = ask.req(0)
    req = Req(
        RequestId("r0"),
        ask.prompt,
        plain.sampling_params,
        eos_token_ids=[],
        prior_output_ids=list(prior),
    )
    engine.scheduler.add_request(req)
    while engine.scheduler.has_work():
        engine.step()
    return output_of(engine.outputs["r0"])


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
