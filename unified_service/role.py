"""Both phases on one engine: the common scheduler, and nothing to hand over.

What a user with one GPU runs, and where the router turns when no pair is free. Prompts wait here
until the scheduler's own budgets take them (scheduling.md sections 2 and 3); there is no ticket, as
nothing has to land anywhere else. With mixed chunks, requests that decode go on while a prompt is
computed.
"""

import time
from dataclasses import dataclass

from engine.errors import EngineError
from engine.scheduler.req import Req
from engine.types import RequestId
from kvtransfer.events import KvEvent
from protos.baton.v1 import channel_pb2, worker_pb2
from worker.engine_parts import EngineParts
from worker.engine_role import EngineRole


@dataclass(slots=True)
class Progress:
    """A request until its first decode step was reported."""

    req: Req
    first_token_sent: bool = False
    """Its prompt's durations went with it; those of the first decode step are still to come."""


class UnifiedRole(EngineRole):
    """Runs in a unified engine."""

    decodes = True

    def __init__(self, parts: EngineParts) -> None:
        super().__init__(parts)
        self._progress: dict[RequestId, Progress] = {}

    # ---- messages -------------------------------------------------------------------------------

    def handle_request(self, message: channel_pb2.FrontToEngine) -> None:
        if message.WhichOneof("kind") == "generate":
            self._accept(message.generate)

    def _accept(self, request: worker_pb2.GenerateLocally) -> None:
        rid = self.arrive(request)
        try:
            req = self.checked_req(request)
            self.scheduler.add_request(req)
        except EngineError as error:
            self.refuse(rid, error)
            self.done(rid)
        else:
            self._progress[rid] = Progress(req)

    def abort(self, rid: RequestId) -> None:
        if not self.scheduler.abort_request(rid):
            self.done(rid)

    def on_kv_event(self, event: KvEvent) -> None:
        """None can come: this engine has no transport and no peer."""

    # ---- readings -------------------------------------------------------------------------------

    def done(self, rid: RequestId) -> None:
        self._progress.pop(rid, None)
        super().done(rid)

    def worker_timing(self, rid: RequestId) -> worker_pb2.WorkerTiming:
        """Of the prompt with the first output, of the first decode step with the second: the same
        durations that a pair's two workers measure, but for the transfer.
        """
        progress = self._progress[rid]
        req = progress.req
        if not progress.first_token_sent:
            progress.first_token_sent = True
            self.report_timing_again(rid)
            return worker_pb2.WorkerTiming(
                queue_ms=(req.t_first_forward - self.arrivals[rid]) * 1e3,
                prefill_ms=(req.t_first_token - req.t_first_forward) * 1e3,
                cached_tokens=req.cached_tokens,
            )
        del self._progress[rid]
        # With overlapping steps the decode step is prepared before the first token is known.
        begun = max(req.t_first_decode, req.t_first_token)
        return worker_pb2.WorkerTiming(
            join_ms=(begun - req.t_first_token) * 1e3,
            first_decode_step_ms=(time.monotonic() - begun) * 1e3,
        )
