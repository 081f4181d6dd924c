/* Sums of squares for one instruction set; _detect.h includes this once per set, after defining
 *
 *     NAME(x)        x with the set's name appended
 *     TARGET         the attribute that lets a function use the set
 *     VECTOR_BYTES   16 (any processor), 32 (AVX2, FMA, F16C) or 64 (AVX-512 F, BW, DQ)
 *
 * It defines one function per element type, NAME(sums_<type>)(c, b, n, out), which adds up (c - b)^2 and b^2 over n
 * bytes. It uses the vector extensions of GCC and Clang, so that the same lines serve every set; only what those do not
 * express well (widening to float64, and float16) is written per set. The order of additions depends only on n.
 */

#define INLINE static inline __attribute__((always_inline)) TARGET
#define u16 NAME(u16)
#define u32 NAME(u32)
#define f32 NAME(f32)
#define f64 NAME(f64)
#define Sums NAME(Sums)

typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));

/* Four independent chains each, so that the latency of additions is not the limit. */
typedef struct {
    f64 diff[4], base[4];
} Sums;

/* The lower and upper half of a vector, widened. */
#if VECTOR_BYTES == 64
INLINE f64 NAME(low)(f32 v) { return (f64)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
INLINE f64 NAME(high)(f32 v) { return (f64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
INLINE f32 NAME(half_low)(u16 v) { return (f32)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)v)); }
INLINE f32 NAME(half_high)(u16 v) { return (f32)_mm512_cvtph_ps(_mm512_extracti32x8_epi32((__m512i)v, 1)); }
#elif VECTOR_BYTES == 32
INLINE f64 NAME(low)(f32 v) { return (f64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
INLINE f64 NAME(high)(f32 v) { return (f64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
INLINE f32 NAME(half_low)(u16 v) { return (f32)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)v)); }
INLINE f32 NAME(half_high)(u16 v) { return (f32)_mm256_cvtph_ps(_mm256_extractf128_si256((__m256i)v, 1)); }
#elif defined(INCCKPT_NEON)
INLINE f64 NAME(low)(f32 v) { return (f64)vcvt_f64_f32(vget_low_f32((float32x4_t)v)); }
INLINE f64 NAME(high)(f32 v) { return (f64)vcvt_high_f64_f32((float32x4_t)v); }
INLINE f32 NAME(half_low)(u16 v) { return (f32)vcvt_f32_f16(vget_low_f16((float16x8_t)v)); }
INLINE f32 NAME(half_high)(u16 v) { return (f32)vcvt_high_f32_f16((float16x8_t)v); }
#else
INLINE f64 NAME(low)(f32 v) { return (f64){v[0], v[1]}; }
INLINE f64 NAME(high)(f32 v) { return (f64){v[2], v[3]}; }

/* A float16 in the upper half of each lane. Shifted down by 3 bits, its fields are where float32 has them, and its
 * exponent is 112 too small. A subnormal gets its value by subtracting the leading bit that it lacks. */
INLINE f32 NAME(half)(u32 v) {
    u32 magnitude = (v & 0x7fff0000u) >> 3;
    u32 exponent = magnitude & 0x0f800000u;
    u32 infinite = (u32)(exponent == 0x0f800000u), subnormal = (u32)(exponent == 0);
    u32 normal = magnitude + 0x38000000u + (infinite & 0x38000000u);
    f32 small = (f32)(magnitude + 0x38800000u) - 0x1p-14f;
    return (f32)((v & 0x80000000u) | (subnormal & (u32)small) | (~subnormal & normal));
}
/* Even and odd elements instead of halves, which makes no difference to a sum. */
INLINE f32 NAME(half_low)(u16 v) { return NAME(half)((u32)v << 16); }
INLINE f32 NAME(half_high)(u16 v) { return NAME(half)((u32)v); }
#endif

INLINE void NAME(add)(Sums *sums, int chain, f64 c, f64 b) {
    f64 d = c - b;
    sums->diff[chain] += d * d;
    sums->base[chain] += b * b;
}

/* Squares of bfloat16 range from 10^-80 to 10^77, so values are squared only as float64. */
INLINE void NAME(add_bfloat)(Sums *sums, int chain, f32 c, f32 b) {
    f32 d = c - b;
    f64 d_low = NAME(low)(d), d_high = NAME(high)(d), b_low = NAME(low)(b), b_high = NAME(high)(b);
    sums->diff[chain] += d_low * d_low;
    sums->diff[chain + 1] += d_high * d_high;
    sums->base[chain] += b_low * b_low;
    sums->base[chain + 1] += b_high * b_high;
}

/* float16 and float8 range from 2^-24 to 2^16, so sums of a few squares are safe in float32. */
INLINE void NAME(add_half)(f32 *diff, f32 *base, u16 c, u16 b) {
    f32 b_low = NAME(half_low)(b), b_high = NAME(half_high)(b);
    f32 d_low = NAME(half_low)(c) - b_low, d_high = NAME(half_high)(c) - b_high;
    *diff += d_low * d_low + d_high * d_high;
    *base += b_low * b_low + b_high * b_high;
}

INLINE void NAME(add_short)(Sums *sums, int chain, f32 diff, f32 base) {
    sums->diff[chain] += NAME(low)(diff);
    sums->diff[chain + 1] += NAME(high)(diff);
    sums->base[chain] += NAME(low)(base);
    sums->base[chain + 1] += NAME(high)(base);
}

/* A float8_e4m3fn in the upper byte of each lane, as a float16 of 2^-8 times its value. */
INLINE u16 NAME(e4m3)(u16 v) {
    u16 magnitude = v & 0x7f00;
    return (v & 0x8000) | (magnitude >> 1) | ((u16)(magnitude == 0x7f00) & 0x7e00);
}

/* One step: four vectors of bytes from each side. */
#define STEP_BYTES (4 * VECTOR_BYTES)
#define LOAD(type, v, from) type v; memcpy(&v, (from) + k * VECTOR_BYTES, VECTOR_BYTES)

INLINE void NAME(step_float64)(Sums *sums, const char *c, const char *b) {
    for (int k = 0; k < 4; k++) {
        LOAD(f64, x, c);
        LOAD(f64, y, b);
        NAME(add)(sums, k, x, y);
    }
}

INLINE void NAME(step_float32)(Sums *sums, const char *c, const char *b) {
    for (int k = 0; k < 4; k++) {
        LOAD(f32, x, c);
        LOAD(f32, y, b);
        NAME(add)(sums, 2 * (k & 1), NAME(low)(x), NAME(low)(y));
        NAME(add)(sums, 2 * (k & 1) + 1, NAME(high)(x), NAME(high)(y));
    }
}

INLINE void NAME(step_bfloat16)(Sums *sums, const char *c, const char *b) {
    for (int k = 0; k < 4; k++) {
        LOAD(u32, x, c);
        LOAD(u32, y, b);
        NAME(add_bfloat)(sums, 0, (f32)(x << 16), (f32)(y << 16));
        NAME(add_bfloat)(sums, 2, (f32)(x & 0xffff0000u), (f32)(y & 0xffff0000u));
    }
}

INLINE void NAME(step_float16)(Sums *sums, const char *c, const char *b) {
    f32 diff = {0}, base = {0};
    for (int k = 0; k < 4; k++) {
        LOAD(u16, x, c);
        LOAD(u16, y, b);
        NAME(add_half)(&diff, &base, x, y);
    }
    NAME(add_short)(sums, 0, diff, base);
}

/* The even and odd bytes in the upper half of each lane: a float8_e5m2 is the upper byte of a float16. */
INLINE void NAME(step_float8_e5m2)(Sums *sums, const char *c, const char *b) {
    f32 diff[2] = {{0}}, base[2] = {{0}};
    for (int k = 0; k < 4; k++) {
        LOAD(u16, x, c);
        LOAD(u16, y, b);
        NAME(add_half)(&diff[0], &base[0], x << 8, y << 8);
        NAME(add_half)(&diff[1], &base[1], x & 0xff00, y & 0xff00);
    }
    NAME(add_short)(sums, 0, diff[0], base[0]);
    NAME(add_short)(sums, 2, diff[1], base[1]);
}

INLINE void NAME(step_float8_e4m3fn)(Sums *sums, const char *c, const char *b) {
    f32 diff[2] = {{0}}, base[2] = {{0}};
    for (int k = 0; k < 4; k++) {
        LOAD(u16, x, c);
        LOAD(u16, y, b);
        NAME(add_half)(&diff[0], &base[0], NAME(e4m3)(x << 8), NAME(e4m3)(y << 8));
        NAME(add_half)(&diff[1], &base[1], NAME(e4m3)(x & 0xff00), NAME(e4m3)(y & 0xff00));
    }
    NAME(add_short)(sums, 0, diff[0], base[0]);
    NAME(add_short)(sums, 2, diff[1], base[1]);
}

/* The rest is padded with zeros, which add nothing. */
#define SUMS(type, scale)                                                                           \
    static TARGET void NAME(sums_##type)(const char *c, const char *b, size_t n, double *out) {    \
        Sums sums;                                                                                  \
        memset(&sums, 0, sizeof sums);                                                              \
        size_t whole = n - n % STEP_BYTES;                                                          \
        for (size_t i = 0; i < whole; i += STEP_BYTES) {                                            \
            for (int k = 0; k < STEP_BYTES; k += 64) {                                              \
                __builtin_prefetch(c + i + k + PREFETCH_BYTES);                                     \
                __builtin_prefetch(b + i + k + PREFETCH_BYTES);                                     \
            }                                                                                       \
            NAME(step_##type)(&sums, c + i, b + i);                                                 \
        }                                                                                           \
        if (n > whole) {                                                                            \
            char rest[2][STEP_BYTES] = {{0}};                                                       \
            memcpy(rest[0], c + whole, n - whole);                                                  \
            memcpy(rest[1], b + whole, n - whole);                                                  \
            NAME(step_##type)(&sums, rest[0], rest[1]);                                             \
        }                                                                                           \
        f64 diff = (sums.diff[0] + sums.diff[1]) + (sums.diff[2] + sums.diff[3]);                   \
        f64 base = (sums.base[0] + sums.base[1]) + (sums.base[2] + sums.base[3]);                   \
        out[0] = out[1] = 0;                                                                        \
        for (size_t k = 0; k < VECTOR_BYTES / sizeof(double); k++) {                                \
            out[0] += diff[k];                                                                      \
            out[1] += base[k];                                                                      \
        }                                                                                           \
        out[0] *= (scale) * (scale);                                                                \
        out[1] *= (scale) * (scale);                                                                \
    }

SUMS(float64, 1.0)
SUMS(float32, 1.0)
SUMS(bfloat16, 1.0)
SUMS(float16, 1.0)
SUMS(float8_e4m3fn, 256.0)
SUMS(float8_e5m2, 1.0)

static const SumsFunction NAME(sums)[] = {
    NAME(sums_float64), NAME(sums_float32),       NAME(sums_bfloat16),
    NAME(sums_float16), NAME(sums_float8_e4m3fn), NAME(sums_float8_e5m2),
};

#undef SUMS
#undef LOAD
#undef STEP_BYTES
#undef Sums
#undef f64
#undef f32
#undef u32
#undef u16
#undef INLINE
#undef VECTOR_BYTES
#undef TARGET
#undef NAME
