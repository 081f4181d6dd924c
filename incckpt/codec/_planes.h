/* Inner loops of _planes.pyx: elements <-> byte planes, and statistics of byte planes.
 *
 * Every loop is written once, in plain C that GCC and Clang vectorise (build with -O3). On x86 the same bodies are also
 * compiled for AVX2 and AVX-512, and one variant is chosen at run time; elsewhere there is only the compiler's baseline
 * (NEON on arm64). The only hand-written vector code masks bytes with AVX-512's compress and expand, which compilers do
 * not find by themselves.
 *
 * Nothing here checks its arguments; _planes.pyx does.
 */
#ifndef INCCKPT_PLANES_H
#define INCCKPT_PLANES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "incckpt reads tensor bytes as little-endian elements; this processor is big-endian"
#endif

#if defined(__x86_64__) && !defined(INCCKPT_GENERIC_ONLY)
#include <immintrin.h>
#define PLANES_X86 1
#else
#define PLANES_X86 0
#endif

#include "huffman/_huffman.h"
#include "huffman/_unhuffman.h"

#define PLANES_INLINE static inline __attribute__((always_inline))

enum { PLANES_BLOCK = 4096 };                   /* bytes transformed at a time, which stay in the L1 cache */
enum { SAMPLE_RUNS = 16, SAMPLE_LENGTH = 256 }; /* elements that planes_survey samples */
enum { SAMPLE = SAMPLE_RUNS * SAMPLE_LENGTH };
enum { GAP_SKIP = 255 }; /* the gap continues in the next byte */

typedef struct {
    double bits;     /* entropy, bits per byte */
    double share;    /* of the commonest byte */
    double commonest;
} planes_statistics;

/* ---- elements <-> planes ----------------------------------------------------------------------------------------- */

/* Bodies for elements of W bytes. Intra: rotate left by one bit, so that a float's exponent fills the top byte. Delta:
 * map both numbers to integers in the order of their float values, subtract, move the sign to the lowest bit. A block
 * is joined in scratch memory and then copied to `raw`, which may therefore be the base's own memory. */
