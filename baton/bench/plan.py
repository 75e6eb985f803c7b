"""The requests of one run, made before the clock starts."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.bench.settings import BenchConfig
from baton.bench.trace import TraceEntry, read_trace
from baton.bench.workload import BLOCK_TOKENS, block_token_ids, mix, poisson, token_ids
from baton.config import SettingsError

MS_PER_UNIT = {"ms": 1.0, "s": 1000.0}
CLOSED_LOOP_BLOCK = 512
"""A closed loop bounded by time does not know its number of requests: lengths come in blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request to send."""

    index: int
    at_s: float
    """When to send it, from the start; a closed loop sends it when it can."""

    prompt: list[int]
    output_length: int


def open_loop(config: BenchConfig, *, vocab_size: int) -> list[PlannedRequest]:
    """The requests of a Poisson process or a trace, by arrival.

    Raises:
        SettingsError: the trace cannot be read, or its blocks cannot be made that long.
    """
    entries = _traced(config) if config.trace else _poisson(config)
    lengths = [entry.input_length for entry in entries]
    prompts = list(token_ids(lengths, vocab_size=vocab_size, seed=config.seed))
    for index, entry in enumerate(entries):
        if entry.hash_ids:
            prompts[index] = block_token_ids(
                entry.hash_ids, entry.input_length, vocab_size=vocab_size, seed=config.seed
            )
    return [
        PlannedRequest(
            index=index, at_s=entry.at_s, prompt=prompt, output_length=entry.output_length
        )
        for index, (entry, prompt) in enumerate(zip(entries, prompts, strict=True))
    ]


def closed_loop(config: BenchConfig, *, vocab_size: int) -> Iterator[PlannedRequest]:
    """Requests without end, or as many as were asked for; made as they are taken."""
    index = 0
    for block in itertools.count():
        seed = config.seed + block
        inputs, outputs = mix(CLOSED_LOOP_BLOCK, seed=seed)
        inputs, outputs = _lengths(config, inputs, outputs)
        prompts = token_ids(inputs, vocab_size=vocab_size, seed=seed)
        for prompt, output in zip(prompts, outputs, strict=True):
            if config.requests and index >= config.requests:
                return
            yield PlannedRequest(index=index, at_s=0.0, prompt=prompt, output_length=output)
            index += 1


def _poisson(config: BenchConfig) -> list[TraceEntry]:
    duration = config.bound_s
    if math.isinf(duration):
        # Long enough for the number asked for, in all but one of a billion runs.
        duration = (config.requests + 6 * math.sqrt(config.requests) + 36) / config.rate
    arrivals = poisson(config.rate, duration_s=duration, seed=config.seed)
    if config.requests:
        arrivals = arrivals[: config.requests]
    inputs, outputs = _lengths(config, *mix(len(arrivals), seed=config.seed))
    return [
        TraceEntry(at_s=at, input_length=i, output_length=o)
        for at, i, o in zip(arrivals, inputs, outputs, strict=True)
    ]


def _traced(config: BenchConfig) -> list[TraceEntry]:
    entries = read_trace(Path(config.trace), ms_per_unit=MS_PER_UNIT[config.trace_time_unit])
    if config.requests:
        entries = entries[: config.requests]
    inputs, outputs = _lengths(
        config, [e.input_length for e in entries], [e.output_length for e in entries]
    )
    timed = [
        TraceEntry(
            at_s=entry.at_s / config.trace_speed,
            input_length=i,
            output_length=o,
            hash_ids=_covering(entry.hash_ids, i),
        )
        for entry, i, o in zip(entries, inputs, outputs, strict=True)
    ]
    return [entry for entry in timed if entry.at_s < config.bound_s]


def _covering(hash_ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    if hash_ids and len(hash_ids) * BLOCK_TOKENS < length:
        raise SettingsError(
            f"trace: {len(hash_ids)} hash_ids do not cover a prompt of {length} tokens: a longer "
            "one than the trace's was asked for (input_length, length_scale)"
        )
    return hash_ids


def _lengths(
    config: BenchConfig, inputs: list[int], outputs: list[int]
) -> tuple[list[int], list[int]]:
    return (
        [config.input_length or max(1, round(length * config.length_scale)) for length in inputs],
        [config.output_length or max(1, round(length * config.length_scale)) for length in outputs],
    )
