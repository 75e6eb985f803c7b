"""One request from the choice of its workers to its last token.

Reserve goes to decode and Prefill to prefill at the same moment; decode's ticket is forwarded;
tokens come from both and leave in the order of their index. A unified worker does it all by itself.
When a worker dies, the same prompt, the output so far and the same seed go to another pair or
unified worker, and the client sees neither a gap nor a double.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable

from observability.tracing import RequestTrace
from protos.baton.v1 import inference_pb2, worker_pb2
from protos.errors import BatonError, ErrorCode, code_from_name
from router.attempt import Attempt
from router.config import RouterConfig
from router.detokenizer import IncrementalDetokenizer
from router.fleet import Fleet
from router.output import Delta, Output
from router.phases import RequestTimes
from router.policy import Policy
from router.request import GenerationRequest
from router.worker_link import WorkerLink

logger = logging.getLogger(__name__)

REPLAY_PAUSE_S = 0.05
"""Before a second replay: what broke between two workers may still be coming to light."""


class Journey:
    """Runs one request. Iterate `deltas` once, and always `close`: that frees the workers."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        fleet: Fleet,
        policy: Policy,
        config: RouterConfig,
        detokenizer: IncrementalDetokenizer | None,
        on_tokens: Callable[[float, int], None],
        on_close: Callable[["Journey"], None],
        trace: RequestTrace | None = None,
    ) -> None:
        """
        Args:
            request: what to do.
            fleet: the workers.
            policy: chooses among usable pairs.
            config: bounds and waits.
            detokenizer: makes the text; None: token ids only.
            on_tokens: told (seconds since the tokens before, number of tokens).
            on_close: told once, when the request is over, however it went.
            trace: its span; None: it is not traced.
        """
        self.request = request
        self.trace = trace
        self.times = RequestTimes(arrived_at=request.arrived_at)
        self.outcome = "client_gone"
        """How it went, for metrics: a finish reason, an error code, or client_gone."""
        self.attempts: list[Attempt] = []
        self._work_id = f"{request.request_id}~{secrets.token_hex(4)}"
        """The request's id at the workers. A client may use its id again while workers still end
        what went before, and clients of two routers may choose the same one.
        """
        self._fleet = fleet
        self._policy = policy
        self._config = config
        self._on_tokens = on_tokens
        self._on_close = on_close
        self._output = Output(
            max_tokens=request.max_tokens,
            detokenizer=detokenizer,
            stop=request.stop,
            min_tokens=request.sampling.min_tokens,
        )
        self._error: BatonError | None = None
        self._setback: BatonError | None = None
        """Why the attempt is over, where another may follow."""
        self._blamed: frozenset[str] = frozenset()
        """Workers at which this request failed: others are preferred."""
        self._suspected: frozenset[str] = frozenset()
        """Their peers where KV did not get from one to the other: a survivor's word often comes
        before the dead one's session ends. Left out where there is a choice."""
        self._turned_away = 0
        """Attempts that met a draining worker, which had done nothing for them."""
        self._event = asyncio.Event()
        self._at_least = max(1, config.max_buffered_tokens // 2) if request.whole else 1
        """Tokens that make a delta before the end: each delta costs the door, the connection and
        the client the same, whether it holds one token or thousands."""
        self._closed = False
        self._delivered = False
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, request.deadline - time.monotonic()), self._on_deadline
        )

    # ---- for the doors --------------------------------------------------------------------------

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The output as it becomes ready, or whole where that was asked for; a slow reader gets
        more tokens at a time.

        Raises:
            BatonError: the request failed; what was given out before stands.
        """
        try:
            if not self._over and not self._launch():
                raise self._unavailable(self._fleet.why_unusable() or "no worker holds its tokens")
            while True:
                delta = self._take()
                if delta is not None:
                    yield delta
                    if delta.last:
                        return
                elif self._error is not None:
                    raise self._error
                elif self._setback is not None:
                    await self._replay(self._setback)
                else:
                    self._event.clear()
                    await self._event.wait()
        except BatonError as error:
            self.outcome = error.code.value.lower()
            raise
        finally:
            self.close()

    def abort(self) -> None:
        """The client asked to end it: the output ends here, with finish reason ABORT."""
        if not self._over:
            self._output.abort()
            self._leave("aborted by the client")
            self._event.set()

    def fail(self, error: BatonError) -> None:
        """Ends it with an error; what is ready is still delivered."""
        if not self._over:
            self._error = error
            self._leave(error.message)
            self._event.set()

    def close(self) -> None:
        """Leaves the workers, aborting what still runs there. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._leave("the client is gone")
            self._on_close(self)

    @property
    def _over(self) -> bool:
        return self._error is not None or self._output.ended

    @property
    def replays(self) -> int:
        """Attempts after the first because something failed; a worker that drains does not."""
        return max(0, len(self.attempts) - 1 - self._turned_away)

    @property
    def output_tokens(self) -> int:
        return len(self._output.ids)

    @property
    def finished(self) -> bool:
        """The client had all of it: `outcome` is a finish reason."""
        return self._delivered

    @property
    def duration_s(self) -> float:
        """Since its arrival, to its newest token; without one, until now."""
        return (self.times.last_at or time.monotonic()) - self.times.arrived_at

    @property
    def prefill_worker(self) -> str:
        """Of the last attempt; empty: there was none."""
        return self.attempts[-1].pair.prefill.id if self.attempts else ""

    @property
    def decode_worker(self) -> str:
        """Of the last attempt; empty where one token was asked for."""
        decode = self.attempts[-1].pair.decode if self.attempts else None
        return decode.id if decode is not None else ""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV the worker that gave the first token had cached."""
        return self.times.first_attempt.prefill.cached_tokens

    @property
    def kv_bytes(self) -> int:
        """Moved for this request, over all attempts."""
        return sum(attempt.times.decode.kv_bytes for attempt in self.attempts)

    @property
    def transport(self) -> str:
        """What moved them; "none" where nothing had to move."""
        moved = [a.times.decode.transport for a in self.attempts if a.times.decode.kv_bytes]
        return moved[-1] if moved else "none"

    # ---- attempts -------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Sends the request to a pair or a unified worker. False: none is usable."""
        request, so_far = self.request, self._output.ids
        pairs = self._fleet.pairs(
            total_tokens=request.total_tokens,
            prompt_tokens=len(request.prompt_ids) + len(so_far),
            one_token=request.max_tokens - len(so_far) == 1,
        )
        if not pairs:
            return False
        others = [pair for pair in pairs if not pair.involves(self._blamed)]
        setback = self._setback
        if not others and setback is not None and setback.code is ErrorCode.RESOURCE_EXHAUSTED:
            # Full is full: at the same worker the client would only wait once more.
            raise setback
        trusted = [pair for pair in others if not pair.involves(self._suspected)]
        pair = self._policy.choose(
            trusted or others or pairs, prompt_tokens=len(request.prompt_ids)
        )
        attempt = Attempt(
            len(self.attempts), work_id=self._work_id, pair=pair, request=request, sink=self
        )
        self.attempts.append(attempt)
        self._setback = None
        attempt.launch(output_so_far=so_far, max_wait_s=self._config.max_reserve_wait_s)
        return True

    async def _replay(self, setback: BatonError) -> None:
        if len(self.attempts) - self._turned_away > self._config.max_replays:
            raise setback
        logger.warning(
            "request %s: another attempt from token %d: %s",
            self.request.request_id,
            len(self._output.ids),
            setback.message,
            extra={"request_id": self.request.request_id},
        )
        self._output.restart()
        give_up_at = time.monotonic() + self._config.replay_wait_s
        if self.replays > 0:
            await asyncio.sleep(REPLAY_PAUSE_S)
        while not self._over and not self._launch():
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                why = self._fleet.why_unusable() or "none holds its tokens"
                raise BatonError(
                    ErrorCode.UNAVAILABLE,
                    f"{setback.message}; no other worker is usable: {why}",
                    retry_after_s=1.0,
                )
            await self._fleet.wait_for_change(left_s)

    def _set_back(self, link: WorkerLink, error: BatonError, *, turned_away: bool) -> None:
        """The attempt is over; another may follow. `turned_away`: nothing has failed."""
        if not self._over:
            self._setback = error
            self._turned_away += turned_away
            self._blamed = self._blamed | {link.id}
            self._leave(f"another attempt follows: {error.message}")
            self._event.set()

    def _leave(self, reason: str) -> None:
        if self.attempts:
            self.attempts[-1].end(reason)

    # ---- what workers say (WorkSink) ------------------------------------------------------------

    def on_reserved(self, link: WorkerLink, reserved: worker_pb2.Reserved) -> None:
        self.attempts[-1].forward_ticket(reserved)

    def on_output(self, link: WorkerLink, output: worker_pb2.RequestOutput) -> None:
        attempt, before = self.attempts[-1], self._output.last_at
        attempt.note(link, output)
        try:
            ready = self._output.add(output)
        except BatonError as error:
            self.fail(error)
            return
        if ready:
            self._clock(attempt, before, ready)
        if self._output.ended_by_text:
            attempt.end("a stop string ended the output")
        elif self._output.ended:
            attempt.finished(by=link)
        elif self._output.waiting > self._config.max_buffered_tokens:
            self._output.drop_ready()
            limit = self._config.max_buffered_tokens
            message = f"its reader fell more than {limit} tokens behind"
            self.fail(self._named(ErrorCode.RESOURCE_EXHAUSTED, message))
        if self._output.ended or (ready and self._output.waiting >= self._at_least):
            self._event.set()

    def on_failed(self, link: WorkerLink, failed: worker_pb2.WorkFailed) -> None:
        name = worker_pb2.ErrorCode.Name(failed.error.code).removeprefix("ERROR_CODE_")
        error = BatonError(
            code_from_name(name), failed.error.message, retry_after_s=failed.error.retry_after_s
        )
        attempt = self.attempts[-1]
        attempt.gone(link)
        if not attempt.needs(link):
            return
        if failed.retryable:
            peer = attempt.peer_of(link) if failed.between_workers else None
            if peer is not None:
                self._suspected = self._suspected | {peer.id}
            self._set_back(link, error, turned_away=failed.turned_away)
        else:
            self.fail(error)

    def on_lost(self, link: WorkerLink, reason: str) -> None:
        attempt = self.attempts[-1]
        attempt.gone(link)
        if attempt.needs(link):
            role, so_far = link.record.role_name, len(self._output.ids)
            message = f"{role} worker {link.id} was lost after {so_far} tokens ({reason})"
            # Of what a worker has taken, nothing is open when it takes its leave.
            self._set_back(link, self._unavailable(message), turned_away=link.left)

    # ---- output ---------------------------------------------------------------------------------

    def _clock(self, attempt: Attempt, before: float | None, ready: int) -> None:
        now = self._output.last_at or time.monotonic()
        times = self.times
        times.last_at = now
        if times.first_at is None:
            times.first_at, times.first_attempt = now, attempt.times
        if times.second_at is None and len(self._output.ids) > 1:
            times.second_at = now
            times.second_attempt = attempt.times if attempt.decode_spoke else None
        if before is not None:
            self._on_tokens(now - before, ready)

    def _take(self) -> Delta | None:
        if not self._over and self._output.waiting < self._at_least:
            return None
        delta = self._output.take()
        if delta is not None and delta.last:
            self.outcome, self._delivered = delta.finish_name, True
            delta.usage = inference_pb2.Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=len(self._output.ids),
                cached_tokens=self.cached_tokens,
            )
            delta.report = self._report()
        return delta

    def _report(self) -> inference_pb2.Report:
        return inference_pb2.Report(
            transport=self.transport,
            kv_bytes=self.kv_bytes,
            phases=self.times.phases(),
            seed=self.request.sampling.seed,
            replays=self.replays,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
        )

    # ---- errors ---------------------------------------------------------------------------------

    def _on_deadline(self) -> None:
        took_s = time.monotonic() - self.request.arrived_at
        message = f"it did not finish within {took_s:.1f} s"
        self.fail(self._named(ErrorCode.DEADLINE_EXCEEDED, message))

    def _unavailable(self, message: str) -> BatonError:
        return self._named(ErrorCode.UNAVAILABLE, message, retry_after_s=1.0)

    def _named(self, code: ErrorCode, message: str, *, retry_after_s: float = 0.0) -> BatonError:
        return BatonError(
            code, f"request {self.request.request_id}: {message}", retry_after_s=retry_after_s
        )