#define PLANES_BODIES(W, U, S)                                                                                         \
    PLANES_INLINE U order_##W(U x) { return (U)(x ^ (U)((U)((S)x >> (8 * W - 1)) >> 1)); }                             \
    PLANES_INLINE void split_##W(const uint8_t *raw, const uint8_t *base, size_t n, uint8_t *const *planes)            \
    {                                                                                                                  \
        U x[PLANES_BLOCK / W];                                                                                         \
        for (size_t start = 0; start < n; start += PLANES_BLOCK / W) {                                                 \
            const size_t m = n - start < PLANES_BLOCK / W ? n - start : PLANES_BLOCK / W;                              \
            for (size_t i = 0; i < m; i++) {                                                                           \
                U v, before;                                                                                           \
                memcpy(&v, raw + (start + i) * W, W);                                                                  \
                if (base) {                                                                                            \
                    memcpy(&before, base + (start + i) * W, W);                                                        \
                    v = (U)(order_##W(v) - order_##W(before));                                                         \
                    v = (U)((U)(v << 1) ^ (U)((S)v >> (8 * W - 1)));                                                   \
                } else if (W > 1)                                                                                      \
                    v = (U)((U)(v << 1) | (U)(v >> (8 * W - 1)));                                                      \
                x[i] = v;                                                                                              \
            }                                                                                                          \
            for (int j = 0; j < W; j++) {                                                                              \
                uint8_t *restrict plane = planes[j] + start;                                                           \
                for (size_t i = 0; i < m; i++)                                                                         \
                    plane[i] = (uint8_t)(x[i] >> (8 * j));                                                             \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    PLANES_INLINE void join_##W(const uint8_t *const *planes, const uint8_t *base, size_t n, uint8_t *raw)             \
    {                                                                                                                  \
        U x[PLANES_BLOCK / W];                                                                                         \
        const uint8_t *plane[W];                                                                                       \
        for (size_t start = 0; start < n; start += PLANES_BLOCK / W) {                                                 \
            const size_t m = n - start < PLANES_BLOCK / W ? n - start : PLANES_BLOCK / W;                              \
            for (int j = 0; j < W; j++)                                                                                \
                plane[j] = planes[j] + start;                                                                          \
            for (size_t i = 0; i < m; i++) {                                                                           \
                U v = 0, before;                                                                                       \
                for (int j = 0; j < W; j++)                                                                            \
                    v |= (U)((U)plane[j][i] << (8 * j));                                                               \
                if (base) {                                                                                            \
                    memcpy(&before, base + (start + i) * W, W);                                                        \
                    v = (U)((U)(v >> 1) ^ (U)(0 - (v & 1)));                                                           \
                    v = order_##W((U)(order_##W(before) + v));                                                         \
                } else if (W > 1)                                                                                      \
                    v = (U)((U)(v >> 1) | (U)(v << (8 * W - 1)));                                                      \
                x[i] = v;                                                                                              \
            }                                                                                                          \
            memcpy(raw + start * W, x, m * W);                                                                         \
        }                                                                                                              \
    }

PLANES_BODIES(1, uint8_t, int8_t)
PLANES_BODIES(2, uint16_t, int16_t)
PLANES_BODIES(4, uint32_t, int32_t)
PLANES_BODIES(8, uint64_t, int64_t)

PLANES_INLINE void split_body(const uint8_t *raw, const uint8_t *base, size_t n, int itemsize, uint8_t *const *planes)
{
    switch (itemsize) {
    case 1: split_1(raw, base, n, planes); break;
    case 2: split_2(raw, base, n, planes); break;
    case 4: split_4(raw, base, n, planes); break;
    case 8: split_8(raw, base, n, planes); break;
    }
}

PLANES_INLINE void join_body(const uint8_t *const *planes, const uint8_t *base, size_t n, int itemsize, uint8_t *raw)
{
    switch (itemsize) {
    case 1: join_1(planes, base, n, raw); break;
    case 2: join_2(planes, base, n, raw); break;
    case 4: join_4(planes, base, n, raw); break;
    case 8: join_8(planes, base, n, raw); break;
    }
}

/* ---- bytes unlike the commonest ---------------------------------------------------------------------------------- */

PLANES_INLINE int constant_body(const uint8_t *bytes, size_t n)
{
    for (size_t start = 0; start < n; start += PLANES_BLOCK) {
        const size_t stop = n - start < PLANES_BLOCK ? n : start + PLANES_BLOCK;
        uint8_t differs = 0;
        for (size_t i = start; i < stop; i++)
            differs |= (uint8_t)(bytes[i] ^ bytes[0]);
        if (differs)
            return 0;
    }
    return 1;
}

/* Write a bitmap with one bit per byte (lowest first; set where the byte is not `common`) and the bytes with set bits;
 * return their number. `others` has room for n bytes: the loop stores every byte, then decides whether to keep it. */
PLANES_INLINE size_t mask_from(const uint8_t *bytes, size_t i, size_t n, uint8_t common, uint8_t *bitmap,
                               uint8_t *others, size_t count)
{
    const uint64_t commons = common * UINT64_C(0x0101010101010101);
    for (; i < n; i += 8) {
        const size_t m = n - i < 8 ? n - i : 8;
        unsigned bits = 0;
        uint64_t word = ~commons;
        if (m == 8)
            memcpy(&word, bytes + i, 8);
        if (word == commons) {
            bitmap[i / 8] = 0;
            continue;
        }
        for (size_t j = 0; j < m; j++) {
            const unsigned differs = bytes[i + j] != common;
            others[count] = bytes[i + j];
            count += differs;
            bits |= differs << j;
        }
        bitmap[i / 8] = (uint8_t)bits;
    }
    return count;
}

/* The inverse, for a bitmap with exactly `total` bits set, all of them among the first n. */
PLANES_INLINE void unmask_from(const uint8_t *bitmap, const uint8_t *others, size_t total, size_t i, size_t n,
                               uint8_t common, uint8_t *bytes, size_t count)
{
    for (; i < n; i += 8) {
        const size_t m = n - i < 8 ? n - i : 8;
        unsigned bits = bitmap[i / 8];
        if (bits == 0) {
            memset(bytes + i, common, m);
            continue;
        }
        for (size_t j = 0; j < m; j++, bits >>= 1) {
            const uint8_t other = others[count < total ? count : total - 1];
            bytes[i + j] = bits & 1 ? other : common;
            count += bits & 1;
        }
    }
}

/* For each set bit of a bitmap of n bits, write the number of clear bits before it, in steps of GAP_SKIP. Return the
 * number of bytes written, or `room` + 1 if they do not fit into `room`. */
static size_t gaps_from_bitmap(const uint8_t *bitmap, size_t n, uint8_t *gaps, size_t room)
{
    size_t count = 0, next = 0;
    for (size_t start = 0; start < n; start += 64) {
        uint64_t word = 0;
        memcpy(&word, bitmap + start / 8, n - start < 64 ? (n - start + 7) / 8 : 8);
        for (; word; word &= word - 1) {
            const size_t at = start + (size_t)__builtin_ctzll(word);
            size_t gap = at - next;
            for (; gap >= GAP_SKIP; gap -= GAP_SKIP) {
                if (count == room)
                    return room + 1;
                gaps[count++] = GAP_SKIP;
            }
            if (count == room)
                return room + 1;
            gaps[count++] = (uint8_t)gap;
            next = at + 1;
        }
    }
    return count;
}

/* The number of bytes that the gaps precede. */
static size_t gaps_ends(const uint8_t *gaps, size_t m)
{
    size_t count = 0;
    for (size_t i = 0; i < m; i++)
        count += gaps[i] != GAP_SKIP;
    return count;
}

/* Fill n bytes with `common`, except for `others` (gaps_ends of them), each after its gap. Return whether they fit. */
static int gaps_fill(const uint8_t *gaps, size_t m, const uint8_t *others, uint8_t common, uint8_t *bytes, size_t n)
{
    size_t at = 0, next = 0;
    if (n) /* with no bytes, the address may be NULL */
        memset(bytes, common, n);
    for (size_t i = 0; i < m; i++) {
        at += gaps[i];
        if (gaps[i] == GAP_SKIP)
            continue;
        if (at >= n)
            return 0;
        bytes[at++] = others[next++];
    }
    return at <= n;
}

PLANES_INLINE size_t popcount_body(const uint8_t *bitmap, size_t n)
{
    size_t count = 0, i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, bitmap + i, 8);
        count += (size_t)__builtin_popcountll(word);
    }
    for (; i < n; i++)
        count += (size_t)__builtin_popcount(bitmap[i]);
    return count;
}

/* ---- one set of functions per instruction set -------------------------------------------------------------------- */

#define PLANES_VARIANT(NAME, TARGET)                                                                                   \
    TARGET static void split_##NAME(const uint8_t *raw, const uint8_t *base, size_t n, int itemsize,                   \
                                    uint8_t *const *planes)                                                            \
    {                                                                                                                  \
        if (base)                                                                                                      \
            split_body(raw, base, n, itemsize, planes);                                                                \
        else                                                                                                           \
            split_body(raw, NULL, n, itemsize, planes);                                                                \
    }                                                                                                                  \
    TARGET static void join_##NAME(const uint8_t *const *planes, const uint8_t *base, size_t n, int itemsize,          \
                                   uint8_t *raw)                                                                       \
    {                                                                                                                  \
        if (base)                                                                                                      \
            join_body(planes, base, n, itemsize, raw);                                                                 \
        else                                                                                                           \
            join_body(planes, NULL, n, itemsize, raw);                                                                 \
    }                                                                                                                  \
    TARGET static int constant_##NAME(const uint8_t *bytes, size_t n) { return constant_body(bytes, n); }              \
    TARGET static size_t popcount_##NAME(const uint8_t *bitmap, size_t n) { return popcount_body(bitmap, n); }

