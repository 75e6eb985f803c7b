/* The steps between a decoder's matrix products on a CPU, in float32, one function a step.
 *
 * At decode a step has few rows, so that plain torch spends more on calls, copies and new memory than
 * on arithmetic. Built by `cpu_library` with `cpu_products` and `cpu_attention`; `cpu_ops` and
 * `compiled_attention` call it, and see to sizes and layout.
 */
#include "cpu_vectors.h"

/* out = (x + residual) / RMS(x + residual) * weight, and residual = x + residual; rows x n each.
 * residual may be null; out may be x. */
void add_rms_norm(const float *x, float *residual, const float *weight, float *out, int64_t rows,
                  int64_t n, float eps) {
#pragma omp parallel for if (rows * n > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * n;
        float *to = out + row * n, square = 0;
        if (residual) {
            float *sum = residual + row * n;
            for (int64_t i = 0; i < n; i++) sum[i] += from[i];
            from = sum;
        }
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < n; i++) square += from[i] * from[i];
        const float scale = 1.0f / sqrtf(square / n + eps);
        for (int64_t i = 0; i < n; i++) to[i] = from[i] * scale * weight[i];
    }
}

INLINE floats8 silu_times(floats8 gate, floats8 up) { return gate / (1.0f + exp8(-gate)) * up; }

/* out [rows, n] = silu(gate) * up for gate_up [rows, 2 * n], gate first. */
void silu_and_mul(const float *gate_up, float *out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows * n > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * n, *up = gate + n;
        float *to = out + row * n;
        int64_t i = 0;
        for (; i + EIGHT <= n; i += EIGHT) store8(to + i, silu_times(load8(gate + i), load8(up + i)));
        for (; i < n; i++) to[i] = silu_times(all8(gate[i]), all8(up[i]))[0];
    }
}

/* Rotates one head of d floats: dimension i turns with i + d / 2 by the angle of (cos, sin)[i]. */
static void rotate(const float *from, float *to, const float *cos_sin, int64_t d) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = from[i], b = from[i + half], c = cos_sin[i], s = cos_sin[i + half];
        to[i] = a * c - b * s;
        to[i + half] = b * c + a * s;
    }
}

/* Rotates the queries of qkv [tokens, heads + 2 * kv_heads, d] in place; stores rotated keys at
 * keys[row], values at values[row], rows of kv_heads * d floats. table [positions, d]. */
void rotate_and_store(float *qkv, const int64_t *positions, const float *table, float *keys,
                      float *values, const int64_t *kv_rows, int64_t tokens, int64_t heads,
                      int64_t kv_heads, int64_t d) {
    const int64_t width = (heads + 2 * kv_heads) * d;
#pragma omp parallel for if (tokens * width > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        float *q = qkv + t * width, *k = q + heads * d, *v = k + kv_heads * d;
        const float *angles = table + positions[t] * d;
        float *key = keys + kv_rows[t] * kv_heads * d, *value = values + kv_rows[t] * kv_heads * d;
        for (int64_t h = 0; h < heads; h++) rotate(q + h * d, q + h * d, angles, d);
        for (int64_t h = 0; h < kv_heads; h++) rotate(k + h * d, k + h * d, angles, d);
        for (int64_t i = 0; i < kv_heads * d; i++) key[i] = k[i];
        for (int64_t i = 0; i < kv_heads * d; i++) value[i] = v[i];
    }
}
