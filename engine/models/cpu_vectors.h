/* Vectors of eight floats, which the compiler maps to whatever the processor has. */
#ifndef CPU_VECTORS_H
#define CPU_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define WORTH_THREADS 32768 /* floats; less is done before a second thread has woken up */

#define INLINE static inline __attribute__((always_inline))
/* Arrays of vectors stay in registers only where all loops over them are unrolled. */
#define UNROLLED _Pragma("GCC unroll 16")

#define EIGHT 8
typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef float loose8 __attribute__((vector_size(32), aligned(4))); /* anywhere in memory */

INLINE floats8 load8(const float *from) { return *(const loose8 *)from; }
INLINE void store8(float *to, floats8 value) { *(loose8 *)to = value; }
INLINE floats8 all8(float value) { return (floats8){0} + value; }

INLINE floats8 where(ints8 mask, floats8 yes, floats8 no) {
    return (floats8)((mask & (ints8)yes) | (~mask & (ints8)no));
}

/* Lanes of a (0 to 7) and b (8 to 15), in the order given. */
#ifdef __clang__
#define LANES_OF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANES_OF(a, b, ...) __builtin_shuffle(a, b, (ints8){__VA_ARGS__})
#endif

/* exp(x) to about a bit; 0 where that is below the least normal number, 2.2e38 from 88.3 on. */
INLINE floats8 exp8(floats8 x) {
    const ints8 counts = x >= -87.3f;
    x = where(x > 88.3f, all8(88.3f), x);
    /* x = n ln 2 + r, |r| < 0.35, and a polynomial for exp(r). */
    const floats8 half = where(x < 0, all8(-0.5f), all8(0.5f));
    const ints8 whole = __builtin_convertvector(x * 1.44269504f + half, ints8);
    const floats8 n = __builtin_convertvector(whole, floats8);
    const floats8 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (floats8)(counts & (ints8)(p * (floats8)((whole + 127) << 23)));
}

#endif
