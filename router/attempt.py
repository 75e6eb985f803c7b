"""One attempt at a request, on one pair of workers or on a unified one."""

import time
from collections.abc import Sequence

from protos.baton.v1 import worker_pb2
from router.phases import AttemptTimes
from router.policy import Pair
from router.request import GenerationRequest
from router.worker_link import WorkerLink, WorkKey, WorkSink

MIN_DEADLINE_S = 1e-3
"""What is told of a deadline that passes just now: 0 would mean that there is none."""


class Attempt:
    """Knows what was sent to whom, and thus who must hear when it ends."""

    def __init__(
        self, number: int, *, work_id: str, pair: Pair, request: GenerationRequest, sink: WorkSink
    ) -> None:
        """
        Args:
            number: counts the request's attempts from 0.
            work_id: the request's id at the workers.
            pair: who does it.
            request: what to do.
            sink: hears what the workers say.
        """
        self.pair = pair
        self.times = AttemptTimes(unified=pair.unified)
        self.prefill_spoke = False
        """The first token came: from prefill, where there is a pair."""
        self.decode_spoke = False
        """A later token came; from a decode worker, so the whole KV has arrived there."""
        self._request = request
        self._sink = sink
        self._key: WorkKey = (work_id, number)
        self._at_work: list[WorkerLink] = []

    def launch(self, *, output_so_far: Sequence[int], max_wait_s: float) -> None:
        """Sends Reserve and Prefill at the same time, or all of it to a unified worker.

        Args:
            output_so_far: tokens that earlier attempts produced.
            max_wait_s: how long decode may let the request wait for memory.
        """
        request, (request_id, number) = self._request, self._key
        prefill, decode = self.pair.prefill, self.pair.decode
        self.times.sent_at = time.monotonic()
        deadline_s = max(MIN_DEADLINE_S, request.deadline - self.times.sent_at)
        if self.pair.unified:
            self._attach_with_prompt(prefill, output_so_far)
            prefill.send(
                worker_pb2.RouterMessage(
                    generate=worker_pb2.GenerateLocally(
                        request_id=request_id,
                        attempt=number,
                        prompt_ids=request.prompt_ids,
                        output_so_far=output_so_far,
                        sampling=request.sampling,
                        priority=request.priority,
                        cache_salt=request.cache_salt,
                        traceparent=request.traceparent,
                        deadline_s=deadline_s,
                    )
                )
            )
            return
        if decode is not None:
            self._at_work.append(decode)
            decode.attach(self._key, self._sink)
            decode.send(
                worker_pb2.RouterMessage(
                    reserve=worker_pb2.ReserveRequest(
                        request_id=request_id,
                        attempt=number,
                        prefill_instance=prefill.id,
                        prompt_ids=request.prompt_ids,
                        output_so_far=output_so_far,
                        sampling=request.sampling,
                        priority=request.priority,
                        max_wait_s=max_wait_s,
                        cache_salt=request.cache_salt,
                        traceparent=request.traceparent,
                        deadline_s=deadline_s,
                    )
                )
            )
        self._attach_with_prompt(prefill, output_so_far)
        prefill.send(
            worker_pb2.RouterMessage(
                prefill=worker_pb2.PrefillRequest(
                    request_id=request_id,
                    attempt=number,
                    decode_instance=decode.id if decode is not None else "",
                    prompt_ids=request.prompt_ids,
                    output_so_far=output_so_far,
                    sampling=request.sampling,
                    priority=request.priority,
                    cache_salt=request.cache_salt,
                    traceparent=request.traceparent,
                    deadline_s=deadline_s,
                )
            )
        )

    def _attach_with_prompt(self, link: WorkerLink, output_so_far: Sequence[int]) -> None:
        self._at_work.append(link)
        tokens = len(self._request.prompt_ids) + len(output_so_far)
        link.attach(self._key, self._sink, prompt_tokens=tokens)

    def forward_ticket(self, reserved: worker_pb2.Reserved) -> None:
        """Decode promised its memory: prefill may begin."""
        self.times.reserve_ms = reserved.reserve_ms
        request_id, number = self._key
        self.pair.prefill.send(
            worker_pb2.RouterMessage(
                ticket=worker_pb2.TicketForPrefill(
                    request_id=request_id, attempt=number, ticket=reserved.ticket
                )
            )
        )

    def note(self, link: WorkerLink, output: worker_pb2.RequestOutput) -> None:
        """Keeps a worker's timing, and sees who is still needed. What a unified worker says after
        its first token counts as decode's.
        """
        if link is self.pair.prefill and not (self.pair.unified and self.prefill_spoke):
            link.settle(self._key)
            self.prefill_spoke = self.prefill_spoke or bool(output.tokens)
            if output.HasField("timing"):
                self.times.prefill = output.timing
            return
        if output.HasField("timing"):
            self.times.decode = output.timing
        self.decode_spoke = self.decode_spoke or bool(output.tokens)

    def needs(self, link: WorkerLink) -> bool:
        """The attempt cannot go on without this worker. Prefill's token may come after decode's
        first one, and nobody else has it; a unified worker is needed to the end.
        """
        if link is self.pair.decode or not self.prefill_spoke:
            return True
        # Of a prefill worker that has taken its leave, decode has all the KV.
        return not (self.decode_spoke or link.left)

    def peer_of(self, link: WorkerLink) -> WorkerLink | None:
        """The pair's other worker; None where there is none."""
        peer = self.pair.decode if link is self.pair.prefill else self.pair.prefill
        return None if peer is link else peer

    def gone(self, link: WorkerLink) -> None:
        """That worker ended the work itself, or is lost: it need not be told."""
        link.detach(self._key)
        if link in self._at_work:
            self._at_work.remove(link)

    def finished(self, *, by: WorkerLink) -> None:
        """The output is complete. Where its first token ended it, decode's promise is void."""
        self.gone(by)
        if by is self.pair.prefill:
            self.end("the first token ended the output")
        else:
            self.gone(self.pair.prefill)

    def end(self, reason: str) -> None:
        """Aborts it on every worker that still has it. Safe to call twice."""
        request_id, number = self._key
        abort = worker_pb2.AbortWork(request_id=request_id, attempt=number, reason=reason)
        for link in list(self._at_work):
            self.gone(link)
            link.send(worker_pb2.RouterMessage(abort=abort))
