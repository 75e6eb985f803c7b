/* Attention of single tokens over their pages, where those lie.
 *
 * All KV heads of a page are read in one go: they lie beside one another, and a context is read from
 * memory once, in order. Query heads that share a KV head go two at a time, since that many sums fit
 * into a processor's registers.
 */
#include "cpu_vectors.h"

#define PAIR 2
#define CHUNK 64 /* tokens between two corrections of the largest score */
#define WIDE 4   /* vectors of values at a time: PAIR * WIDE sums */

/* Sums of four vectors, one beside the other. */
INLINE void sums_of_four(const floats8 v[4], float to[4]) {
    floats8 pairs[2];
    UNROLLED for (int i = 0; i < 2; i++)
        pairs[i] = LANES_OF(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   LANES_OF(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    const floats8 both = LANES_OF(pairs[0], pairs[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                         LANES_OF(pairs[0], pairs[1], 2, 3, 10, 11, 6, 7, 14, 15);
    UNROLLED for (int i = 0; i < 4; i++) to[i] = both[i] + both[i + 4];
}

/* scores[g][j] of `heads` neighbouring query heads for `count` keys that lie `step` floats apart. */
INLINE void scores_of(const float *q, const float *keys, const float *values, int64_t count,
                      int64_t step, int64_t d, int heads, float scores[PAIR][CHUNK]) {
    const float scale = 1.0f / sqrtf((float)d);
    for (int64_t j = 0; j < count; j += 4) {
        const float *key[4];
        UNROLLED for (int n = 0; n < 4; n++)
            key[n] = keys + (j + n < count ? j + n : count - 1) * step;
        floats8 products[PAIR][4];
        UNROLLED for (int g = 0; g < heads; g++)
            UNROLLED for (int n = 0; n < 4; n++) products[g][n] = all8(0);
        for (int64_t i = 0; i < d; i += EIGHT) {
            UNROLLED for (int n = 0; n < 4; n++) {
                const floats8 k = load8(key[n] + i);
                UNROLLED for (int g = 0; g < heads; g++) products[g][n] += load8(q + g * d + i) * k;
            }
        }
        UNROLLED for (int g = 0; g < heads; g++) {
            float four[4];
            sums_of_four(products[g], four);
            UNROLLED for (int n = 0; n < 4; n++)
                scores[g][j + n] = j + n < count ? four[n] * scale : -INFINITY;
        }
        /* The values of these tokens are wanted next. */
        for (int64_t i = 0; i < d; i += 16)
            UNROLLED for (int n = 0; n < 4; n++) __builtin_prefetch(values + (j + n) * step + i);
    }
    for (int64_t j = (count + 3) / 4 * 4; j < (count + 7) / 8 * 8; j++)
        UNROLLED for (int g = 0; g < heads; g++) scores[g][j] = -INFINITY;
}

/* Scores to weights, in place, relative to the largest so far; what was summed before must be
 * multiplied by the returned factor. */
INLINE float weigh(float *scores, int64_t count, float *top, float *total) {
    float most = *top;
    for (int64_t j = 0; j < count; j++) most = scores[j] > most ? scores[j] : most;
    const float shrink = *top == most ? 1.0f : expf(*top - most);
    floats8 sum = all8(0);
    for (int64_t j = 0; j < count; j += EIGHT) {
        const floats8 weight = exp8(load8(scores + j) - most);
        store8(scores + j, weight);
        sum += weight;
    }
    *top = most;
    *total *= shrink;
    UNROLLED for (int i = 0; i < EIGHT; i++) *total += sum[i];
    return shrink;
}

/* sums[g] = sums[g] * shrink[g] + the weighted values, `wide` vectors from float i on. */
INLINE void add_values(const float *values, const float *next, int64_t count, int64_t step, int64_t d,
                       int heads, int wide, float scores[PAIR][CHUNK], const float shrink[PAIR],
                       float *sums) {
    floats8 held[PAIR][WIDE];
    UNROLLED for (int g = 0; g < heads; g++)
        UNROLLED for (int w = 0; w < wide; w++)
            held[g][w] = load8(sums + g * d + w * EIGHT) * shrink[g];
    for (int64_t j = 0; j < count; j++) {
        UNROLLED for (int w = 0; w < wide; w += 2) __builtin_prefetch(next + j * step + w * EIGHT);
        UNROLLED for (int w = 0; w < wide; w++) {
            const floats8 v = load8(values + j * step + w * EIGHT);
            UNROLLED for (int g = 0; g < heads; g++) held[g][w] += scores[g][j] * v;
        }
    }
    UNROLLED for (int g = 0; g < heads; g++)
        UNROLLED for (int w = 0; w < wide; w++) store8(sums + g * d + w * EIGHT, held[g][w]);
}

/* `count` tokens more for `heads` query heads of one KV head. */
INLINE void attend(const float *q, const float *keys, const float *values, const float *next,
                   int64_t count, int64_t step, int64_t d, int heads, float *top, float *total,
                   float *sums) {
    float scores[PAIR][CHUNK], shrink[PAIR];
    scores_of(q, keys, values, count, step, d, heads, scores);
    UNROLLED for (int g = 0; g < heads; g++) shrink[g] = weigh(scores[g], count, top + g, total + g);
    int64_t i = 0;
    for (; i + WIDE * EIGHT <= d; i += WIDE * EIGHT)
        add_values(values + i, next + i, count, step, d, heads, WIDE, scores, shrink, sums + i);
    for (; i < d; i += EIGHT)
        add_values(values + i, next + i, count, step, d, heads, 1, scores, shrink, sums + i);
}

/* One token's query heads `first` to `last` - 1, for each `group` of which there is a KV head. */
static void attend_row(const float *q, const float *data, const int64_t *pages, int64_t length,
                       float *out, int64_t first, int64_t last, int64_t group, int64_t page_size,
                       int64_t kv_heads, int64_t d) {
    const int64_t step = kv_heads * d, block = page_size * step;
    float top[last - first], total[last - first];
    for (int64_t h = first; h < last; h++) {
        top[h - first] = -INFINITY;
        total[h - first] = 0;
        for (int64_t i = 0; i < d; i++) out[h * d + i] = 0;
    }
    for (int64_t seen = 0; seen < length; seen += page_size) {
        const float *page = data + *pages++ * block;
        /* What is read after this page's last chunk. */
        const float *following = seen + page_size < length ? data + *pages * block : page;
        const int64_t held = length - seen < page_size ? length - seen : page_size;
        for (int64_t begin = 0; begin < held; begin += CHUNK) {
            const int64_t count = held - begin < CHUNK ? held - begin : CHUNK;
            for (int64_t h = first; h < last;) {
                const int64_t at = begin * step + h / group * d;
                const float *keys = page + at;
                const float *next = begin + CHUNK < held ? keys + CHUNK * step : following + h / group * d;
                float *most = top + h - first, *sum = total + h - first, *to = out + h * d;
                if (h % group + PAIR <= group) {
                    attend(q + h * d, keys, keys + block, next, count, step, d, PAIR, most, sum, to);
                    h += PAIR;
                } else {
                    attend(q + h * d, keys, keys + block, next, count, step, d, 1, most, sum, to);
                    h += 1;
                }
            }
        }
    }
    for (int64_t h = first; h < last; h++)
        for (int64_t i = 0; i < d; i++) out[h * d + i] /= total[h - first];
}

/* out [rows, heads, d] for q of that shape, whose rows lie q_stride floats apart. `data` begins at
 * the layer's keys of block 0; pages [rows, columns] are blocks of keys, each followed by its values. */
void decode_attention(const float *q, int64_t q_stride, const float *data, const int64_t *pages,
                      int64_t columns, const int64_t *lengths, float *out, int64_t rows,
                      int64_t group, int64_t page_size, int64_t kv_heads, int64_t d) {
    const int64_t heads = kv_heads * group;
    /* Few rows are divided among the threads, too. */
    const int64_t parts = rows < 8 ? kv_heads : 1, share = heads / parts;
#pragma omp parallel for schedule(dynamic) if (rows * columns * page_size * heads * d > 4 * WORTH_THREADS)
    for (int64_t task = 0; task < rows * parts; task++) {
        const int64_t row = task / parts, first = task % parts * share;
        attend_row(q + row * q_stride, data, pages + row * columns, lengths[row],
                   out + row * heads * d, first, first + share, group, page_size, kv_heads, d);
    }
}
