"""What a trace tells of a request: attributes by the GenAI semantic conventions, phases as
siblings.

Phases are laid one after the other, those of the first token from the request's arrival on, those
of the handover from its first token on: their lengths are each process's own measurement, their
places are not, as no two processes share a clock. What follows the second token is `decode`. So
the phases of a request that finished fill its span, without a gap and without an overlap.
"""

from observability.tracing import Attributes, Part, Tracing
from protos.baton.v1 import inference_pb2, worker_pb2
from router.journey import Journey
from router.phases import RequestTimes

FIRST_TOKEN_PHASES = ("admission", "reserve", "queue", "prefill", "network")
HANDOVER_PHASES = ("transfer_tail", "verify", "join", "first_decode_step", "handover_network")


def name_of(operation: str, model: str) -> str:
    """The span's name, as the conventions want it."""
    return f"{operation} {model}"


def at_start(
    operation: str, model: str, request_id: str, sampling: worker_pb2.ResolvedSampling
) -> Attributes:
    """What is known of a request when it is admitted."""
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": model,
        "gen_ai.response.id": request_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }


def at_end(journey: Journey) -> Attributes:
    """What is known when it is over."""
    known: dict[str, str | int | float | bool | list[str]] = {
        "gen_ai.response.model": journey.request.model,
        "gen_ai.usage.input_tokens": len(journey.request.prompt_ids),
        "gen_ai.usage.output_tokens": journey.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": journey.cached_tokens,
        "baton.outcome": journey.outcome,
        "baton.replays": journey.replays,
        "baton.transport": journey.transport,
        "baton.kv_bytes": journey.kv_bytes,
        "baton.prefill_worker": journey.prefill_worker,
        "baton.decode_worker": journey.decode_worker,
    }
    if journey.times.ttft_s is not None:
        known["gen_ai.response.time_to_first_chunk"] = journey.times.ttft_s
    if journey.finished:
        known["gen_ai.response.finish_reasons"] = [journey.outcome]
    else:
        known["error.type"] = journey.outcome
    return known


def finish(tracing: Tracing, journey: Journey, closed_at: float) -> None:
    """Ends a request's span, its phases beneath it. `closed_at`: time.monotonic() seconds."""
    if journey.trace is None:
        return
    times = journey.times
    done = journey.finished and times.last_at is not None
    tracing.end(
        journey.trace,
        parts_of(times, times.phases()),
        at_end(journey),
        ended=times.last_at if done and times.last_at is not None else closed_at,
        error="" if journey.finished else journey.outcome,
    )


def parts_of(times: RequestTimes, phases: inference_pb2.Phases) -> list[Part]:
    """The phases that took time."""
    if times.first_at is None or times.last_at is None:
        return []
    parts = _laid(FIRST_TOKEN_PHASES, phases, times.arrived_at, times.first_at)
    if times.second_at is None:
        return parts
    parts += _laid(HANDOVER_PHASES, phases, times.first_at, times.second_at)
    if times.last_at > times.second_at:
        parts.append(Part("decode", times.second_at, times.last_at))
    return parts


def _laid(
    names: tuple[str, ...], phases: inference_pb2.Phases, started: float, ended: float
) -> list[Part]:
    parts, now = [], started
    for name in names:
        took_s = getattr(phases, f"{name}_ms") / 1e3
        if took_s > 0:
            parts.append(Part(name, now, min(now + took_s, ended)))
            now += took_s
    if parts:
        # Sums of floats: the last one ends where the total does, to the nanosecond.
        parts[-1] = parts[-1]._replace(ended=ended)
    return parts
