"""The KV cache as pages: one page is one contiguous block, for all layers.

Page-major, because a page is what travels: 8 MiB in one piece for 64 tokens of an 8B Llama, where
the usual pool per layer would scatter it over 64 KiB blocks (design.md section 4). Attention reads
one layer through a strided view.
"""

import contextlib
import math
import mmap

import torch

_BYTES = torch.uint8
"""float8 is stored and gathered as bytes: torch moves those on every device."""


class PageMajorKVPool:
    """Keys and values of `num_pages` pages.

    `data` is [num_pages + 1, layers, 2, page_size, kv_heads, head_dim]; index 0 of the third
    dimension holds keys, index 1 values. The last page, index `num_pages`, is the padding page:
    captured graphs write the KV of unused rows there. It is in nobody's count.

    A token's slot is `page * page_size + offset`.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is what is stored. Where that is float8_e4m3fn, `compute_dtype` is what the model
        computes in: what is written is rounded (to the nearest, at most 448), what is read is
        converted back. It must be left out, or the same, otherwise.
        """
        if compute_dtype not in (None, dtype) and dtype is not torch.float8_e4m3fn:
            raise ValueError(f"KV in {dtype} cannot serve a model that computes in {compute_dtype}")
        self.compute_dtype = compute_dtype or dtype
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        # Zeros, not empty: attention masks what lies beyond a sequence's end, but a stray NaN
        # survives a mask (0 * NaN).
        shape = (num_pages + 1, num_layers, 2, page_size, num_kv_heads, head_dim)
        if device.type == "cpu":
            self.data = zeros_when_touched(shape, dtype)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        moved = self.data.view(_BYTES) if self.is_fp8 else self.data
        self._rows = moved.view(-1, num_kv_heads * head_dim)
        self._blocks = moved.view(-1, page_size * num_kv_heads * head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def is_fp8(self) -> bool:
        return self.data.dtype is torch.float8_e4m3fn

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers, keys and values."""
        return self.data[0].numel() * self.data.element_size()

    def as_bytes(self) -> torch.Tensor:
        """uint8 view [num_pages, page_bytes] of the same memory, padding page left out."""
        flat = self.data[: self.num_pages].view(self.num_pages, -1)
        return flat.view(torch.uint8)

    def layer(self, index: int) -> torch.Tensor:
        """Strided view [num_pages + 1, 2, page_size, kv_heads, head_dim] of one layer."""
        return self.data[:, index]

    def write(self, layer: int, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores the keys and values, each [t, kv_heads, head_dim], of slots `loc` [t] int64."""
        self.write_rows(layer, self.rows(loc), k, v)

    def rows(self, loc: torch.Tensor) -> torch.Tensor:
        """Row numbers of slots `loc` [t] for `write_rows`: the same in all layers, so that a step
        computes them once."""
        page = torch.div(loc, self.page_size, rounding_mode="floor")
        return loc + page * ((2 * self.num_layers - 1) * self.page_size)

    def write_rows(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """`write` with `rows(loc)` computed before."""
        width = self.num_kv_heads * self.head_dim
        first = 2 * layer * self.page_size
        if self.is_fp8:
            k, v = to_fp8(k).view(_BYTES), to_fp8(v).view(_BYTES)
        self._rows[first:].index_copy_(0, rows, k.reshape(-1, width))
        self._rows[first + self.page_size :].index_copy_(0, rows, v.reshape(-1, width))

    def block_indices(self, pages: torch.Tensor) -> torch.Tensor:
        """Index [2, *pages.shape] of the key and value blocks of `pages` for `read_blocks`: the
        same in all layers."""
        keys = pages * (2 * self.num_layers)
        return torch.stack((keys, keys + 1))

    def read_blocks(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values [n, p * page_size, kv_heads, head_dim] of one layer, for
        `blocks` = block_indices(pages) with pages [n, p], in `compute_dtype`."""
        count = blocks.shape[1]
        gathered = self._blocks[2 * layer :].index_select(0, blocks.view(-1))
        if self.is_fp8:
            gathered = gathered.view(torch.float8_e4m3fn).to(self.compute_dtype)
        k, v = gathered.view(2, count, -1, self.num_kv_heads, self.head_dim)
        return k, v


def zeros_when_touched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As torch.zeros on a CPU, which writes all of it at once: half a second of every start, and
    half a GiB, for 65,536 tokens of the embedded model, of which most are never used."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=_BYTES).view(dtype).view(shape)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Nearest float8_e4m3fn, the largest where that is exceeded: a plain conversion gives NaN
    there."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return values.clamp(-largest, largest).to(torch.float8_e4m3fn)
