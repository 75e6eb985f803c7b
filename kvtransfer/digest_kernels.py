"""The seal's Triton kernels. Imported at their first use, as machines without a GPU have no Triton.

Each program takes one row (a layer's keys or values) of one page, which a line of `table`
describes, and leaves the weighted sum of its valid words in `sums` ([pages, rows] int64).
"""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

NUM_WARPS = 8

_BLOCK = tl.constexpr(2048)
"""Words that a program takes at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def copy_and_digest(  # type: ignore[no-untyped-def]
    source,
    target,
    table,
    sums,
    row_weights,
    word_weights,
    ROW_WORDS: tl.constexpr,  # noqa: N803
    TOKEN_WORDS: tl.constexpr,  # noqa: N803
    COPY: tl.constexpr,  # noqa: N803
):
    """Valid words, copied if COPY. A line of `table`: source page, target page, valid tokens."""
    item, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    line = table + item * 3
    words = tl.load(line + 2) * TOKEN_WORDS
    read = source + (tl.load(line) * rows + row) * ROW_WORDS
    write = target + (tl.load(line + 1) * rows + row) * ROW_WORDS
    lane = tl.arange(0, _BLOCK)
    total = tl.zeros((_BLOCK,), dtype=tl.int64)
    for first in range(0, ROW_WORDS, _BLOCK):
        inside = first + lane < words
        data = tl.load(read + first + lane, mask=inside, other=0)
        if COPY:
            tl.store(write + first + lane, data, mask=inside)
        weight = tl.load(word_weights + first + lane, mask=inside, other=0)
        total += data.to(tl.int64) * weight
    tl.store(
        sums + item.to(tl.int64) * rows + row, tl.sum(total, axis=0) * tl.load(row_weights + row)
    )


@triton.jit  # type: ignore[untyped-decorator]
def land_and_digest(  # type: ignore[no-untyped-def]
    window,
    pool,
    table,
    sums,
    row_weights,
    word_weights,
    TABLE_WIDTH: tl.constexpr,  # noqa: N803
    SLOT_WORDS: tl.constexpr,  # noqa: N803
    OFFSET_WORDS: tl.constexpr,  # noqa: N803
    ROW_WORDS: tl.constexpr,  # noqa: N803
    TOKEN_WORDS: tl.constexpr,  # noqa: N803
    OWN_ROW_WORDS: tl.constexpr,  # noqa: N803
    OWN_PAGE_SIZE: tl.constexpr,  # noqa: N803
    OWN_TOKEN_WORDS: tl.constexpr,  # noqa: N803
    FIRST_WORD: tl.constexpr,  # noqa: N803
    END_WORD: tl.constexpr,  # noqa: N803
    OWN_FIRST_WORD: tl.constexpr,  # noqa: N803
):
    """Into pages of another size. A line of `table`: slot, valid tokens, position of the first one,
    how many of them stay unwritten, then the pool's pages from that position's on. Of each token,
    words `FIRST_WORD .. END_WORD - 1` are ours, from `OWN_FIRST_WORD` on."""
    item, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    line = table + item * TABLE_WIDTH
    words = tl.load(line + 1) * TOKEN_WORDS
    first_token = tl.load(line + 2)
    unwritten = tl.load(line + 3)
    first_page = first_token // OWN_PAGE_SIZE
    read = window + tl.load(line) * SLOT_WORDS + OFFSET_WORDS + row * ROW_WORDS
    lane = tl.arange(0, _BLOCK)
    total = tl.zeros((_BLOCK,), dtype=tl.int64)
    for first in range(0, ROW_WORDS, _BLOCK):
        word = first + lane
        inside = word < words
        data = tl.load(read + word, mask=inside, other=0)
        weight = tl.load(word_weights + word, mask=inside, other=0)
        total += data.to(tl.int64) * weight
        token = word // TOKEN_WORDS
        position = first_token + token
        index = position // OWN_PAGE_SIZE
        place = word - token * TOKEN_WORDS
        wanted = inside & (token >= unwritten) & (place >= FIRST_WORD) & (place < END_WORD)
        page = tl.load(line + 4 + index - first_page, mask=wanted, other=0)
        place += (position - index * OWN_PAGE_SIZE) * OWN_TOKEN_WORDS + OWN_FIRST_WORD - FIRST_WORD
        tl.store(pool + (page * rows + row) * OWN_ROW_WORDS + place, data, mask=wanted)
    tl.store(
        sums + item.to(tl.int64) * rows + row, tl.sum(total, axis=0) * tl.load(row_weights + row)
    )