#define PLANES_SERIAL_MASK(NAME)                                                                                       \
    static size_t mask_##NAME(const uint8_t *bytes, size_t n, uint8_t common, uint8_t *bitmap, uint8_t *others)        \
    {                                                                                                                  \
        return mask_from(bytes, 0, n, common, bitmap, others, 0);                                                      \
    }                                                                                                                  \
    static void unmask_##NAME(const uint8_t *bitmap, const uint8_t *others, size_t total, size_t n, uint8_t common,    \
                              uint8_t *bytes)                                                                          \
    {                                                                                                                  \
        unmask_from(bitmap, others, total, 0, n, common, bytes, 0);                                                    \
    }

PLANES_VARIANT(baseline, )
PLANES_SERIAL_MASK(baseline)

#if PLANES_X86
#define PLANES_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define PLANES_AVX512                                                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))

PLANES_VARIANT(avx2, PLANES_AVX2)
PLANES_VARIANT(avx512, PLANES_AVX512)

PLANES_AVX512 static size_t mask_avx512(const uint8_t *bytes, size_t n, uint8_t common, uint8_t *bitmap,
                                        uint8_t *others)
{
    const __m512i commons = _mm512_set1_epi8((char)common);
    size_t i = 0, count = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512i v = _mm512_loadu_si512(bytes + i);
        const uint64_t bits = _mm512_cmpneq_epi8_mask(v, commons);
        memcpy(bitmap + i / 8, &bits, 8);
        /* count <= i, so all 64 bytes fit; storing only the compressed ones is slow on some processors */
        _mm512_storeu_si512(others + count, _mm512_maskz_compress_epi8(bits, v));
        count += (size_t)__builtin_popcountll(bits);
    }
    return mask_from(bytes, i, n, common, bitmap, others, count);
}

PLANES_AVX512 static void unmask_avx512(const uint8_t *bitmap, const uint8_t *others, size_t total, size_t n,
                                        uint8_t common, uint8_t *bytes)
{
    const __m512i commons = _mm512_set1_epi8((char)common);
    size_t i = 0, count = 0;
    for (; i + 64 <= n && count + 64 <= total; i += 64) {
        uint64_t bits;
        memcpy(&bits, bitmap + i / 8, 8);
        _mm512_storeu_si512(bytes + i, _mm512_mask_expand_epi8(commons, bits, _mm512_loadu_si512(others + count)));
        count += (size_t)__builtin_popcountll(bits);
    }
    unmask_from(bitmap, others, total, i, n, common, bytes, count);
}
#endif

