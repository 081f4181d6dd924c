/* SHA-256 of many pieces, two at a time, by the x86 SHA instructions.
 *
 * `sha256rnds2` takes four cycles and a new one can begin every two, but one message's rounds each wait for the round
 * before. So the rounds of two messages alternate, and take little longer than those of one. The functions and their
 * constants are FIPS 180-4's (sections 4.1.2, 4.2.2, 5.1.1, 5.3.3 and 6.2.2); how instructions share a round's work is in
 * Intel's manual under SHA256RNDS2, SHA256MSG1 and SHA256MSG2.
 *
 * Nothing here checks its arguments; _sha256.pyx does.
 */
#ifndef INCCKPT_SHA256_H
#define INCCKPT_SHA256_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const uint8_t *data;
    size_t nbytes;
    uint8_t *digest; /* 32 bytes to write */
} sha256_piece;

#if defined(__x86_64__) && !defined(INCCKPT_GENERIC_ONLY)
#include <cpuid.h>
#include <immintrin.h>

#define SHA256_TARGET __attribute__((target("sha,sse4.1,ssse3")))
#define SHA256_INLINE SHA256_TARGET __attribute__((always_inline)) static inline

enum { SHA256_BLOCK = 64 };

static const uint32_t sha256_constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* A piece being hashed: first the whole blocks of its data, then one or two of `tail`, the rest and the padding. */
typedef struct {
    __m128i abef, cdgh; /* the state as the instructions want it, a and c highest */
    const uint8_t *next;
    size_t blocks;
    size_t tail_blocks; /* 0 once `next` is in the tail */
    uint8_t *digest;
    uint8_t tail[2 * SHA256_BLOCK];
} sha256_lane;

SHA256_TARGET static void sha256_begin(sha256_lane *lane, const sha256_piece *piece)
{
    const size_t rest = piece->nbytes % SHA256_BLOCK;
    const uint64_t bits = (uint64_t)piece->nbytes * 8;
    lane->abef = _mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c);
    lane->cdgh = _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19);
    lane->next = piece->data;
    lane->blocks = piece->nbytes / SHA256_BLOCK;
    lane->tail_blocks = rest + 9 <= SHA256_BLOCK ? 1 : 2;
    lane->digest = piece->digest;
    memset(lane->tail, 0, sizeof lane->tail);
    if (rest)
        memcpy(lane->tail, piece->data + piece->nbytes - rest, rest);
    lane->tail[rest] = 0x80;
    for (size_t i = 0; i < 8; i++)
        lane->tail[lane->tail_blocks * SHA256_BLOCK - 1 - i] = (uint8_t)(bits >> (8 * i));
}

/* Go over to the tail once the data's blocks are done; return whether there was anything more to do. */
static int sha256_goes_on(sha256_lane *lane)
{
    if (lane->blocks == 0) {
        lane->next = lane->tail;
        lane->blocks = lane->tail_blocks;
        lane->tail_blocks = 0;
    }
    return lane->blocks != 0;
}

SHA256_TARGET static void sha256_finish(const sha256_lane *lane)
{
    const __m128i bytes = _mm_set_epi64x(0x0001020304050607, 0x08090a0b0c0d0e0f);
    const __m128i abcd = _mm_unpackhi_epi64(lane->cdgh, lane->abef), efgh = _mm_unpacklo_epi64(lane->cdgh, lane->abef);
    _mm_storeu_si128((__m128i *)lane->digest, _mm_shuffle_epi8(abcd, bytes));
    _mm_storeu_si128((__m128i *)(lane->digest + 16), _mm_shuffle_epi8(efgh, bytes));
}

/* Hash the next `blocks` blocks of each of `count` lanes, 1 or 2. */
SHA256_INLINE void sha256_blocks(sha256_lane *const *lanes, const size_t count, const size_t blocks)
{
    const __m128i words = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203); /* big-endian in memory */
    __m128i abef[2], cdgh[2], w[2][4];
    const uint8_t *next[2];
    for (size_t l = 0; l < count; l++) {
        abef[l] = lanes[l]->abef;
        cdgh[l] = lanes[l]->cdgh;
        next[l] = lanes[l]->next;
    }
    for (size_t block = 0; block < blocks; block++) {
        __m128i abef_before[2], cdgh_before[2];
        for (size_t l = 0; l < count; l++) {
            abef_before[l] = abef[l];
            cdgh_before[l] = cdgh[l];
            for (int i = 0; i < 4; i++)
                w[l][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(next[l] + 16 * i)), words);
            next[l] += SHA256_BLOCK;
        }
