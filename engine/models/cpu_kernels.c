/* The steps between a decoder's matrix products on a CPU, in float32, one function a step.
 *
 * At decode a step has few rows, so that plain torch spends more on calls, copies and new memory than
 * on arithmetic; attention reads its pages where they lie instead of gathering them first. Built by
 * `cpu_library`; `cpu_ops` and `compiled_attention` call it, and see to sizes and layout.
 */
#include <math.h>
#include <stdint.h>

#define WORTH_THREADS 32768 /* floats; less is done before a second thread has woken up */

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
        for (int64_t i = 0; i < n; i++) square += from[i] * from[i];
        const float scale = 1.0f / sqrtf(square / n + eps);
        for (int64_t i = 0; i < n; i++) to[i] = from[i] * scale * weight[i];
    }
}

/* out [rows, n] = silu(gate) * up for gate_up [rows, 2 * n], gate first. */
void silu_and_mul(const float *gate_up, float *out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows * n > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * n, *up = gate + n;
        float *to = out + row * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) to[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
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
        for (int64_t h = 0; h < kv_heads; h++) rotate(k + h * d, key + h * d, angles, d);
        for (int64_t i = 0; i < kv_heads * d; i++) value[i] = v[i];
    }
}

/* One token's query heads that share a KV head, over its pages: softmax page by page, with sums
 * scaled down whenever a larger score turns up. */
static inline __attribute__((always_inline)) void attend(
    const float *q, const float *data, const int64_t *pages, int64_t length, float *out,
    int64_t group, int64_t page_size, int64_t kv_heads, int64_t head, int64_t d) {
    const int64_t step = kv_heads * d, block = page_size * step;
    const float scale = 1.0f / sqrtf((float)d);
    float sums[group * d], scores[group * page_size], top[group], total[group];
    for (int64_t i = 0; i < group * d; i++) sums[i] = 0;
    for (int64_t first = 0; first < length; first += page_size) {
        const float *k = data + *pages++ * block + head * d, *v = k + block;
        const int64_t count = length - first < page_size ? length - first : page_size;
        for (int64_t j = 0; j < count; j++)
            for (int64_t g = 0; g < group; g++) {
                float product = 0;
                for (int64_t i = 0; i < d; i++) product += q[g * d + i] * k[j * step + i];
                scores[g * page_size + j] = product * scale;
            }
        for (int64_t g = 0; g < group; g++) {
            float *score = scores + g * page_size, *sum = sums + g * d, most = score[0];
            for (int64_t j = 1; j < count; j++) most = score[j] > most ? score[j] : most;
            if (first == 0) {
                top[g] = most;
                total[g] = 0;
            } else if (most > top[g]) {
                const float shrink = expf(top[g] - most);
                for (int64_t i = 0; i < d; i++) sum[i] *= shrink;
                total[g] *= shrink;
                top[g] = most;
            }
#pragma omp simd
            for (int64_t j = 0; j < count; j++) score[j] = expf(score[j] - top[g]);
            for (int64_t j = 0; j < count; j++) total[g] += score[j];
            for (int64_t j = 0; j < count; j++)
                for (int64_t i = 0; i < d; i++) sum[i] += score[j] * v[j * step + i];
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < d; i++) out[g * d + i] = sums[g * d + i] / total[g];
}

/* out [rows, heads, d] for q of that shape, whose rows lie q_stride floats apart. `data` begins at
 * the layer's keys of block 0; pages [rows, columns] are blocks of keys, each followed by its values. */
void decode_attention(const float *q, int64_t q_stride, const float *data, const int64_t *pages,
                      int64_t columns, const int64_t *lengths, float *out, int64_t rows,
                      int64_t group, int64_t page_size, int64_t kv_heads, int64_t d) {
    const int64_t width = kv_heads * group * d;
#pragma omp parallel for schedule(dynamic) if (rows * columns * page_size * width > 4 * WORTH_THREADS)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
        const int64_t row = task / kv_heads, head = task % kv_heads, at = head * group * d;
        const float *query = q + row * q_stride + at;
        const int64_t *mine = pages + row * columns;
        float *to = out + row * width + at;
        const int64_t length = lengths[row];
        /* The usual sizes as constants, so that the compiler unrolls them. */
        if (d == 64)
            attend(query, data, mine, length, to, group, page_size, kv_heads, head, 64);
        else if (d == 128)
            attend(query, data, mine, length, to, group, page_size, kv_heads, head, 128);
        else
            attend(query, data, mine, length, to, group, page_size, kv_heads, head, d);
    }
}
