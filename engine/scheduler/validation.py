"""What settings must agree, and what a request must be to ever be served here."""

import torch

from engine.errors import ConfigError, InvalidRequestError, UnknownAdapterError
from engine.memory.pools import MemoryPools
from engine.scheduler.admission import fits_empty_worker
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req


def validate_request(
    req: Req, *, config: SchedulerConfig, total_tokens: int, prefill_only: bool
) -> None:
    """Raises `InvalidRequestError` for a request that could never finish, `UnknownAdapterError` for
    one of an adapter that is not here; lowers its `max_new_tokens` to what the context has room
    for, where it then ends with `length`.

    `total_tokens`: the KV memory of this worker when it is empty. A prefill-only worker holds the
    prompt and the first token, no more.
    """
    if req.lora_id and req.lora_id not in config.lora_ids:
        served = ", ".join(config.lora_ids) or "none"
        raise UnknownAdapterError(
            f"request {req.rid}: adapter {req.lora_id!r} is not served here (adapters: {served})"
        )
    if req.prompt_len == 0:
        raise InvalidRequestError(f"request {req.rid}: the prompt is empty")
    tokens = req.fill_ids
    if min(tokens) < 0 or max(tokens) >= config.vocab_size:
        wrong = next(t for t in tokens if not 0 <= t < config.vocab_size)
        raise InvalidRequestError(
            f"request {req.rid}: token id {wrong} is not in [0, {config.vocab_size})"
        )
    named = {*req.sampling_params.logit_bias, *req.sampling_params.stop_token_ids}
    if named and not (min(named) >= 0 and max(named) < config.vocab_size):
        wrong = next(t for t in named if not 0 <= t < config.vocab_size)
        raise InvalidRequestError(
            f"request {req.rid}: token id {wrong} of logit_bias or stop_token_ids is not in "
            f"[0, {config.vocab_size})"
        )
    if req.sampling_params.min_tokens and len(req.ending_token_ids) >= config.vocab_size:
        raise InvalidRequestError(
            f"request {req.rid}: every token ends the output, so none may be drawn before "
            f"min_tokens {req.sampling_params.min_tokens}"
        )
    room = config.context_length - req.prompt_len
    if room < 1:
        raise InvalidRequestError(
            f"request {req.rid}: the prompt has {req.prompt_len} tokens, the context holds "
            f"{config.context_length} and must have room for a new one; shorten the prompt"
        )
    req.max_new_tokens = min(req.sampling_params.max_new_tokens, room)
    if req.remaining_new_tokens < 1:
        raise InvalidRequestError(
            f"request {req.rid}: {len(req.output_ids)} tokens are produced already and at most "
            f"{req.max_new_tokens} can be"
        )
    final_len = req.seqlen + 1 if prefill_only else req.prompt_len + req.max_new_tokens
    if not fits_empty_worker(
        prompt_len=req.prompt_len,
        max_new_tokens=final_len - req.prompt_len,
        total_tokens=total_tokens,
        page_size=config.page_size,
    ):
        raise InvalidRequestError(
            f"request {req.rid}: {req.prompt_len} prompt tokens and {final_len - req.prompt_len} "
            f"new ones do not fit this worker's KV memory of {total_tokens} tokens even when it is "
            "empty; shorten the prompt or ask for fewer tokens"
        )


def validate_memory(*, config: SchedulerConfig, memory: MemoryPools, device: torch.device) -> None:
    """Raises `ConfigError` where config, memory and device do not belong together."""
    if memory.allocator.page_size != config.page_size:
        raise ConfigError(
            f"page_size {config.page_size} is not the pool's {memory.allocator.page_size}"
        )
    if memory.req_to_token.max_context_len < config.context_length:
        raise ConfigError(
            f"rows of {memory.req_to_token.max_context_len} tokens are shorter than the context "
            f"({config.context_length})"
        )
    if memory.req_to_token.device.type != device.type:
        raise ConfigError(f"rows are on {memory.req_to_token.device}, the model on {device}")
