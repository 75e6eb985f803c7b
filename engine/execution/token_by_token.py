"""The deterministic mode where there are no kernels made for it: every token computed alone.

A step over many tokens becomes as many passes over one, each with the shapes of a decode step of
one request. A library that picks another order of sums for another number of rows never gets to,
and KV written while a prompt is computed equals KV written by decode because it is the same
computation.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from engine.execution.attention import AttentionBackend
from engine.execution.forward_batch import ForwardBatch, ForwardMode
from engine.memory.kv_pool import PageMajorKVPool
from engine.models.decoder import BetweenLayers, Decoder


def run_layers_by_token(
    decoder: Decoder,
    layers: range,
    state: BetweenLayers,
    batch: ForwardBatch,
    kv_pool: PageMajorKVPool,
    attention: AttentionBackend,
) -> BetweenLayers:
    """As Decoder.run_layers, and plans attention itself."""
    hidden, residual = [], []
    for index, step in enumerate(single_token_steps(batch)):
        attention.plan(step)
        one = BetweenLayers(
            None if state.hidden is None else _row(state.hidden, index), _row(state.residual, index)
        )
        one = decoder.run_layers(
            layers, one, step.positions, kv_pool.rows(step.out_cache_loc), kv_pool, attention
        )
        if one.hidden is None:
            raise ValueError("a step runs through at least one layer")
        hidden.append(one.hidden)
        residual.append(one.residual)
    return BetweenLayers(torch.cat(hidden), torch.cat(residual))


def hidden_states_by_token(
    decoder: Decoder, state: BetweenLayers, tokens: torch.Tensor | None
) -> torch.Tensor:
    """As Decoder.hidden_states."""
    hidden, residual = state
    if hidden is None:
        raise ValueError("a decoder needs at least one layer")
    indices = range(hidden.shape[0]) if tokens is None else tokens.tolist()
    rows = [BetweenLayers(_row(hidden, index), _row(residual, index)) for index in indices]
    return torch.cat([decoder.hidden_states(row) for row in rows])


def logits_by_token(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """As Decoder.logits."""
    return torch.cat([decoder.logits(_row(hidden, index)) for index in range(hidden.shape[0])])


def single_token_steps(batch: ForwardBatch) -> Iterator[ForwardBatch]:
    """One decode step of one request for each input token of the batch, in order."""
    index = 0
    for row, (prefix, length) in enumerate(
        zip(batch.extend_prefix_lens, batch.extend_lens, strict=True)
    ):
        for position in range(prefix, prefix + length):
            yield replace(
                batch,
                forward_mode=ForwardMode.DECODE,
                input_ids=_row(batch.input_ids, index),
                positions=_row(batch.positions, index),
                out_cache_loc=_row(batch.out_cache_loc, index),
                req_pool_indices=_row(batch.req_pool_indices, row),
                seq_lens=_row(batch.positions, index) + 1,
                seq_lens_cpu=[position + 1],
                extend_prefix_lens=[position],
                extend_lens=[1],
                prompt_targets=None,
                pages=None,
            )
            index += 1


def _row(values: torch.Tensor, index: int) -> torch.Tensor:
    """A copy, so that it lies in memory as every other row's does."""
    return values[index : index + 1].clone()
