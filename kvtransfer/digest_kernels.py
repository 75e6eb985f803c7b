"""The seal's Triton kernel. Imported at its first use, as machines without a GPU have no Triton."""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator]
def copy_and_digest_kernel(  # type: ignore[no-untyped-def]
    source,
    target,
    table,
    parts,
    row_weights,
    word_weights,
    count,
    rows,
    row_words,
    token_words,
    COPY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One row (a layer's keys or values) of one page a program: its valid words, copied if COPY,
    and their weighted sum. `table` is [3, count]: source pages, target pages, valid tokens."""
    item = tl.program_id(0)
    row = tl.program_id(1)
    from_page = tl.load(table + item)
    to_page = tl.load(table + count + item)
    words = tl.load(table + 2 * count + item) * token_words
    read = source + (from_page * rows + row) * row_words
    write = target + (to_page * rows + row) * row_words
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, row_words, BLOCK):
        inside = first + lane < words
        data = tl.load(read + first + lane, mask=inside, other=0)
        if COPY:
            tl.store(write + first + lane, data, mask=inside)
        weight = tl.load(word_weights + first + lane, mask=inside, other=0)
        total += data.to(tl.int64) * weight
    part = tl.sum(total, axis=0) * tl.load(row_weights + row)
    tl.store(parts + item.to(tl.int64) * rows + row, part)
