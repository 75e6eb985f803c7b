"""Requests whose KV comes by transfer, described before it is all there.

A newcomer's row, its page table and its sampling parameters cost the host more than half a
millisecond, and do not depend on what its pages hold. So they are made while the pages are on their
way, or are being checked, and the pass that takes it in only adds it to the batch. Nothing here is
in a batch: whoever does not come after all gives its row back, and nobody has read it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.memory.req_to_token import ReqToTokenPool
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch


class _Described(NamedTuple):
    batch: ScheduleBatch
    row: int
    """It belongs to `Newcomers` until the request joins."""
    pages: list[int]


class Newcomers:
    """Batches of one, each until its request joins or is dropped."""

    def __init__(
        self, req_to_token: ReqToTokenPool, batch_of: Callable[[list[Req]], ScheduleBatch]
    ) -> None:
        self._req_to_token = req_to_token
        self._batch_of = batch_of
        self._described: dict[Req, _Described] = {}

    @property
    def rows(self) -> list[int]:
        return [described.row for described in self._described.values()]

    def __contains__(self, req: Req) -> bool:
        return req in self._described

    def describe(self, req: Req, pages: Sequence[int]) -> None:
        """`req` will join with its KV in these pages. Where no row is free, or a grammar is still
        to say what it may draw, it is described when it joins."""
        if req in self._described or req.sampling_params.grammar is not None:
            return
        if self._req_to_token.available_size() < 1:
            return
        batch = self._batch_of([req])
        [row] = batch.describe_prebuilt([pages])
        self._described[req] = _Described(batch, row, list(pages))

    def confirm(self, req: Req, pages: Sequence[int]) -> None:
        """Its KV has come in these pages: what was described over others is worth nothing."""
        described = self._described.get(req)
        if described is not None and described.pages != list(pages):
            self.drop(req)

    def take(self, req: Req) -> ScheduleBatch | None:
        """It joins: its batch and row are the caller's. None: it is not described."""
        described = self._described.pop(req, None)
        return None if described is None else described.batch

    def drop(self, req: Req) -> None:
        """It does not come."""
        described = self._described.pop(req, None)
        if described is not None:
            self._req_to_token.free([described.row])
