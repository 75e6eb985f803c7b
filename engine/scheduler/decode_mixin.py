"""How requests whose KV arrived by transfer enter a batch (seed section 4, the decode mixin).

They join as if their extend had run here: rows, pages and lengths are described, and the first
token is seeded. No forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from engine.errors import EngineError
from engine.execution.device import to_device
from engine.execution.forward_batch import ForwardMode
from engine.memory.req_to_token import page_slots
from engine.scheduler.sampling_state import SamplingState

if TYPE_CHECKING:
    from engine.scheduler.schedule_batch import ScheduleBatch


class ScheduleBatchDisaggregationDecodeMixin:
    """The part of `ScheduleBatch` that only decode workers use; mixed into that class alone."""

    def prepare_for_prebuilt(self) -> None:
        """Gives each request a row over the pages it brings; their KV holds all tokens so far.

        Raises `OutOfMemoryError` where rows are short, with nothing taken.
        """
        batch = cast("ScheduleBatch", self)
        batch.describe_prebuilt([req.pages for req in batch.reqs])
        batch.begin_prebuilt()

    def describe_prebuilt(self, pages: Sequence[Sequence[int]]) -> list[int]:
        """The device's part of `prepare_for_prebuilt`, which may be done before the KV is there:
        new rows, which are returned, over these pages of each request, lengths and sampling
        parameters. `begin_prebuilt` follows when the KV has come. Raises `OutOfMemoryError`.
        """
        batch = cast("ScheduleBatch", self)
        rows = batch.alloc_req_slots(len(batch.reqs))
        last_slots: list[int] = []
        for req, row, own in zip(batch.reqs, rows, pages, strict=True):
            req.prefix_len, req.extend_input_len = 0, req.seqlen
            slots = page_slots(list(own), batch.page_size, 0, req.seqlen)
            batch.req_to_token_pool.write(row, 0, slots)
            last_slots.append(int(slots[-1]))
        batch.prebuilt_rows = rows
        batch.describe_rows(rows, [req.seqlen for req in batch.reqs])
        batch.last_loc = to_device(last_slots, batch.device)
        batch.sampling = SamplingState.of(batch.reqs, batch.device, vocab_size=batch.vocab_size)
        return rows

    def begin_prebuilt(self) -> None:
        """The KV has come: the rows that were described are their requests'."""
        batch = cast("ScheduleBatch", self)
        batch.forward_mode = ForwardMode.PREBUILT
        for req, row in zip(batch.reqs, batch.prebuilt_rows, strict=True):
            if req.kv_committed_len != req.seqlen:
                raise EngineError(
                    f"request {req.rid}: KV of {req.kv_committed_len} tokens came for {req.seqlen}"
                )
            req.req_pool_idx = row
        batch.prefix_lens = [0] * len(batch.reqs)
        batch.extend_lens = [req.seqlen for req in batch.reqs]
        batch.extend_num_tokens = 0

    def process_prebuilt(self, first_tokens: Sequence[int]) -> None:
        """Seeds the first tokens, which the client has from the prefill worker. Each request
        advances by its first token exactly once. The tree learns of the prompts behind the launch
        (`Scheduler.step`).
        """
        batch = cast("ScheduleBatch", self)
        for req, token in zip(batch.reqs, first_tokens, strict=True):
            req.append_output(token, None)
        batch.output_ids = to_device(first_tokens, batch.device)
