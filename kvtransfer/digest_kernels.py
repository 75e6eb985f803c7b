"""The seal's Triton kernel. Imported at its first use, as machines without a GPU have no Triton."""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["count"]  # else it is compiled anew where that is 1 or a multiple of 16
)
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


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["table_width"]
)
def land_and_digest_kernel(  # type: ignore[no-untyped-def]
    window,
    pool,
    table,
    parts,
    row_weights,
    word_weights,
    table_width,
    rows,
    slot_words,
    offset_words,
    row_words,
    token_words,
    own_row_words,
    own_page_size,
    own_token_words,
    first_word,
    end_word,
    own_first_word,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One row of one page a program, into pages of another size. A line of `table` is: slot, valid
    tokens, position of the first one, how many of them stay unwritten, then the pool's pages from
    that position's on. Of each token, words `first_word .. end_word - 1` are ours, from
    `own_first_word` on."""
    item = tl.program_id(0)
    row = tl.program_id(1)
    line = table + item * table_width
    words = tl.load(line + 1) * token_words
    first_token = tl.load(line + 2)
    unwritten = tl.load(line + 3)
    first_page = first_token // own_page_size
    read = window + tl.load(line) * slot_words + offset_words + row * row_words
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, row_words, BLOCK):
        word = first + lane
        inside = word < words
        data = tl.load(read + word, mask=inside, other=0)
        weight = tl.load(word_weights + word, mask=inside, other=0)
        total += data.to(tl.int64) * weight
        token = word // token_words
        position = first_token + token
        index = position // own_page_size
        place = word - token * token_words
        wanted = inside & (token >= unwritten) & (place >= first_word) & (place < end_word)
        page = tl.load(line + 4 + index - first_page, mask=wanted, other=0)
        place += (position - index * own_page_size) * own_token_words + own_first_word - first_word
        tl.store(pool + (page * rows + row) * own_row_words + place, data, mask=wanted)
    part = tl.sum(total, axis=0) * tl.load(row_weights + row)
    tl.store(parts + item.to(tl.int64) * rows + row, part)
