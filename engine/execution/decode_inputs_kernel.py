"""The Triton kernel of `decode_inputs`, imported at its first use: machines without a GPU have no
Triton."""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

# What differs from step to step and would be another kernel: a number that is 1 or a multiple of
# 16, a tensor that begins in the middle of another one.
_OF_A_BATCH = ("req_pool_indices", "seq_lens", "input_ids", "positions", "out_cache_loc")


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["table_width", "count", "padding_page", "padding_slot"],
    do_not_specialize_on_alignment=["req_to_token", *_OF_A_BATCH],
)
def decode_inputs_kernel(  # type: ignore[no-untyped-def]
    req_to_token,
    table_width,
    req_pool_indices,
    seq_lens,
    input_ids,
    positions,
    out_cache_loc,
    kept_input_ids,
    kept_positions,
    kept_out_cache_loc,
    indices,
    count,
    padding_page,
    padding_slot,
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    before = tl.load(seq_lens + lane, mask=(lane < row) & (lane < count), other=0)
    first = indices + tl.sum((before + PAGE_SIZE - 1) // PAGE_SIZE, axis=0)
    if row < count:
        own = ((tl.load(seq_lens + row) + PAGE_SIZE - 1) // PAGE_SIZE).to(tl.int32)
        source = req_to_token + tl.load(req_pool_indices + row) * table_width
        for start in range(0, own, 256):
            page = start + tl.arange(0, 256)
            slot = tl.load(source + page * PAGE_SIZE, mask=page < own, other=0)
            tl.store(first + page, slot // PAGE_SIZE, mask=page < own)
        tl.store(kept_input_ids + row, tl.load(input_ids + row))
        tl.store(kept_positions + row, tl.load(positions + row))
        tl.store(kept_out_cache_loc + row, tl.load(out_cache_loc + row))
    else:
        tl.store(first + (row - count), padding_page)
        tl.store(kept_input_ids + row, 0)
        tl.store(kept_positions + row, 0)
        tl.store(kept_out_cache_loc + row, padding_slot)
