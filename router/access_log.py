"""One line for each request that is over: how it ended, and where its time went."""

import logging

from observability import trace_context
from protos.baton.v1 import inference_pb2
from router.journey import Journey

logger = logging.getLogger(__name__)

PHASES = tuple(field.name for field in inference_pb2.Phases.DESCRIPTOR.fields)


def log_end(journey: Journey) -> None:
    """Nothing of prompt or output is in it, nor anything else that a client sent but its id."""
    request = journey.request
    phases = journey.times.phases()
    logger.info(
        "request %s ended: %s, %d prompt and %d output tokens, %d replays, "
        "first token after %.1f ms, handover %.1f ms",
        request.request_id,
        journey.outcome,
        len(request.prompt_ids),
        journey.output_tokens,
        journey.replays,
        phases.ttft_ms,
        phases.handover_ms,
        extra={
            "request_id": request.request_id,
            "trace_id": trace_context.trace_id(request.traceparent),
            "outcome": journey.outcome,
            "prompt_tokens": len(request.prompt_ids),
            "cached_tokens": journey.cached_tokens,
            "output_tokens": journey.output_tokens,
            "replays": journey.replays,
            "duration_ms": round(1e3 * journey.duration_s, 3),
            "phases_ms": {
                name.removesuffix("_ms"): round(getattr(phases, name), 3) for name in PHASES
            },
            "transport": journey.transport,
            "kv_bytes": journey.kv_bytes,
            "prefill_worker": journey.prefill_worker,
            "decode_worker": journey.decode_worker,
        },
    )
