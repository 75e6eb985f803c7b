"""A step that ran out of memory, computed again in parts.

What was measured at start leaves room for the largest step, but another process may take memory of
a shared GPU, and an allocator's blocks may lie badly. A part's KV is written before the next part
reads it, so parts compute what the whole would.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from engine.errors import StepMemoryError
from engine.execution.device import to_device
from engine.execution.forward_batch import ForwardBatch, ForwardMode

LEAST_TOKENS = 32
"""Parts are not cut smaller: what does not fit then is not the activations'."""

logger = logging.getLogger(__name__)


def in_parts(
    batch: ForwardBatch, hidden_of: Callable[[ForwardBatch], torch.Tensor]
) -> torch.Tensor:
    """Hidden states [t, hidden] of all tokens of `batch`, which ran out of memory as a whole, by
    `hidden_of` its parts: first the whole once more, with cached blocks given back, then halves.

    Raises StepMemoryError where even small parts do not fit.
    """
    tokens = sum(batch.extend_lens)
    limit = tokens
    while True:
        if batch.input_ids.is_cuda:
            torch.cuda.empty_cache()
        found = _attempt(batch, hidden_of, limit)
        if found is not None:
            logger.warning(
                "a step of %d tokens ran out of memory and was computed in parts of %d: lower "
                "--chunked-prefill-size, --max-running-requests or --mem-fraction",
                tokens,
                limit,
            )
            return found
        if limit <= LEAST_TOKENS:
            raise StepMemoryError(
                f"a step of {tokens} tokens of {len(batch.extend_lens)} requests ran out of memory "
                f"on {batch.input_ids.device}, also in parts of {limit}: lower "
                "--chunked-prefill-size, --max-running-requests or --mem-fraction"
            )
        limit = max(LEAST_TOKENS, -(-limit // 2))


def _attempt(
    batch: ForwardBatch, hidden_of: Callable[[ForwardBatch], torch.Tensor], limit: int
) -> torch.Tensor | None:
    """None where memory ran out. Apart, since an error that is being handled keeps all that its
    frames refer to."""
    try:
        return torch.cat([hidden_of(part) for part in cut(batch, limit)])
    except torch.OutOfMemoryError:
        return None


def cut(batch: ForwardBatch, limit: int) -> Iterator[ForwardBatch]:
    """The batch's tokens in order, at most `limit` at a time."""
    mode = ForwardMode.DECODE if batch.forward_mode.is_decode() else ForwardMode.EXTEND
    row, done, start = 0, 0, 0
    while row < len(batch.extend_lens):
        rows: list[int] = []
        prefixes: list[int] = []
        lengths: list[int] = []
        room = limit
        while room and row < len(batch.extend_lens):
            taken = min(room, batch.extend_lens[row] - done)
            rows.append(row)
            prefixes.append(batch.extend_prefix_lens[row] + done)
            lengths.append(taken)
            room, done = room - taken, done + taken
            if done == batch.extend_lens[row]:
                row, done = row + 1, 0
        end = start + sum(lengths)
        seq_lens = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        device = batch.input_ids.device
        yield replace(
            batch,
            forward_mode=mode,
            input_ids=batch.input_ids[start:end],
            positions=batch.positions[start:end],
            out_cache_loc=batch.out_cache_loc[start:end],
            req_pool_indices=batch.req_pool_indices[to_device(rows, device)],
            seq_lens=to_device(seq_lens, device),
            seq_lens_cpu=seq_lens,
            extend_prefix_lens=prefixes,
            extend_lens=lengths,
            prompt_targets=None,
            pages=None if batch.pages is None else [batch.pages[row] for row in rows],
        )
        start = end
