"""Host memory for KV pages, as a worker's settings ask for it."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.memory.kv_pool import PageMajorKVPool
from engine.memory.page_copier import PageCopier, make_page_copier
from kvtransfer.digest import digest_pages, queue_digests
from kvtransfer.layout import PageLayout
from worker.config import WorkerConfig

logger = logging.getLogger(__name__)

MAX_RETRACT_SHARE = 4.0
"""More than the pool a few times over is never retracted at once."""

OF_FREE_MEMORY = 8
"""A default must leave the host to others: retracted KV takes one part in this many at most."""


def host_cache_copier(
    config: WorkerConfig, pool: PageMajorKVPool, layout: PageLayout
) -> PageCopier | None:
    """For evicted prefixes; None where none is asked for. Raises ConfigError."""
    if config.host_cache_tokens and not config.enable_radix_cache:
        raise ConfigError(
            "host_cache_tokens keeps what the radix cache evicts, but enable_radix_cache is off: "
            "turn it on, or set host_cache_tokens to 0"
        )
    if config.host_cache_tokens < 0:
        raise ConfigError(f"host_cache_tokens must not be negative, not {config.host_cache_tokens}")
    if config.host_cache_tokens == 0:
        return None
    return _copier(layout.pages_of(config.host_cache_tokens), pool, layout)


def retract_copier(
    config: WorkerConfig, pool: PageMajorKVPool, layout: PageLayout
) -> PageCopier | None:
    """For retracted requests; None where none is asked for, the host has no room for a page, or
    several ranks hold a part of each page: they compute it again. Raises ConfigError."""
    if not 0 <= config.retract_host_share <= MAX_RETRACT_SHARE:
        raise ConfigError(
            f"retract_host_share must be from 0 to {MAX_RETRACT_SHARE}, not "
            f"{config.retract_host_share}"
        )
    if config.tensor_parallel_size > 1:
        return None
    wanted = int(pool.num_pages * config.retract_host_share)
    pages = min(wanted, free_host_memory_bytes() // OF_FREE_MEMORY // layout.page_bytes)
    if pages < wanted:
        logger.warning(
            "the host has room for the KV of %d retracted tokens, not for %d "
            "(--retract-host-share %g): others are computed again",
            pages * layout.page_size,
            wanted * layout.page_size,
            config.retract_host_share,
        )
    return _copier(pages, pool, layout) if pages else None


def free_host_memory_bytes() -> int:
    """What this process may still take: of the machine, or of its container where that is less."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no second version of control groups, or no limit in it
        return free


def _copier(num_pages: int, pool: PageMajorKVPool, layout: PageLayout) -> PageCopier:

    def digest(pages: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        # The seal of a whole page, so that what comes back can be handed over under it.
        whole = [layout.page_size] * len(numbers)
        digest = queue_digests if pages.is_cuda else digest_pages
        return digest(pages, numbers, whole, layout)

    return make_page_copier(pool, num_pages, digest)
