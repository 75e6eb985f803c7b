"""Triton kernels. Imported at their first use, as machines without a GPU have no Triton."""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator]
def rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    table,
    kv_rows,
    pool,
    first_row,
    page_size,
    num_heads,
    num_kv_heads,
    FP8: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    all_heads = num_heads + 2 * num_kv_heads
    source = qkv + (token * all_heads + head) * (2 * HALF) + lane
    exists = head < all_heads
    low = tl.load(source, mask=exists, other=0.0)
    high = tl.load(source + HALF, mask=exists, other=0.0)

    angle = table + tl.load(positions + token) * (2 * HALF) + lane
    cos, sin = tl.load(angle), tl.load(angle + HALF)
    low32, high32 = low.to(tl.float32), high.to(tl.float32)
    turns = head < num_heads + num_kv_heads
    low = tl.where(turns, (low32 * cos - high32 * sin).to(low.dtype), low)
    high = tl.where(turns, (high32 * cos + low32 * sin).to(high.dtype), high)

    is_query = head < num_heads
    tl.store(source, low, mask=is_query)
    tl.store(source + HALF, high, mask=is_query)

    is_value = head >= num_heads + num_kv_heads
    row = tl.load(kv_rows + token) + first_row + tl.where(is_value, page_size, 0)
    kv_head = head - num_heads - tl.where(is_value, num_kv_heads, 0)
    target = pool + (row * num_kv_heads + kv_head) * (2 * HALF) + lane
    kept = exists & (head >= num_heads)
    if FP8:
        low = tl.clamp(low.to(tl.float32), -448.0, 448.0).to(tl.float8e4nv)
        high = tl.clamp(high.to(tl.float32), -448.0, 448.0).to(tl.float8e4nv)
    tl.store(target, low, mask=kept)
    tl.store(target + HALF, high, mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def row_times_matrix_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    exists = row < rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    start = weight + row.to(tl.int64)[:, None] * columns + lane[None, :]
    for first in range(0, columns, COLUMNS):
        inside = lane < columns - first
        values = tl.load(x + first + lane, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(
            start + first, mask=exists[:, None] & inside[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        total += block.to(tl.float32) * values[None, :]
    product = tl.sum(total, axis=1)
    if HAS_BIAS:
        product += tl.load(bias + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row, product.to(out.dtype.element_ty), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    columns,
    eps,
    WIDTH: tl.constexpr,  # noqa: N803
):
    lane = tl.arange(0, WIDTH)
    inside = lane < columns
    at = tl.program_id(0).to(tl.int64) * columns + lane
    added = tl.load(x + at, mask=inside, other=0.0)
    total = added.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0)
    tl.store(residual + at, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / columns + eps)
    scaled = total * scale * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, scaled.to(added.dtype), mask=inside)
