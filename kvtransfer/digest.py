"""Seals: a position-weighted sum of a page's valid words, modulo 2^64.

Why this and not a CRC: it is a plain reduction, so it runs at the speed of memory on a GPU, and on
a CPU in vectors, with three products of 32 bits a word (cpu_digest.c; CRC32 in Python's libraries
makes about 2 GB/s a core and is serial); and it is linear, so sums over ranges (layer, KV head,
tokens) add up to the whole page's, whatever order and split the two sides compute them in.

The word at (row, offset), where a row is one layer's keys or values, has the weight
`row_weight[row] * word_weight[offset]`, both odd and drawn from an integer mix. An odd weight is
invertible modulo 2^64, so a changed word always changes the sum; two changes cancel only if their
differences happen to fit the weights, about once in 2^32 or rarer. It guards against faults, not
against a forger: peers are authenticated elsewhere.
"""

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.cpu_digest import CpuWeights, cpu_digest
from kvtransfer.device_digest import DeviceDigests, digester
from kvtransfer.layout import WORD_BYTES, PageLayout

RANGES = 1
"""Digests a page: one over all layers and heads. Finer ranges are folded from `digest_parts`."""

SEAL_BYTES = 8 * RANGES

_ROW_STREAM = 0x9E3779B97F4A7C15
_WORD_STREAM = 0xD1B54A32D192ED03


