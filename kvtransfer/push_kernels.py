"""The kernel that writes pages into a peer's landing window and digests what it writes. Imported at
its first use, as machines without a GPU have no Triton."""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit(  # type: ignore[untyped-decorator]
    # Else each of them compiles the kernel anew where it is 1 or a multiple of 16.
    do_not_specialize=["count", "first_row", "first_copied", "end_copied"]
)
def push_and_digest_kernel(  # type: ignore[no-untyped-def]
    pool,
    table,
    sums,
    row_weights,
    word_weights,
    count,
    rows,
    first_row,
    first_copied,
    end_copied,
    row_words,
    token_words,
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """CHUNK words of one row (a layer's keys or values) of one page a program. Its valid words are
    read once; they are written to the peer if the row is one of `first_copied .. end_copied - 1`,
    and their weighted sum is added to the page's in `sums` ([count] int64, zeroed).

    `table` is [3, count] int64: page, address of its slot in the peer's memory, valid tokens. The
    address is a multiple of 16, so that a thread moves 16 bytes at a time.
    """
    item = tl.program_id(0)
    row = first_row + tl.program_id(1)
    start = tl.program_id(2) * CHUNK
    page = tl.load(table + item)
    address = tl.load(table + count + item)
    words = tl.load(table + 2 * count + item) * token_words
    read = pool + (page * rows + row) * row_words
    write = address.to(tl.pointer_type(tl.int32)) + row * row_words
    copied = (row >= first_copied) & (row < end_copied)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(start, min(start + CHUNK, row_words), BLOCK):
        place = first + lane
        inside = place < words
        data = tl.load(read + place, mask=inside, other=0)
        tl.store(
            tl.multiple_of(write + place, 16), data, mask=inside & copied, cache_modifier=".cs"
        )
        weight = tl.load(word_weights + place, mask=inside, other=0)
        total += data.to(tl.int64) * weight
    part = tl.sum(total, axis=0) * tl.load(row_weights + row)
    tl.atomic_add(sums + item, part, sem="relaxed")
