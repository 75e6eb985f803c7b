"""The shape of a completion's answer: OpenAI's, with a `baton` object that names every phase."""

import math
import time
from collections.abc import AsyncIterator
from typing import Any

from protos.baton.v1 import inference_pb2
from router.core import Admitted
from router.http.errors import dump
from router.http.schema import Completion
from router.http.sse import event
from router.output import Delta, OutputToken

LEAST_LOGPROB = -9999.0
"""What OpenAI shows for a token of no probability; JSON has no infinity."""
PHASES = tuple(field.name for field in inference_pb2.Phases.DESCRIPTOR.fields)


class Answer:
    """Builds one answer from its deltas."""

    def __init__(self, completion: Completion, admitted: Admitted) -> None:
        self._completion = completion
        self._codec = admitted.codec
        self._characters = 0
        request = admitted.journey.request
        self._head = {
            "id": f"cmpl-{request.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    async def collect(self, deltas: AsyncIterator[Delta]) -> dict[str, Any]:
        """The whole answer, once its last delta has come."""
        tokens: list[OutputToken] = []
        tail, last = "", Delta([])
        async for delta in deltas:
            tokens += delta.tokens
            tail, last = tail + delta.tail, delta
        whole = Delta(tokens, tail, last.finish_reason, last.stop_token_id)
        return self._head | {
            "choices": [self._choice(whole)],
            "usage": usage_object(last.usage),
            "baton": baton_object(last.report),
        }

    def chunks(self, delta: Delta) -> list[bytes]:
        """The events for one delta; the last delta's last event carries `baton`."""
        chunk = self._head | {"choices": [self._choice(delta)]}
        if not self._completion.include_usage:
            if delta.last:
                chunk["baton"] = baton_object(delta.report)
            return [event(dump(chunk))]
        chunk["usage"] = None
        events = [event(dump(chunk))]
        if delta.last:
            end = {
                "choices": [],
                "usage": usage_object(delta.usage),
                "baton": baton_object(delta.report),
            }
            events.append(event(dump(self._head | end)))
        return events

    def _choice(self, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_name or None,
        }
        if self._completion.logprobs is not None:
            choice["logprobs"] = self._logprobs(delta.tokens)
        if self._completion.return_token_ids:
            choice["token_ids"] = [token.id for token in delta.tokens]
        return choice

    def _logprobs(self, tokens: list[OutputToken]) -> dict[str, Any]:
        names = [
            self._codec.token_text(t.id) if self._codec else f"token_id:{t.id}" for t in tokens
        ]
        values = [_finite(token.logprob) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._characters)
            self._characters += len(token.text)
        top = None
        if self._completion.logprobs:
            # Accepted for greedy requests only, whose produced token is the most likely one.
            top = [{name: value} for name, value in zip(names, values, strict=True)]
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }


def usage_object(usage: inference_pb2.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def baton_object(report: inference_pb2.Report) -> dict[str, Any]:
    """What Baton alone tells: durations in milliseconds, bytes, the workers and the seed."""
    return {
        "transport": report.transport,
        "kv_bytes": report.kv_bytes,
        "phases_ms": {name.removesuffix("_ms"): getattr(report.phases, name) for name in PHASES},
        "prefill_worker": report.prefill_worker,
        "decode_worker": report.decode_worker,
        "seed": report.seed,
        "replays": report.replays,
    }


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
