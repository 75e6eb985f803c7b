"""Seals: a position-weighted sum of a page's valid words, modulo 2^64.

Why this and not a CRC: it is a plain reduction, so it runs at the speed of memory on a GPU and
with one multiply a word on a CPU (CRC32 in Python's libraries makes about 2 GB/s a core and is
serial); and it is linear, so sums over ranges (layer, KV head, tokens) add up to the whole page's,
whatever order and split the two sides compute them in.

The word at (row, offset), where a row is one layer's keys or values, has the weight
`row_weight[row] * word_weight[offset]`, both odd and drawn from an integer mix. An odd weight is
invertible modulo 2^64, so a changed word always changes the sum; two changes cancel only if their
differences happen to fit the weights, about once in 2^32 or rarer. It guards against faults, not
against a forger: peers are authenticated elsewhere.
"""

import importlib
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvtransfer.layout import WORD_BYTES, PageLayout

RANGES = 1
"""Digests a page: one over all layers and heads. Finer ranges are folded from `digest_parts`."""

SEAL_BYTES = 8 * RANGES

_CUDA_BATCH_BYTES = 64 << 20
"""Bytes of pages widened at once on a GPU; bounds the temporary to twice as much."""

_KERNEL_WORDS = 2048
"""Words that a program of the kernel takes at a time."""

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
        memory = pool.numpy()
        values = [
            _cpu_digest(memory[p], v, layout) for p, v in zip(pages, valid_tokens, strict=True)
        ]
        return torch.tensor(values, dtype=torch.int64).view(len(pages), RANGES)
    with own_stream(pool.device):
        return folded(queue_parts(pool, pages, valid_tokens, layout).cpu())


def queue_parts(
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> torch.Tensor:
    """As `queue_digests`, but [len(pages), parts of each] int64: the host can add them up
    (`folded`) for less than another kernel costs."""
    _check(pool, pages, valid_tokens, layout)
    if triton_installed():
        return _launch(pool, pages, pool, pages, valid_tokens, layout, copy=False)
    return _device_digest(pool, pages, valid_tokens, layout)


def folded(parts: torch.Tensor) -> torch.Tensor:
    """Parts of digests, [n, parts] int64, as digests, [n, RANGES]."""
    return parts.sum(1).view(len(parts), RANGES)


def queue_digests(
    pool: torch.Tensor,
    pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
) -> torch.Tensor:
    """As `digest_pages` for a pool on CUDA, behind what the current stream does, and without
    waiting: [len(pages), RANGES] int64 on the pool's device."""
    return folded(queue_parts(pool, pages, valid_tokens, layout))


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
        _copy(window, slots, pool, pages, valid_tokens, layout)
        return digest_pages(pool, pages, valid_tokens, layout)
    with own_stream(pool.device):
        if window.device == pool.device and triton_installed():
            parts = _launch(window, slots, pool, pages, valid_tokens, layout, copy=True)
            return folded(parts.cpu())
        _copy(window, slots, pool, pages, valid_tokens, layout)
        return digest_pages(pool, pages, valid_tokens, layout)


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


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def own_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream for each thread and device, ahead of the steps' stream where both have work."""
    streams: dict[torch.device, torch.cuda.Stream]
    streams = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(streams[device]):
        yield streams[device]


_streams = threading.local()


def _launch(
    source: torch.Tensor,
    source_pages: Sequence[int],
    target: torch.Tensor,
    target_pages: Sequence[int],
    valid_tokens: Sequence[int],
    layout: PageLayout,
    *,
    copy: bool,
) -> torch.Tensor:
    """One kernel over all rows of all pages; each byte is read once. [pages, rows] int64."""
    count = len(source_pages)
    row_weights, word_weights = device_weights(layout, target.device)
    numbers = np.array([source_pages, target_pages, valid_tokens], dtype=np.int64)
    table = torch.from_numpy(numbers).pin_memory()
    parts = torch.empty((count, layout.rows), dtype=torch.int64, device=target.device)
    kernels: Any = importlib.import_module("kvtransfer.digest_kernels")
    kernels.copy_and_digest_kernel[(count, layout.rows)](
        source.view(torch.int32),
        target.view(torch.int32),
        table.to(target.device, non_blocking=True),
        parts,
        row_weights,
        word_weights,
        count,
        layout.rows,
        layout.row_bytes // WORD_BYTES,
        layout.token_bytes // WORD_BYTES,
        COPY=copy,
        BLOCK=_KERNEL_WORDS,
        num_warps=8,
    )
    return parts


def _check(
    pool: torch.Tensor, pages: Sequence[int], valid_tokens: Sequence[int], layout: PageLayout
) -> None:
    if len(pages) != len(valid_tokens):
        raise ValueError(f"{len(pages)} pages with {len(valid_tokens)} token counts")
    if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != layout.page_bytes:
        raise ValueError(
            f"expected [count, {layout.page_bytes}] uint8, got {tuple(pool.shape)} {pool.dtype}"
        )
    for page, valid in zip(pages, valid_tokens, strict=True):
        if not 0 <= page < pool.shape[0]:
            raise ValueError(f"page {page} outside 0..{pool.shape[0] - 1}")
        if not 1 <= valid <= layout.page_size:
            raise ValueError(f"page {page}: {valid} valid tokens outside 1..{layout.page_size}")


def _cpu_digest(page: npt.NDArray[np.uint8], valid: int, layout: PageLayout) -> int:
    # einsum widens in small buffers of its own: no temporary, twice as fast as torch's ops
    rows, words = _cpu_weights(layout)
    count = valid * layout.token_bytes // WORD_BYTES
    data = page.view(np.int32).reshape(layout.rows, -1)[:, :count]
    sums = np.einsum("rw,w->r", data, words[:count])
    return int((sums * rows).sum())


def _device_digest(
    pool: torch.Tensor, pages: Sequence[int], valid_tokens: Sequence[int], layout: PageLayout
) -> torch.Tensor:
    rows, words = device_weights(layout, pool.device)
    out = torch.empty(len(pages), dtype=torch.int64, device=pool.device)
    batch = max(1, _CUDA_BATCH_BYTES // layout.page_bytes)
    row_words = pool.view(torch.int32).view(pool.shape[0], layout.rows, -1)
    by_count: dict[int, list[int]] = {}
    for index, valid in enumerate(valid_tokens):
        by_count.setdefault(valid, []).append(index)
    for valid, indices in by_count.items():
        count = valid * layout.token_bytes // WORD_BYTES
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            where = _on_device([pages[i] for i in chosen], pool.device)
            data = row_words[:, :, :count].index_select(0, where)
            sums = (data * words[:count]).sum(-1)
            out[_on_device(chosen, pool.device)] = (sums * rows).sum(-1)
    return out.view(len(pages), RANGES)


def _on_device(values: list[int], device: torch.device) -> torch.Tensor:
    """Without waiting for the device: an asynchronous copy comes out of pinned memory only."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def seals_of(digests: torch.Tensor) -> list[bytes]:
    """Digests ([n, ranges] int64, any device) as seals; waits for the device once."""
    data: npt.NDArray[np.int64] = digests.cpu().numpy().astype("<i8", copy=False)
    return [row.tobytes() for row in data]


def seal_to_int(seal: bytes) -> int:
    """A one-range seal as an unsigned number, for logs."""
    return int.from_bytes(seal, "little")


def seal_from_int(value: int) -> bytes:
    """The seal whose number is `value` modulo 2^64."""
    return (value % 2**64).to_bytes(8, "little")