/* Rounds 4 I to 4 I + 3: two by each instruction, which returns the new a, b, e, f; the old ones become c, d, g, h. */
#define SHA256_ROUNDS(L, I)                                                                                            \
    if (L < count) {                                                                                                   \
        __m128i sums = _mm_add_epi32(w[L][(I) % 4], _mm_load_si128((const __m128i *)(sha256_constants + 4 * (I))));    \
        cdgh[L] = _mm_sha256rnds2_epu32(cdgh[L], abef[L], sums);                                                       \
        abef[L] = _mm_sha256rnds2_epu32(abef[L], cdgh[L], _mm_shuffle_epi32(sums, 0x0e));                              \
    }
/* The words of rounds 4 I + 16 to 4 I + 19, in place of those of rounds 4 I to 4 I + 3. */
#define SHA256_WORDS(L, I)                                                                                             \
    if (L < count) {                                                                                                   \
        const __m128i seven_before = _mm_alignr_epi8(w[L][((I) + 3) % 4], w[L][((I) + 2) % 4], 4);                     \
        const __m128i sums = _mm_add_epi32(_mm_sha256msg1_epu32(w[L][(I) % 4], w[L][((I) + 1) % 4]), seven_before);    \
        w[L][(I) % 4] = _mm_sha256msg2_epu32(sums, w[L][((I) + 3) % 4]);                                               \
    }
#define SHA256_LAST(I) SHA256_ROUNDS(0, I) SHA256_ROUNDS(1, I)
#define SHA256_EARLIER(I) SHA256_LAST(I) SHA256_WORDS(0, I) SHA256_WORDS(1, I)
        SHA256_EARLIER(0) SHA256_EARLIER(1) SHA256_EARLIER(2) SHA256_EARLIER(3)
        SHA256_EARLIER(4) SHA256_EARLIER(5) SHA256_EARLIER(6) SHA256_EARLIER(7)
        SHA256_EARLIER(8) SHA256_EARLIER(9) SHA256_EARLIER(10) SHA256_EARLIER(11)
        SHA256_LAST(12) SHA256_LAST(13) SHA256_LAST(14) SHA256_LAST(15)
#undef SHA256_ROUNDS
#undef SHA256_WORDS
#undef SHA256_LAST
#undef SHA256_EARLIER
        for (size_t l = 0; l < count; l++) {
            abef[l] = _mm_add_epi32(abef[l], abef_before[l]);
            cdgh[l] = _mm_add_epi32(cdgh[l], cdgh_before[l]);
        }
    }
    for (size_t l = 0; l < count; l++) {
        lanes[l]->abef = abef[l];
        lanes[l]->cdgh = cdgh[l];
        lanes[l]->next = next[l];
        lanes[l]->blocks -= blocks;
    }
}

SHA256_TARGET static void sha256_one(sha256_lane *lane)
{
    sha256_blocks(&lane, 1, lane->blocks);
}

SHA256_TARGET static void sha256_two(sha256_lane *one, sha256_lane *other)
{
    sha256_lane *const lanes[2] = {one, other};
    sha256_blocks(lanes, 2, one->blocks < other->blocks ? one->blocks : other->blocks);
}

/* Write the digests of all pieces. A lane that has finished a piece takes the next one, whatever the other lane does. */
static void sha256_pairs(const sha256_piece *pieces, size_t count)
{
    sha256_lane lanes[2];
    size_t taken = 0;
    int busy[2];
    for (size_t l = 0; l < 2; l++) {
        busy[l] = taken < count;
        if (busy[l])
            sha256_begin(&lanes[l], &pieces[taken++]);
    }
    while (busy[0] || busy[1]) {
        for (size_t l = 0; l < 2; l++)
            while (busy[l] && !sha256_goes_on(&lanes[l])) {
                sha256_finish(&lanes[l]);
                busy[l] = taken < count;
                if (busy[l])
                    sha256_begin(&lanes[l], &pieces[taken++]);
            }
        if (busy[0] && busy[1])
            sha256_two(&lanes[0], &lanes[1]);
        else if (busy[0] || busy[1])
            sha256_one(&lanes[busy[0] ? 0 : 1]);
    }
}

/* Return whether this processor has the instructions; the operating system need do nothing for them. */
static int sha256_paired(void)
{
    unsigned int a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 29 & 1)) /* SHA */
        return 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 9 & 1) && (c >> 19 & 1); /* SSSE3, SSE4.1 */
}
#else
static void sha256_pairs(const sha256_piece *pieces, size_t count) { (void)pieces, (void)count; }
static int sha256_paired(void) { return 0; }
#endif

#endif
