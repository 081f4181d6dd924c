/* What _detect.pyx does with one block of bytes: compare, add up squares, copy, read. C for GCC and Clang, with
 * variants for AVX2 and AVX-512 chosen at run time. INCCKPT_GENERIC_ONLY leaves out code for specific processors. */

#ifndef INCCKPT_DETECT_H
#define INCCKPT_DETECT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(INCCKPT_GENERIC_ONLY)
#define INCCKPT_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(INCCKPT_GENERIC_ONLY)
#define INCCKPT_NEON 1
#include <arm_neon.h>
#endif

/* Far enough ahead to hide the latency of memory. Without prefetching, the arithmetic fills the processor's window and
 * too few loads are in flight: bfloat16 ran at half the speed. */
#define PREFETCH_BYTES 1024

/* ---- exact comparison ---- */

/* The flags are shared: any thread may set one, and all read them without waiting. */
static inline int flag_is_set(const unsigned char *flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED); }
static inline void set_flag(unsigned char *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

static inline void flag_difference(uintptr_t a, uintptr_t b, size_t n, unsigned char *flag) {
    if (!flag_is_set(flag) && memcmp((const void *)a, (const void *)b, n) != 0) set_flag(flag);
}

/* ---- sums of squares ---- */

typedef void (*SumsFunction)(const char *c, const char *b, size_t n, double *out);

#define NAME(x) x##_generic
#define TARGET
#define VECTOR_BYTES 16
#include "_sums.h"

#ifdef INCCKPT_X86
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#include "_sums.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx2,fma,f16c")))
#define VECTOR_BYTES 64
#include "_sums.h"
#endif

/* The functions of a kernel by element type, in the order of _sums.h; NULL if it cannot run here. */
static const SumsFunction *sums_functions(const char *kernel) {
    if (strcmp(kernel, "generic") == 0) return sums_generic;
#ifdef INCCKPT_X86
    /* F16C is older than AVX2 in every line of processors, and only recent versions of Clang can test for it. */
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (strcmp(kernel, "avx2") == 0 && avx2) return sums_avx2;
    if (strcmp(kernel, "avx512") == 0 && avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return sums_avx512;
#endif
    return NULL;
}

#define FLOAT64 0

/* A square below 2^-1074 is lost. If float64 differences are that small, return a bound well above all that can have
 * been lost in place of their sum, so that the tensor does not count as unchanged. */
static double bounded_below(double sum, const char *c, const char *b, size_t n) {
    const double bound = 0x1p-900;
    if (!(sum < bound) || memcmp(c, b, n) == 0) return sum;
    for (size_t i = 0; i < n; i += sizeof(double)) {
        double x, y;
        memcpy(&x, c + i, sizeof x);
        memcpy(&y, b + i, sizeof y);
        if (x != y) return bound;
    }
    return sum;
}

static inline void add_squares(const SumsFunction *functions, int type, uintptr_t c, uintptr_t b, size_t n, double *out) {
    functions[type]((const char *)c, (const char *)b, n, out);
    if (type == FLOAT64) out[0] = bounded_below(out[0], (const char *)c, (const char *)b, n);
}

/* A program may have set some of its threads to flush subnormal numbers to zero (torch.set_flush_denormal). The result
 * must not depend on which. */
static inline uint64_t use_default_float_mode(void) {
    uint64_t mode = 0;
#if defined(__x86_64__)
    mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
#endif
    return mode;
}

static inline void restore_float_mode(uint64_t mode) {
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned int)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#endif
    (void)mode;
}

/* ---- copy ---- */

/* Stores that bypass the cache need not read what they overwrite. Smaller copies will likely be used from the cache. */
#define STREAM_BYTES (64 << 10)

static inline void copy_block(uintptr_t from, uintptr_t to, size_t n) {
    const char *source = (const char *)from;
    char *target = (char *)to;
#ifdef INCCKPT_X86
    if (n >= STREAM_BYTES) {
        size_t head = -to & 63;
        memcpy(target, source, head);
        source += head, target += head, n -= head;
        for (; n >= 64; source += 64, target += 64, n -= 64) {
            __builtin_prefetch(source + PREFETCH_BYTES);
            __m128i a = _mm_loadu_si128((const __m128i *)source), b = _mm_loadu_si128((const __m128i *)(source + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(source + 32)), d = _mm_loadu_si128((const __m128i *)(source + 48));
            _mm_stream_si128((__m128i *)target, a);
            _mm_stream_si128((__m128i *)(target + 16), b);
            _mm_stream_si128((__m128i *)(target + 32), c);
            _mm_stream_si128((__m128i *)(target + 48), d);
        }
        _mm_sfence();
    }
#endif
    memcpy(target, source, n);
}

/* ---- read: the speed of memory, for benchmarks ---- */

static inline uint64_t read_block(uintptr_t a, uintptr_t b, size_t n) {
    const char *x = (const char *)a, *y = (const char *)b;
    uint64_t seen[16] = {0};
    for (size_t i = 0; i + sizeof seen <= n; i += sizeof seen) {
        uint64_t words[2][16];
        __builtin_prefetch(x + i + PREFETCH_BYTES);
        __builtin_prefetch(x + i + PREFETCH_BYTES + 64);
        __builtin_prefetch(y + i + PREFETCH_BYTES);
        __builtin_prefetch(y + i + PREFETCH_BYTES + 64);
        memcpy(words[0], x + i, sizeof seen);
        memcpy(words[1], y + i, sizeof seen);
        for (int k = 0; k < 16; k++) seen[k] |= words[0][k] | words[1][k];
    }
    uint64_t all = 0;
    for (int k = 0; k < 16; k++) all |= seen[k];
    return all;
}

#endif
