/* Products of a few or many rows with a weight that is packed for them.
 *
 * A weight [n, k] lies in panels of sixteen outputs, for each input the sixteen weights side by side,
 * so that a product reads it once, in order. Where all of a matrix are bfloat16 numbers it is kept as
 * such and widened in registers, to the same float32 numbers: half the bytes, which is what few rows
 * wait for. An output is summed over its inputs in their order, whatever is computed beside it.
 */
#include "cpu_vectors.h"

#define PANEL 16
#define TALLEST 6 /* rows of a tile: 12 sums, a weight's halves and an input fill 16 registers */

#define CACHED 65536 /* floats of input that stay close while panels pass by */

/* The sixteen weights of input i: of bfloat16, outputs 0 to 7 in the low halves of eight words. */
INLINE void weights_of(const void *panel, int64_t i, int wide, floats8 *first, floats8 *second) {
    if (wide) {
        const float *from = (const float *)panel + i * PANEL;
        *first = load8(from);
        *second = load8(from + EIGHT);
    } else {
        ints8 words;
        memcpy(&words, (const uint16_t *)panel + i * PANEL, sizeof words);
        *first = (floats8)(words << 16);
        *second = (floats8)(words & (int32_t)0xffff0000);
    }
}

/* out[r][c] for `rows` rows and the outputs of `panels` neighbouring panels; all but the pointers,
 * strides and k are constants where it is called. */
INLINE void tile(const float *x, const char *weight, const float *bias, float *out, int64_t n,
                 int64_t k, int wide, int rows, int panels) {
    const int64_t bytes = k * PANEL * (wide ? 4 : 2);
    floats8 sums[TALLEST][2 * TALLEST];
    UNROLLED for (int c = 0; c < 2 * panels; c++)
        UNROLLED for (int r = 0; r < rows; r++)
            sums[r][c] = bias ? load8(bias + c * EIGHT) : all8(0);
    for (int64_t i = 0; i < k; i++) {
        UNROLLED for (int p = 0; p < panels; p++) {
            const char *panel = weight + p * bytes;
            floats8 first, second;
            weights_of(panel, i, wide, &first, &second);
            /* What the next tile of panels begins with. */
            __builtin_prefetch(panel + panels * bytes + i * PANEL * (wide ? 4 : 2));
            UNROLLED for (int r = 0; r < rows; r++) {
                const float input = x[r * k + i];
                sums[r][2 * p] += input * first;
                sums[r][2 * p + 1] += input * second;
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r++)
        UNROLLED for (int c = 0; c < 2 * panels; c++) store8(out + r * n + c * EIGHT, sums[r][c]);
}

/* Any number of rows with one panel. */
INLINE void rows_of_panel(const float *x, const char *panel, const float *bias, float *out,
                          int64_t rows, int64_t n, int64_t k, int wide) {
    while (rows > 0) {
        /* Tiles of about the same height: two of 4 rows take less than one of 6 and one of 2. */
        const int64_t tiles = (rows + TALLEST - 1) / TALLEST, height = (rows + tiles - 1) / tiles;
        switch (height) {
        case 1: tile(x, panel, bias, out, n, k, wide, 1, 1); break;
        case 2: tile(x, panel, bias, out, n, k, wide, 2, 1); break;
        case 3: tile(x, panel, bias, out, n, k, wide, 3, 1); break;
        case 4: tile(x, panel, bias, out, n, k, wide, 4, 1); break;
        case 5: tile(x, panel, bias, out, n, k, wide, 5, 1); break;
        default: tile(x, panel, bias, out, n, k, wide, 6, 1);
        }
        rows -= height, x += height * k, out += height * n;
    }
}

/* out [rows, n] = x [rows, k] times the weight, plus bias [n] where there is one. */
INLINE void product(const float *x, const char *weight, const float *bias, float *out, int64_t rows,
                    int64_t n, int64_t k, int wide) {
    const int64_t panels = n / PANEL, bytes = k * PANEL * (wide ? 4 : 2);
    /* A single row is one chain of sums a panel: several panels hide each other's latency. */
    const int64_t side = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    int64_t block = CACHED / k / TALLEST * TALLEST;
    block = block < 2 * TALLEST ? 2 * TALLEST : block;
#pragma omp parallel if (n * k > 2 * WORTH_THREADS)
    for (int64_t top = 0; top < rows; top += block) {
        const int64_t count = rows - top < block ? rows - top : block;
#pragma omp for schedule(static) nowait
        for (int64_t group = 0; group < (panels + side - 1) / side; group++) {
            const int64_t panel = group * side;
            const float *from = x + top * k, *shift = bias ? bias + panel * PANEL : 0;
            const char *w = weight + panel * bytes;
            float *to = out + top * n + panel * PANEL;
            if (rows == 1 && panel + 4 <= panels)
                tile(from, w, shift, to, n, k, wide, 1, 4);
            else if (rows == 2 && panel + 2 <= panels)
                tile(from, w, shift, to, n, k, wide, 2, 2);
            else if (rows == 3 && panel + 2 <= panels)
                tile(from, w, shift, to, n, k, wide, 3, 2);
            else
                for (int64_t p = 0; p < side && panel + p < panels; p++)
                    rows_of_panel(from, w + p * bytes, shift ? shift + p * PANEL : 0, to + p * PANEL,
                                  count, n, k, wide);
        }
    }
}

void linear_bfloat16(const float *x, const void *weight, const float *bias, float *out, int64_t rows,
                     int64_t n, int64_t k) {
    product(x, weight, bias, out, rows, n, k, 0);
}

void linear_float32(const float *x, const void *weight, const float *bias, float *out, int64_t rows,
                    int64_t n, int64_t k) {
    product(x, weight, bias, out, rows, n, k, 1);
}
