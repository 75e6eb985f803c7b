/* Seals of pages in a host's memory (see digest.py), computed as they are read or copied.
 *
 * A word times its weight, modulo 2^64, is two products of 32 bits: with the weight's lower half,
 * signed and widened, and with its upper half, of which the lower 32 bits count. Processors multiply
 * vectors of such numbers, and few those of 64 bits. Built by `cpu_digest.py`.
 */
#include <stdint.h>
#include <string.h>

#define BLOCK 2048 /* words: they and their weights stay in the nearest cache for all rows of a page */

typedef int32_t word __attribute__((aligned(1))); /* anywhere in memory */

static uint64_t weighted(const word *data, const int32_t *low, const int32_t *high, int64_t count) {
    uint64_t sum = 0; /* modulo 2^64: a signed sum may not overflow */
    uint32_t upper = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += (uint64_t)((int64_t)data[i] * low[i]);
        upper += (uint32_t)data[i] * (uint32_t)high[i];
    }
    return sum + ((uint64_t)upper << 32);
}

/* digests [pages]: of the valid words of each page of `source`, which are copied to a page of `target`
 * where there is one. A line of `table`: source page, target page, valid words of a row. What is
 * digested is what the target holds: a source that changes meanwhile cannot come between. */
void copy_and_digest(const char *source, char *target, const int64_t *table, int64_t pages,
                     uint64_t *digests, const uint64_t *row_weights, const int32_t *low,
                     const int32_t *high, int64_t rows, int64_t row_words) {
    for (int64_t page = 0; page < pages; page++) {
        const int64_t *line = table + 3 * page, words = line[2];
        const char *from = source + line[0] * rows * row_words * 4;
        char *to = target ? target + line[1] * rows * row_words * 4 : 0;
        uint64_t digest = 0;
        for (int64_t first = 0; first < words; first += BLOCK) {
            const int64_t count = words - first < BLOCK ? words - first : BLOCK;
            for (int64_t row = 0; row < rows; row++) {
                const int64_t place = (row * row_words + first) * 4;
                const char *data = from + place;
                if (to) data = memcpy(to + place, data, count * 4);
                digest += row_weights[row] * weighted((const word *)data, low + first, high + first, count);
            }
        }
        digests[page] = digest;
    }
}