def _odd_mix(count: int, stream: int) -> npt.NDArray[np.int64]:
    """`count` odd 64-bit weights: the splitmix64 finaliser over a counter (Steele et al. 2014)."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(stream)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x | np.uint64(1)).view(np.int64)


@lru_cache(maxsize=8)
def _cpu_weights(layout: PageLayout) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(row weights [rows], word weights [words of a row])."""
    return (
        _odd_mix(layout.rows, _ROW_STREAM),
        _odd_mix(layout.row_bytes // WORD_BYTES, _WORD_STREAM),
    )


@lru_cache(maxsize=8)
def _compiled_weights(layout: PageLayout) -> CpuWeights:
    return CpuWeights(*_cpu_weights(layout))


@lru_cache(maxsize=8)
def device_weights(layout: PageLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows, words = _cpu_weights(layout)
    return torch.from_numpy(rows).to(device), torch.from_numpy(words).to(device)


def digest_parts(page: torch.Tensor, valid_tokens: int, layout: PageLayout) -> torch.Tensor:
    """Weighted sums of one page ([page_bytes] uint8) by range: [layers, 2, kv_heads] int64.

    Their sum, modulo 2^64, is the page's digest.
    """
    rows, words = device_weights(layout, page.device)
    head_words = layout.head_dim * layout.itemsize // WORD_BYTES
    shape = (layout.page_size, layout.kv_heads, head_words)
    data = page.view(torch.int32).view(layout.layers, 2, *shape)[:, :, :valid_tokens]
    products = data.to(torch.int64) * words.view(shape)[:valid_tokens]
    return products.sum(dim=(2, 4)) * rows.view(layout.layers, 2, 1)


def digest_pages(
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> torch.Tensor:
    """Digests of `pages` of `pool` ([count, page_bytes] uint8): [len(pages), RANGES] int64, on the
    host.

    On CUDA it works on a stream of its own and waits for nothing else, so that a step which runs
    at the same time delays neither; whoever wrote the pages must have waited for that. Raises
    ValueError for a page or a token count out of range.
    """
    _check(pool, pages, valid_tokens, layout)
    if pool.device.type == "cpu":
        compiled = _compiled(pool, None, _table(pages, pages, valid_tokens), layout)
        return compiled if compiled is not None else _numpy(pool, pages, valid_tokens, layout)
    return as_tensor(start_digests(pool, pages, valid_tokens, layout).wait())


def start_digests(
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
    *,
    stream: torch.cuda.Stream | None = None,
    passed: torch.cuda.Event | None = None,
) -> DeviceDigests:
    """As `digest_pages` for a pool on CUDA, without waiting; behind what `stream` does, or when the
    device has passed the event, if one is given."""
    _check(pool, pages, valid_tokens, layout)
    return digester(pool.device).launch(
        "copy_and_digest",
        source=words_of(pool),
        target=words_of(pool),
        table=_table(pages, pages, valid_tokens),
        weights=device_weights(layout, pool.device),
        numbers=_numbers(layout, copy=False),
        stream=stream,
        passed=passed,
    )


def queue_digests(
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> torch.Tensor:
    """As `digest_pages` for a pool on CUDA, behind what the current stream does, and without
    waiting: [len(pages), RANGES] int64 on the pool's device."""
    _check(pool, pages, valid_tokens, layout)
    weights = device_weights(layout, pool.device)
    table = torch.from_numpy(_table(pages, pages, valid_tokens)).pin_memory()
    sums = torch.empty((len(pages), layout.rows), dtype=torch.int64, device=pool.device)
    kernels: Any = importlib.import_module("kvtransfer.digest_kernels")
    kernels.copy_and_digest[len(pages), layout.rows](
        *(words_of(pool), words_of(pool), table.to(pool.device, non_blocking=True), sums),
        *weights,
        *_numbers(layout, copy=False),
        num_warps=kernels.NUM_WARPS,
    )
    return sums.sum(1).view(len(pages), RANGES)


def copy_and_digest(
    window: torch.Tensor,
    slots: Sequence[int],
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> torch.Tensor:
    """Copies slot -> page, valid tokens only, and digests the very bytes now in the pool.

    `window` is [slots, page_bytes] uint8, on the pool's device or on the host; a write that hits
    the slot during or after the copy can change the digest, never what was digested. Returns
    [len(pages), RANGES] int64 on the host, once the copy is done; streams as for `digest_pages`.
    """
    if len(slots) != len(pages):
        raise ValueError(f"{len(slots)} slots for {len(pages)} pages")
    _check(window, slots, valid_tokens, layout)
    _check(pool, pages, valid_tokens, layout)
    if pool.device.type == "cpu":
        compiled = _compiled(window, pool, _table(slots, pages, valid_tokens), layout)
        if compiled is not None:
            return compiled
        _copy(window, slots, pool, pages, valid_tokens, layout)
        return digest_pages(pool, pages, valid_tokens, layout)
    if window.device == pool.device:
        launched = start_copy_and_digest(window, slots, pool, pages, valid_tokens, layout)
        return as_tensor(launched.wait())
    with torch.cuda.stream(digester(pool.device).stream):
        _copy(window, slots, pool, pages, valid_tokens, layout)
    return digest_pages(pool, pages, valid_tokens, layout)


def start_copy_and_digest(
    window: torch.Tensor,
    slots: Sequence[int],
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> DeviceDigests:
    """As `copy_and_digest` for a pool and a window of one GPU, without waiting."""
    if len(slots) != len(pages):
        raise ValueError(f"{len(slots)} slots for {len(pages)} pages")
    _check(window, slots, valid_tokens, layout)
    _check(pool, pages, valid_tokens, layout)
    return digester(pool.device).launch(
        "copy_and_digest",
        source=words_of(window),
        target=words_of(pool),
        table=_table(slots, pages, valid_tokens),
        weights=device_weights(layout, pool.device),
        numbers=_numbers(layout, copy=True),
    )


def _copy(
    window: torch.Tensor,
    slots: Sequence[int],
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> None:
    for slot, page, valid in zip(slots, pages, valid_tokens, strict=True):
        # bytes beyond the valid tokens are not covered by any seal: they stay outside
        size = valid * layout.token_bytes
        source = window[slot].view(layout.rows, layout.row_bytes)[:, :size]
        target = pool[page].view(layout.rows, layout.row_bytes)[:, :size]
        target.copy_(source, non_blocking=True)


def _table(
    source_pages: Sequence[int], target_pages: Sequence[int], valid_tokens: Sequence[int]
) -> npt.NDArray[np.int64]:
    """A line a page, as the kernel reads it."""
    lines = np.empty((len(source_pages), 3), dtype=np.int64)
    lines[:, 0], lines[:, 1], lines[:, 2] = source_pages, target_pages, valid_tokens
    return lines


def _numbers(layout: PageLayout, *, copy: bool) -> tuple[int, ...]:
    return layout.row_bytes // WORD_BYTES, layout.token_bytes // WORD_BYTES, copy


def words_of(memory: torch.Tensor) -> torch.Tensor:
    """uint8 pages or slots as the words that kernels read."""
    return memory.view(torch.int32)


def as_tensor(digests: npt.NDArray[np.int64]) -> torch.Tensor:
    """[n] as [n, RANGES] int64 on the host."""
    return torch.from_numpy(digests).view(-1, RANGES)


def _check(
    pool: torch.Tensor, pages: Sequence[int], valid_tokens: Sequence[int], layout: PageLayout
) -> None:
    if len(pages) != len(valid_tokens):
        raise ValueError(f"{len(pages)} pages with {len(valid_tokens)} token counts")
    if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != layout.page_bytes:
        raise ValueError(
            f"expected [count, {layout.page_bytes}] uint8, got {tuple(pool.shape)} {pool.dtype}"
        )
    if not pages:
        return
    if min(pages) < 0 or max(pages) >= pool.shape[0]:
        raise ValueError(f"pages {min(pages)} to {max(pages)} outside 0..{pool.shape[0] - 1}")
    if min(valid_tokens) < 1 or max(valid_tokens) > layout.page_size:
        found = sorted(set(valid_tokens))
        raise ValueError(f"{found[0]} to {found[-1]} valid tokens outside 1..{layout.page_size}")


def _compiled(
    source: torch.Tensor,
    target: torch.Tensor | None,
    table: npt.NDArray[np.int64],
    layout: PageLayout,
) -> torch.Tensor | None:
    """Digests of what lies on the host, copied where there is a target; None: not compiled, and
    nothing was done."""
    digest = cpu_digest()
    memories = (source,) if target is None else (source, target)
    if digest is None or not all(memory.is_contiguous() for memory in memories):
        return None
    table[:, 2] *= layout.token_bytes // WORD_BYTES
    found = digest(
        source.data_ptr(),
        None if target is None else target.data_ptr(),
        table=table,
        weights=_compiled_weights(layout),
    )
    return as_tensor(found)


def _numpy(
    pool: torch.Tensor, pages: Sequence[int], valid_tokens: Sequence[int], layout: PageLayout
) -> torch.Tensor:
    memory = pool.numpy()
    values = [_cpu_digest(memory[p], v, layout) for p, v in zip(pages, valid_tokens, strict=True)]
    return torch.tensor(values, dtype=torch.int64).view(len(pages), RANGES)


def _cpu_digest(page: npt.NDArray[np.uint8], valid: int, layout: PageLayout) -> int:
    # einsum widens in small buffers of its own: no temporary, twice as fast as torch's ops
    rows, words = _cpu_weights(layout)
    count = valid * layout.token_bytes // WORD_BYTES
    data = page.view(np.int32).reshape(layout.rows, -1)[:, :count]
    sums = np.einsum("rw,w->r", data, words[:count])
    return int((sums * rows).sum())


def seals_of(digests: torch.Tensor) -> list[bytes]:
    """Digests ([n, ranges] int64, any device) as seals; waits for the device once."""
    data = digests.cpu().numpy().astype("<i8", copy=False).tobytes()
    size = len(data) // max(1, len(digests))
    return [data[start : start + size] for start in range(0, len(data), max(1, size))]


def seal_to_int(seal: bytes) -> int:
    """A one-range seal as an unsigned number, for logs."""
    return int.from_bytes(seal, "little")


def seal_from_int(value: int) -> bytes:
    """The seal whose number is `value` modulo 2^64."""
    return (value % 2**64).to_bytes(8, "little")
