"""Turns what the device drew into outputs, endings and handovers."""

from collections.abc import Mapping, Sequence

from engine.memory.pools import MemoryPools
from engine.scheduler.in_flight import ExtendSpan, LaunchedStep, StepsInFlight
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.logprobs import Alternatives, read_top, take_prompt_logprobs
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.step_result import TokenOutput


class ResultProcessor:
    """Called once for each forward, in the order of their launches, when it has ended; with
    overlap, the next one was launched before."""

    def __init__(
        self,
        lifecycle: RequestLifecycle,
        memory: MemoryPools,
        role: SchedulerRole,
        in_flight: StepsInFlight,
    ) -> None:
        self._lifecycle = lifecycle
        self._memory = memory
        self._role = role
        self._in_flight = in_flight

    def process_oldest(self) -> LaunchedStep:
        """Waits for the oldest launched step and hands out what it drew. A request that was
        launched once more than it lived is passed over; its pages go back with the last step.
        """
        step, result = self._in_flight.oldest_ended()
        for req, span in zip(step.split_reqs, step.spans, strict=False):
            if not req.finished():
                self._role.on_layers_done(req, layers=step.layers, start=span.start, end=span.end)
        tokens: list[int] = result.next_token_ids.tolist()
        logprobs: list[float | None]
        logprobs = [None] * len(tokens) if result.logprobs is None else result.logprobs.tolist()
        top = read_top(step.reqs, step.top, result.top)
        spans = step.spans
        if spans:
            take_prompt_logprobs(step.reqs, step.prompt_targets, result.prompt)
        if not self._role.decodes:
            self._process_prefills(step, tokens, logprobs, top)
            return step
        ended = self._lifecycle.on_step_ended
        outputs = self._lifecycle.events.outputs
        for i, (req, token, logprob) in enumerate(zip(step.reqs, tokens, logprobs, strict=True)):
            if (
                i >= len(spans)
                and req.wants_only_tokens
                and req.grammar is None
                and req.finish_reason is None
                and req.t_first_token
                and token not in req.stop_token_ids
                and len(req.output_ids) + 1 < req.max_new_tokens
            ):
                # `_take_token`, written out for the many tokens that are nothing but the next one.
                req.in_flight -= 1
                req.output_ids.append(token)
                outputs.append(TokenOutput(req.rid, token, len(req.output_ids) - 1))
                continue
            if req.finish_reason is not None:
                ended(req)
                continue
            req.in_flight -= 1
            if i < len(spans):
                shown = None
                if spans[i].draws:
                    shown = self._take_token(req, token, logprob, top.get(i, ()))
                self._process_extend(req, spans[i], token, shown)
            else:
                self._take_token(req, token, logprob, top.get(i, ()))
                if req.finish_reason is not None:
                    self._lifecycle.finish(req)
        return step

    def _process_prefills(
        self,
        step: LaunchedStep,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Mapping[int, Alternatives],
    ) -> None:
        """On a prefill-only worker the tokens leave first: what follows from a prompt's end (seals,
        the transfer, the tree) takes milliseconds, and no client need wait for those of its own
        prompt, nor of the others in the step."""
        drawn: dict[int, float | None] = {}
        for i, (req, span) in enumerate(zip(step.reqs, step.spans, strict=False)):
            if req.finish_reason is None and span.draws:
                drawn[i] = self._take_token(req, tokens[i], logprobs[i], top.get(i, ()))
        self._role.on_tokens_drawn()
        for i, (req, span) in enumerate(zip(step.reqs, step.spans, strict=False)):
            over = req.finish_reason
            if over is FinishReason.ABORT or (over is not None and i not in drawn):
                # Nobody told the role of these pages, so the tree must not lend them.
                req.kv_committed_len = min(req.kv_committed_len, span.start)
                self._lifecycle.on_step_ended(req)
                continue
            req.in_flight -= 1
            self._process_extend(req, span, tokens[i], drawn.get(i))

    def _process_extend(self, req: Req, span: ExtendSpan, token: int, shown: float | None) -> None:
        req.kv_ready_from, req.kv_ready_len = span.start, span.end
        if not span.draws:
            self._role.on_extend_result(req, prompt_done=False, token=None, logprob=None)
            return
        self._role.on_extend_result(req, prompt_done=True, token=token, logprob=shown)
        if req.finish_reason is FinishReason.ABORT:
            return  # by the role, just now; the next pass settles it
        if req.finished():
            self._lifecycle.finish(req)
        elif not self._role.decodes:
            # Others with the same prompt need not wait for the transfer's end.
            self._in_flight.cache_unfinished_req(req, replace_duplicates=False)
            self._lifecycle.hand_over(req)
        else:
            # Others with the same prompt need not wait for this one's end.
            self._in_flight.cache_unfinished_req(req)

    def _take_token(
        self, req: Req, token: int, logprob: float | None, top: Alternatives
    ) -> float | None:
        shown = None
        if logprob is not None and req.sampling_params.wants_logprobs:
            shown = logprob
        req.append_output(token, shown)
        prompt = None
        if req.prompt_tokens:
            prompt, req.prompt_tokens = req.prompt_tokens, []
        if req.grammar is not None and req.grammar_error is not None:
            return shown  # what was drawn is no output
        self._lifecycle.events.outputs.append(
            TokenOutput(
                rid=req.rid,
                token=token,
                index=len(req.output_ids) - 1,
                logprob=shown,
                finish_reason=req.finish_reason,
                stop_token=req.stop_token,
                top=top,
                prompt=prompt,
            )
        )
        return shown
