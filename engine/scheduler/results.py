"""Turns what the device drew into outputs, endings and handovers."""

from engine.execution.forward_batch import ForwardResult
from engine.memory.pools import MemoryPools
from engine.scheduler.lifecycle import RequestLifecycle
from engine.scheduler.logprobs import Alternatives, read_top, take_prompt_logprobs
from engine.scheduler.req import FinishReason, Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.schedule_batch import ScheduleBatch
from engine.scheduler.step_result import TokenOutput


class ResultProcessor:
    """Called once after each forward, with the batch it ran."""

    def __init__(
        self, lifecycle: RequestLifecycle, memory: MemoryPools, role: SchedulerRole
    ) -> None:
        self._lifecycle = lifecycle
        self._memory = memory
        self._role = role

    def process(self, batch: ScheduleBatch, result: ForwardResult) -> None:
        """Reads the result, which waits for the device. Rows that end stay in the batch until it
        is filtered, so that its tensors and its requests keep one order.
        """
        batch.output_ids = result.next_token_ids
        tokens: list[int] = result.next_token_ids.tolist()
        logprobs: list[float | None]
        logprobs = [None] * len(tokens) if result.logprobs is None else result.logprobs.tolist()
        sampling = batch.sampling
        top = read_top(batch.reqs, sampling.top if sampling is not None else None, result.top)
        num_extends = 0
        if batch.forward_mode.is_extend():
            num_extends = len(batch.reqs) - batch.num_decode_rows
            take_prompt_logprobs(batch.reqs, batch.prompt_targets, result.prompt)
        for i, (req, token, logprob) in enumerate(zip(batch.reqs, tokens, logprobs, strict=True)):
            if req.finished():
                continue  # aborted by the role, in the hook of a row before
            if i < num_extends:
                self._process_extend(req, token, logprob, top.get(i, ()))
            else:
                self._take_token(req, token, logprob, top.get(i, ()))
                if req.finished():
                    self._lifecycle.finish(req)
        self._lifecycle.events.num_input_tokens += (
            batch.extend_num_tokens if num_extends else len(batch.reqs)
        )

    def _process_extend(
        self, req: Req, token: int, logprob: float | None, top: Alternatives
    ) -> None:
        if not req.prompt_done:
            self._role.on_extend_result(req, prompt_done=False, token=None, logprob=None)
            return
        shown = self._take_token(req, token, logprob, top)
        self._role.on_extend_result(req, prompt_done=True, token=token, logprob=shown)
        if req.finish_reason is FinishReason.ABORT:
            return  # by the role, just now; the next pass settles it
        if req.finished():
            self._lifecycle.finish(req)
        elif not self._role.decodes:
            self._lifecycle.hand_over(req)
        else:
            # Others with the same prompt need not wait for this one's end.
            self._memory.tree_cache.cache_unfinished_req(req)

    def _take_token(
        self, req: Req, token: int, logprob: float | None, top: Alternatives
    ) -> float | None:
        shown = logprob if req.sampling_params.wants_logprobs else None
        req.append_output(token, shown)
        prompt, req.prompt_tokens = req.prompt_tokens or None, []
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