typedef struct {
    const char *name;
    void (*split)(const uint8_t *, const uint8_t *, size_t, int, uint8_t *const *);
    void (*join)(const uint8_t *const *, const uint8_t *, size_t, int, uint8_t *);
    int (*constant)(const uint8_t *, size_t);
    size_t (*popcount)(const uint8_t *, size_t);
    size_t (*mask)(const uint8_t *, size_t, uint8_t, uint8_t *, uint8_t *);
    void (*unmask)(const uint8_t *, const uint8_t *, size_t, size_t, uint8_t, uint8_t *);
    huffman_coder coder;
    unhuffman_decoder decoder;
} planes_variant;

/* Slowest first. */
static const planes_variant planes_variants[] = {
    {"baseline", split_baseline, join_baseline, constant_baseline, popcount_baseline, mask_baseline, unmask_baseline,
     huffman_streams, unhuffman_blocks},
#if PLANES_X86
    {"avx2", split_avx2, join_avx2, constant_avx2, popcount_avx2, mask_baseline, unmask_baseline, huffman_streams_bmi2,
     unhuffman_blocks_bmi2},
    {"avx512", split_avx512, join_avx512, constant_avx512, popcount_avx512, mask_avx512, unmask_avx512,
     huffman_streams_bmi2, unhuffman_blocks_bmi2},
#endif
};

/* Return how many of the variants, counted from the first, this processor and operating system can run. */
static int planes_usable(void)
{
#if PLANES_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi")
        || !__builtin_cpu_supports("bmi2"))
        return 1;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")
        || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi")
        || !__builtin_cpu_supports("avx512vbmi2"))
        return 2;
    return 3;
#else
    return 1;
#endif
}

/* ---- statistics of a sample -------------------------------------------------------------------------------------- */

/* Entropy with the correction of Miller and Madow (half a nat per further symbol, divided by the bytes seen): without
 * it, a sample of 4096 uniform bytes would seem to have 7.955 bits. */
static void planes_count(const uint8_t *bytes, size_t n, planes_statistics *found)
{
    uint16_t counts[4][256]; /* four, so that a run of one byte need not wait for its own increments */
    double sum = 0.0;
    size_t i = 0, symbols = 0, most = 0, commonest = 0;
    memset(counts, 0, sizeof counts);
    for (; i + 4 <= n; i += 4) {
        counts[0][bytes[i]]++;
        counts[1][bytes[i + 1]]++;
        counts[2][bytes[i + 2]]++;
        counts[3][bytes[i + 3]]++;
    }
    for (; i < n; i++)
        counts[0][bytes[i]]++;
    for (size_t b = 0; b < 256; b++) {
        const size_t c = (size_t)counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b];
        if (c == 0)
            continue;
        symbols++;
        sum += (double)c * log2((double)c);
        if (c > most) {
            most = c;
            commonest = b;
        }
    }
    found->bits = 0.0;
    found->share = 1.0;
    found->commonest = (double)commonest;
    if (n) {
        const double total = (double)n, nats = (double)(symbols - 1) / 2.0;
        found->bits = log2(total) - sum / total + nats / (0.6931471805599453 * total);
        found->bits = found->bits < 8.0 ? found->bits : 8.0;
        found->share = (double)most / total;
    }
}

/* Statistics of each byte plane, from SAMPLE elements in SAMPLE_RUNS evenly spread runs, or from all if fewer. */
static void planes_survey(const planes_variant *variant, const uint8_t *raw, const uint8_t *base, size_t n,
                          int itemsize, planes_statistics *found)
{
    uint8_t sample[8 * SAMPLE], base_sample[8 * SAMPLE], bytes[8 * SAMPLE];
    uint8_t *planes[8] = {bytes};
    const size_t m = n < SAMPLE ? n : SAMPLE;
    for (int j = 0; j < itemsize; j++)
        planes[j] = bytes + j * SAMPLE;
    if (n > SAMPLE) {
        const size_t length = (size_t)itemsize * SAMPLE_LENGTH;
        for (size_t run = 0; run < SAMPLE_RUNS; run++) {
            const size_t start = (n - SAMPLE_LENGTH) * run / (SAMPLE_RUNS - 1) * (size_t)itemsize;
            memcpy(sample + run * length, raw + start, length);
            if (base)
                memcpy(base_sample + run * length, base + start, length);
        }
        raw = sample;
        base = base ? base_sample : NULL;
    }
    variant->split(raw, base, m, itemsize, planes);
    for (int j = 0; j < itemsize; j++)
        planes_count(planes[j], m, &found[j]);
}

#endif
