"""What the answers of both generating doors have in common: choices, usage, a `baton` object."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from protos.baton.v1 import inference_pb2
from router.http.choices import Choices
from router.http.errors import dump
from router.http.sse import event
from router.output import Delta

PHASES = tuple(field.name for field in inference_pb2.Phases.DESCRIPTOR.fields)


class Answer(ABC):
    """Builds one answer, whole or in chunks, from the deltas of its choices."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, choices: Choices, *, fingerprint: str, include_usage: bool) -> None:
        self._head = {
            "id": f"{self.id_prefix}-{choices.id}",
            "created": int(time.time()),
            "model": choices.model,
            "system_fingerprint": fingerprint,
        }
        self._per_prompt = choices.per_prompt
        self._include_usage = include_usage
        self._ended: list[Delta | None] = [None] * len(choices)

    @abstractmethod
    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """One choice of a whole answer."""

    @abstractmethod
    def chunk_choices(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """What one delta adds to a choice, a chunk each; the last delta's last chunk ends it."""

    async def collect(self, deltas: AsyncIterator[tuple[int, Delta]]) -> dict[str, Any]:
        """The whole answer, once every choice has ended."""
        parts: list[list[Delta]] = [[] for _ in self._ended]
        async for index, delta in deltas:
            parts[index].append(delta)
            self._note(index, delta)
        whole = [self.choice(index, join(deltas)) for index, deltas in enumerate(parts)]
        return {
            "object": self.whole_object,
            **self._head,
            "choices": whole,
            "usage": self._usage(),
            "baton": self._baton(),
        }

    def events(self, index: int, delta: Delta) -> list[bytes]:
        """The events for one delta. The chunk that ends a choice carries its `baton`; the chunk
        with the usage, where asked for, that of the whole.
        """
        self._note(index, delta)
        chunks = [self._chunk([choice]) for choice in self.chunk_choices(index, delta)]
        if delta.last:
            chunks[-1]["baton"] = baton_object(delta.report)
        if self._include_usage:
            for chunk in chunks:
                chunk["usage"] = None
            if all(self._ended):
                end = {"usage": self._usage(), "baton": self._baton()}
                chunks.append(self._chunk([]) | end)
        return [event(dump(chunk)) for chunk in chunks]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": self.chunk_object, **self._head, "choices": choices}

    def _note(self, index: int, delta: Delta) -> None:
        if delta.last:
            self._ended[index] = delta

    def _usage(self) -> dict[str, Any]:
        usages = [delta.usage for delta in self._ended if delta is not None]
        # A prompt counts once, however many choices it has.
        prompts = usages[:: self._per_prompt]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in prompts)},
        }

    def _baton(self) -> dict[str, Any]:
        reports = [baton_object(delta.report) for delta in self._ended if delta is not None]
        return reports[0] if len(reports) == 1 else {"choices": reports}


def join(deltas: list[Delta]) -> Delta:
    """All of one choice as if it had come at once."""
    last = deltas[-1]
    return Delta(
        tokens=[token for delta in deltas for token in delta.tokens],
        text="".join(delta.text for delta in deltas),
        prompt_tokens=deltas[0].prompt_tokens,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        stop_text=last.stop_text,
    )


def stop_reason(delta: Delta) -> str | int | None:
    """The text or the token that ended the choice, where one did."""
    return delta.stop_text if delta.stop_text is not None else delta.stop_token_id


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
