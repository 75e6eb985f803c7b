"""Triton kernels. Imported at their first use, as machines without a GPU have no Triton.

Where PDL is set (see `dependent_launch`), a kernel is resident while the one before it still runs:
it lets its own successor come as soon as it has begun itself, and waits for its predecessor before
it reads what that wrote or writes anything.
"""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from triton.language.extra import cuda  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def fetch_ahead(addresses):  # type: ignore[no-untyped-def]
    """Asks for the cache lines (64 elements of 16 bits) at `addresses` to be in L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
    PDL: tl.constexpr,  # noqa: N803
):
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
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

    tl.store(source, low, mask=turns)
    tl.store(source + HALF, high, mask=turns)

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
    PDL: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    exists = row < rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    own_rows = weight + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * columns
    start = own_rows + lane[None, :]
    if PDL:
        cuda.gdc_launch_dependents()
        fetch_ahead(own_rows + tl.minimum(tl.arange(0, COLUMNS // 64) * 64, columns - 1)[None, :])
        cuda.gdc_wait()
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
    ADDS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PDL: tl.constexpr,  # noqa: N803
):
    lane = tl.arange(0, WIDTH)
    inside = lane < columns
    gain = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * columns + lane
    total = tl.load(residual + at, mask=inside, other=0.0)
    if ADDS:
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual + at, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / columns + eps)
    tl.store(x + at, (total * scale * gain).to(x.dtype.element_ty), mask=inside)


# Not specialised for a number of rows that is 1 or a multiple of 16: those would be other kernels.
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    partial,
    arrivals,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    GATED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    PDL: tl.constexpr,  # noqa: N803
):
    # The weights are the tall operand of the matrix instruction, which asks for 64 rows of it and
    # is content with 8 of the other. GATED: the weight's second half is `up`, its first `gate`.
    # SPLITS programs share a tile, each for a part of the depth; the last to arrive adds them up.
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    part = depth // SPLITS
    gate_rows = weight + n.to(tl.int64)[:, None] * depth + split * part
    up_rows = gate_rows + columns.to(tl.int64) * depth
    if PDL:
        cuda.gdc_launch_dependents()
        if AHEAD > 0:
            lines = tl.arange(0, AHEAD // 64)[None, :] * 64
            fetch_ahead(gate_rows + lines)
            if GATED:
                fetch_ahead(up_rows + lines)
        cuda.gdc_wait()
    k = tl.arange(0, DEPTH)
    m = tl.arange(0, ROWS)
    exists = m < rows
    x_at = x + split * part + m[None, :] * depth + k[:, None]
    gate_at = gate_rows + k[None, :]
    up_at = up_rows + k[None, :]
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    up = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for _ in range(0, part, DEPTH):
        right = tl.load(x_at, mask=exists[None, :], other=0.0)
        total = tl.dot(tl.load(gate_at), right, total)
        if GATED:
            up = tl.dot(tl.load(up_at), right, up)
            up_at += DEPTH
        x_at += DEPTH
        gate_at += DEPTH
    last = True
    if SPLITS > 1:
        lane = tl.arange(0, COLUMNS)[:, None] * ROWS + m[None, :]
        parts = partial + tile * (SPLITS * COLUMNS * ROWS) + lane
        tl.store(parts + split * (COLUMNS * ROWS), total)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + tile, 1) == SPLITS - 1
        if last:
            total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                # Not by way of L1, which knows nothing of what other processors wrote.
                total += tl.load(parts + other * (COLUMNS * ROWS), cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    if last:
        if HAS_BIAS:
            total += tl.load(bias + n).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(bias + columns + n).to(tl.float32)[:, None]
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * up
        out_at = out + m.to(tl.int64)[None, :] * columns + n[:, None]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=exists[None, :])
