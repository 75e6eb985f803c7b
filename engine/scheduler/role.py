"""What a worker's role adds to the scheduler: hooks, all optional.

The scheduler knows no network. A prefill role sends pages from `on_extend_result`, a decode role
feeds `Scheduler.add_prebuilt` from `poll`; the scheduler calls both at fixed places of its pass,
on its own thread, and never waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from engine.errors import EngineError
    from engine.execution.forward_batch import LayersDone
    from engine.scheduler.admission import Promise
    from engine.scheduler.req import Req
    from engine.scheduler.scheduler import Scheduler

OwnerKind = Literal["in_use", "held"]


class SchedulerRole:
    """A role without transfers: prefill and decode on one engine."""

    decodes: bool = True
    """False: a prefill-only worker. A request whose prompt is done and that is not finished leaves
    the batch for `Scheduler.transferring`, with row and pages, until `release_request`."""

    scheduler: Scheduler
    """Set by `attach`."""

    def attach(self, scheduler: Scheduler) -> None:
        """Called once, at the end of the scheduler's construction."""
        self.scheduler = scheduler

    def poll(self) -> None:
        """Called at the start of every pass, whatever waits. May call `add_request`,
        `abort_request`, `add_prebuilt` and `release_request`; must not block."""

    def on_extend_launched(self, req: Req, *, start: int, end: int, draws: bool) -> None:
        """Called when all of an extend is on its way to the device: the KV of positions
        `start .. end - 1`, in `req.pages`; `draws`: they are the prompt's last. `on_step_launched`
        follows at once, and later `on_extend_result` for each of them, in this order, but for a
        request that has ended meanwhile.
        """

    def on_step_launched(self, layers_done: Sequence[LayersDone]) -> None:
        """Called when all of a step is on its way to the device, in the current stream, after
        `on_extend_launched` of its extends: from now on the host has time, and work may be queued
        behind the step or behind its first layers (`ForwardResult.layers_done`). Must not wait for
        the device."""

    def on_extend_result(
        self, req: Req, *, prompt_done: bool, token: int | None, logprob: float | None
    ) -> None:
        """Called when an extend of a request has ended: the KV of its first `req.kv_ready_len`
        tokens is computed, in `scheduler.request_pages(req)`; this extend computed that from
        `req.kv_ready_from` on. (With overlap the next extend may be under way, and
        `kv_committed_len` and `prefix_len` are its.) Not called for a request that has been aborted
        meanwhile; none of what it computed in this extend is lent to others then.
        `prompt_done`: `token` was drawn, and `req.finished()` says whether it was the last one.
        Also called for prompts that are computed again after a retraction. May call
        `abort_request`, for this request or others.
        """

    def on_tokens_drawn(self) -> None:
        """Called on a prefill-only worker when a step has ended and its tokens are known, before
        anything else is done about it: `Scheduler.take_outputs` gives them, to be sent at once. A
        role that leaves them finds them in the pass's `StepResult`."""

    def on_layers_done(self, req: Req, *, layers: range, start: int, end: int) -> None:
        """Called when a part of an extend that runs a few layers at a time has ended: `layers` of
        the KV of positions `start .. end - 1` are computed, in `req.pages`, and may leave. Called
        for all layers in order, then `on_extend_result`; not for a request that has been aborted.
        May call `abort_request`.
        """

    def on_request_aborted(self, req: Req) -> None:
        """Called when a request ends without being finished (`abort_request`, or an error of the
        engine), before its pages are given back."""

    def on_grammar_failed(self, req: Req, error: EngineError) -> None:
        """Called when the grammar of a request that `Scheduler.prepare_grammar` was told of, and
        that has not been added since, is wrong or cannot be compiled. The role ends it."""

    def retain_pages(self, req: Req) -> bool:
        """Asked when a request has ended (finished, aborted, failed), before its pages are given
        back. True: somebody still reads them; they count as held until `release_request`."""
        return False

    def page_owners(self) -> Iterable[tuple[OwnerKind, Sequence[int]]]:
        """Asked by the audit: pages that the role owns and no request of the scheduler does, such
        as those of tickets (in use) or in quarantine (held)."""
        return ()

    def promises(self) -> Iterable[Promise]:
        """Asked in every pass: tickets that were granted and have not joined; the scheduler admits
        nothing into what they will take."""
        return ()

    def waits_for_ticket(self) -> Req | None:
        """Asked in every pass where priorities count: the request to be granted a ticket next, if
        only memory or places keep it waiting. Less important ones that run may give way to it."""
        return None

    def on_room_made(self) -> None:
        """Called when they have, before anybody else is given what they held: grant it now."""

    def has_work(self) -> bool:
        """Whether `poll` must be called soon although nothing is scheduled."""
        return False
