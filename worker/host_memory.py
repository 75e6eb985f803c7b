"""Host memory for KV pages, as a worker's settings ask for it."""

from collections.abc import Sequence

import torch

from engine.errors import ConfigError
from engine.memory.kv_pool import PageMajorKVPool
from engine.memory.page_copier import PageCopier, make_page_copier
from kvtransfer.digest import digest_pages, queue_digests
from kvtransfer.layout import PageLayout
from worker.config import WorkerConfig


def host_cache_copier(
    config: WorkerConfig, pool: PageMajorKVPool, layout: PageLayout
) -> PageCopier | None:
    """For evicted prefixes; None where none is asked for. Raises ConfigError."""
    if config.host_cache_tokens and not config.enable_radix_cache:
        raise ConfigError(
            "host_cache_tokens keeps what the radix cache evicts, but enable_radix_cache is off: "
            "turn it on, or set host_cache_tokens to 0"
        )
    return _copier("host_cache_tokens", config.host_cache_tokens, pool, layout)


def retract_copier(
    config: WorkerConfig, pool: PageMajorKVPool, layout: PageLayout
) -> PageCopier | None:
    """For retracted requests; None where none is asked for. Raises ConfigError."""
    return _copier("retract_host_tokens", config.retract_host_tokens, pool, layout)


def _copier(
    setting: str, num_tokens: int, pool: PageMajorKVPool, layout: PageLayout
) -> PageCopier | None:
    if num_tokens < 0:
        raise ConfigError(f"{setting} must not be negative, not {num_tokens}")
    if num_tokens == 0:
        return None

    def digest(pages: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        # The seal of a whole page, so that what comes back can be handed over under it.
        whole = [layout.page_size] * len(numbers)
        digest = queue_digests if pages.is_cuda else digest_pages
        return digest(pages, numbers, whole, layout)

    return make_page_copier(pool, layout.pages_of(num_tokens), digest)
