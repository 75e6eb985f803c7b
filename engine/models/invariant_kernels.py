"""Triton kernels whose results for a row depend on that row alone. Imported at their first use.

What makes them so: sums run over their dimension from its start in steps of fixed size, whatever
else is computed beside; nothing is split by how much there is to do; tiles hold at least 64 rows,
so that every size goes through the same matrix instruction. What a tile computes for rows that see
less of a dimension than their neighbours adds exact zeros.
"""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


# Not specialised for one row: that would be another kernel than the one for many.
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def matmul_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    # Tiles that share weights run side by side: GROUP rows of tiles at a time.
    tile = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    first_m = group * GROUP
    height = min(tiles_m - first_m, GROUP)
    tile_m = first_m + tile % (GROUP * tiles_n) % height
    tile_n = tile % (GROUP * tiles_n) // height

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge are zeros and are not read: reading the last one in their place, all
    # processors would ask for the same few lines of it 64 times over.
    exists = (m < rows)[:, None]
    x_at = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * depth + k[None, :]
    weight_at = weight + tl.minimum(n, columns - 1).to(tl.int64)[None, :] * depth + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        left = tl.load(x_at, mask=exists & inside[None, :], other=0.0)
        right = tl.load(weight_at, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    out_at = out + m.to(tl.int64)[:, None] * columns + n[None, :]
    kept = exists & (n < columns)[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    q,
    pool,
    out,
    tiles,
    page_starts,
    pages,
    q_stride,
    page_stride,
    first_key,
    first_value,
    num_kv_heads,
    scale_log2,
    GROUP: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
):
    # A tile is (request, first token in the step, tokens, position of the first).
    tile = tiles + tl.program_id(0) * 4
    request, first_token = tl.load(tile), tl.load(tile + 1).to(tl.int64)
    count, position = tl.load(tile + 2), tl.load(tile + 3)
    kv_head = tl.program_id(1)

    # The query heads that share a KV head are rows of one tile.
    m = tl.arange(0, BLOCK_M)
    token = m // GROUP
    exists = token < count
    token = tl.minimum(token, count - 1)
    head = kv_head * GROUP + m % GROUP
    dim = tl.arange(0, HEAD_DIM)
    query = tl.load(
        q + (first_token + token)[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :]
    )

    greatest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weights = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    end = position + count
    own_pages = pages + tl.load(page_starts + request)
    in_head = kv_head * HEAD_DIM + dim
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        known = n < end
        page = tl.load(own_pages + n // PAGE_SIZE, mask=known, other=0).to(tl.int64)
        row = page * page_stride + (n % PAGE_SIZE) * (num_kv_heads * HEAD_DIM)
        key = tl.load(
            pool + first_key + row[None, :] + in_head[:, None], mask=known[None, :], other=0.0
        ).to(query.dtype)
        score = tl.dot(query, key) * scale_log2
        score = tl.where(n[None, :] <= (position + token)[:, None], score, float("-inf"))
        greater = tl.maximum(greatest, tl.max(score, axis=1))
        shrink = tl.exp2(greatest - greater)
        weight = tl.exp2(score - greater[:, None])
        weights = weights * shrink + tl.sum(weight, axis=1)
        value = tl.load(
            pool + first_value + row[:, None] + in_head[None, :], mask=known[:, None], other=0.0
        ).to(query.dtype)
        total = tl.dot(weight.to(query.dtype), value, total * shrink[:, None])
        greatest = greater
    out_at = out + ((first_token + token) * num_kv_heads * GROUP + head)[:, None] * HEAD_DIM
    result = (total / weights[:, None]).to(out.dtype.element_ty)
    tl.store(out_at + dim[None, :], result, mask=exists[:, None])
