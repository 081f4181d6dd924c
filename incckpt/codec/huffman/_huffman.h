/* Codes bytes as a zstd frame (RFC 8878) that contains only Huffman-coded literals.
 *
 * Byte planes of floating-point numbers have a skewed distribution, but no useful matches. zstd itself cannot be told
 * not to look for any: it finds short ones by chance, which take twice the time and save nothing. Any zstd decoder
 * reads the frames written here.
 *
 * Huffman codes: section 4.2 of the RFC; their table: 4.2.1; its coding by FSE: 4.1 and 4.2.1.2; literals: 3.1.1.3.1.
 */
#ifndef INCCKPT_HUFFMAN_H
#define INCCKPT_HUFFMAN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define HUFFMAN_INLINE static inline __attribute__((always_inline))

enum {
    HUFFMAN_BLOCK = 1 << 16, /* bytes with a table of their own; with two symbols or more, counts fit 16 bits */
    HUFFMAN_FEWEST = 64,     /* bytes that repay a table */
    HUFFMAN_LIMIT = 11,      /* bits of the longest code that the format allows */
    HUFFMAN_LOG = 6,         /* accuracy of the table's FSE code, the most that the format allows */
    HUFFMAN_STATES = 1 << HUFFMAN_LOG,
    HUFFMAN_DESCRIPTION = 128 /* bytes of the longest table */
};

/* ---- bits, written from the lowest on ---------------------------------------------------------------------------- */

typedef struct {
    uint64_t bits;
    unsigned count;
    uint8_t *at, *end;
} huffman_bits;

static void huffman_put(huffman_bits *stream, unsigned value, unsigned count)
{
    stream->bits |= (uint64_t)value << stream->count;
    stream->count += count;
    for (; stream->count >= 8 && stream->at < stream->end; stream->count -= 8, stream->bits >>= 8)
        *stream->at++ = (uint8_t)stream->bits;
}

/* ---- the code: lengths from counts, codes from lengths ----------------------------------------------------------- */

/* Sort the symbols with nonzero counts (below 2^16) by count, in two passes of radix sort; return their number. */
static unsigned huffman_sort(const uint32_t *counts, uint8_t *symbols)
{
    uint8_t other[256];
    uint16_t starts[2][257];
    unsigned m = 0;
    memset(starts, 0, sizeof starts);
    for (unsigned s = 0; s < 256; s++)
        if (counts[s]) {
            other[m++] = (uint8_t)s;
            starts[0][(counts[s] & 255) + 1]++;
            starts[1][(counts[s] >> 8) + 1]++;
        }
    for (unsigned i = 1; i < 256; i++) {
        starts[0][i] = (uint16_t)(starts[0][i] + starts[0][i - 1]);
        starts[1][i] = (uint16_t)(starts[1][i] + starts[1][i - 1]);
    }
    uint8_t pass[256];
    for (unsigned i = 0; i < m; i++)
        pass[starts[0][counts[other[i]] & 255]++] = other[i];
    for (unsigned i = 0; i < m; i++)
        symbols[starts[1][counts[pass[i]] >> 8]++] = pass[i];
    return m;
}

/* Replace m >= 2 ascending weights by the depths of their leaves in the Huffman tree: Moffat and Katajainen, "In-place
 * calculation of minimum-redundancy codes", 1995. */
static void huffman_depths(uint32_t *weights, int m)
{
    int root = 0, leaf = 2, next;
    weights[0] += weights[1];
    for (next = 1; next < m - 1; next++) {
        if (leaf >= m || weights[root] < weights[leaf]) {
            weights[next] = weights[root];
            weights[root++] = (uint32_t)next;
        } else
            weights[next] = weights[leaf++];
        if (leaf >= m || (root < next && weights[root] < weights[leaf])) {
            weights[next] += weights[root];
            weights[root++] = (uint32_t)next;
        } else
            weights[next] += weights[leaf++];
    }
    weights[m - 2] = 0;
    for (next = m - 3; next >= 0; next--)
        weights[next] = weights[weights[next]] + 1;
    int available = 1, used = 0, depth = 0;
    root = m - 2;
    next = m - 1;
    while (available > 0) {
        while (root >= 0 && (int)weights[root] == depth) {
            used++;
            root--;
        }
        while (available > used) {
            weights[next--] = (uint32_t)depth;
            available--;
        }
        available = 2 * used;
        depth++;
        used = 0;
    }
}

/* Shorten codes to HUFFMAN_LIMIT, which lengthens others. `lengths` descends, as the symbols' counts ascend. Return
 * whether the result is a complete code. */
static int huffman_limit(uint32_t *lengths, int m)
{
    int excess = -(1 << HUFFMAN_LIMIT); /* of the Kraft sum over 1, in units of 2^-HUFFMAN_LIMIT */
    for (int i = 0; i < m; i++) {
        if (lengths[i] > HUFFMAN_LIMIT)
            lengths[i] = HUFFMAN_LIMIT;
        excess += 1 << (HUFFMAN_LIMIT - lengths[i]);
    }
    /* Lengthen the codes of the rarest symbols. What this leaves over shortens the commonest codes that it allows. */
    for (int i = 0; excess > 0 && i < m;) {
        if (lengths[i] == HUFFMAN_LIMIT)
            i++;
        else {
            lengths[i]++;
            excess -= 1 << (HUFFMAN_LIMIT - lengths[i]);
        }
    }
    for (int i = m - 1; excess < 0 && i >= 0;) {
        const int gain = 1 << (HUFFMAN_LIMIT - lengths[i]);
        if (lengths[i] > 1 && gain <= -excess) {
            lengths[i]--;
            excess += gain;
        } else
            i--;
    }
    return excess == 0;
}

/* ---- the table, as stored ---------------------------------------------------------------------------------------- */

/* Code n weights of at most `most` with FSE and two alternating states. Return the bytes written, or 0 without room. */
static size_t huffman_fse(const uint8_t *weights, int n, int most, uint8_t *out, size_t room)
{
    unsigned counts[HUFFMAN_LIMIT + 1] = {0}, shares[HUFFMAN_LIMIT + 1], starts[HUFFMAN_LIMIT + 1];
    unsigned rest = HUFFMAN_STATES;
    uint8_t states[HUFFMAN_STATES], spread[HUFFMAN_STATES];
    huffman_bits stream = {0, 0, out, out + room};
    int largest = 0;
    for (int i = 0; i < n; i++)
        counts[weights[i]]++;
    /* Every weight gets one state, so that there are no gaps to describe, and its share of the others. */
    for (int w = 0; w <= most; w++) {
        shares[w] = 1 + counts[w] * (unsigned)(HUFFMAN_STATES - most - 1) / (unsigned)n;
        rest -= shares[w];
        if (counts[w] > counts[largest])
            largest = w;
    }
    shares[largest] += rest;

    huffman_put(&stream, HUFFMAN_LOG - 5, 4);
    unsigned remaining = HUFFMAN_STATES + 1, threshold = HUFFMAN_STATES, width = HUFFMAN_LOG + 1;
    for (int w = 0; w <= most; w++) {
        const unsigned spare = 2 * threshold - 1 - remaining;
        unsigned value = shares[w] + 1;
        remaining -= shares[w];
        if (value >= threshold)
            value += spare;
        huffman_put(&stream, value, width - (value < spare));
        while (remaining < threshold) {
            width--;
            threshold >>= 1;
        }
    }
    if (stream.count)
        huffman_put(&stream, 0, 8 - stream.count);

    for (unsigned w = 0, at = 0; (int)w <= most; w++)
        for (unsigned i = 0; i < shares[w]; i++) {
            spread[at] = (uint8_t)w;
            at = (at + (HUFFMAN_STATES >> 1) + (HUFFMAN_STATES >> 3) + 3) & (HUFFMAN_STATES - 1);
        }
    for (int w = 0, start = 0; w <= most; w++) {
        starts[w] = (unsigned)start;
        start += (int)shares[w];
    }
    unsigned filled[HUFFMAN_LIMIT + 1] = {0};
    for (unsigned i = 0; i < HUFFMAN_STATES; i++)
        states[starts[spread[i]] + filled[spread[i]]++] = (uint8_t)i;

    /* From the last weight to the first. Leaving a weight's first state takes the most bits, so a decoder that finds
     * none left knows that it is done. */
    unsigned state[2];
    for (int i = n - 1; i >= 0; i--) {
        const unsigned w = weights[i];
        unsigned *turn = &state[i & 1], out_bits = 0;
        if (i >= n - 2) {
            *turn = HUFFMAN_STATES + states[starts[w]];
            continue;
        }
        while (*turn >> out_bits >= 2 * shares[w])
            out_bits++;
        huffman_put(&stream, *turn & ((1u << out_bits) - 1), out_bits);
        *turn = HUFFMAN_STATES + states[starts[w] + (*turn >> out_bits) - shares[w]];
    }
    huffman_put(&stream, state[1] - HUFFMAN_STATES, HUFFMAN_LOG);
    huffman_put(&stream, state[0] - HUFFMAN_STATES, HUFFMAN_LOG);
    huffman_put(&stream, 1, 1);
    if (stream.count)
        huffman_put(&stream, 0, 8 - stream.count);
    return stream.count ? 0 : (size_t)(stream.at - out);
}

/* Describe a code with the last symbol `last` in at most HUFFMAN_DESCRIPTION bytes; return their number, or 0. */
static size_t huffman_describe(const uint8_t *weights, int last, int most, uint8_t *out)
{
    const size_t size = last > 1 ? huffman_fse(weights, last, most, out + 1, HUFFMAN_DESCRIPTION - 1) : 0;
    if (size && (last > 128 || size < (size_t)(last + 1) / 2)) {
        out[0] = (uint8_t)size;
        return 1 + size;
    }
    if (last > 128)
        return 0;
    out[0] = (uint8_t)(127 + last);
    for (int i = 0; i < last; i += 2)
        out[1 + i / 2] = (uint8_t)(weights[i] << 4 | (i + 1 < last ? weights[i + 1] : 0));
    return 1 + (size_t)(last + 1) / 2;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* One of a block's four streams. The codes not yet written are the highest `count` bits, the latest on top. */
typedef struct {
    uint64_t bits;
    unsigned count;
    const uint8_t *first, *next; /* bytes to code, from the last to the first */
    uint8_t *at, *end;           /* room for exactly their codes */
} huffman_stream;

/* An entry of the table has a code in its highest bits and the code's length in its lowest 6. */
HUFFMAN_INLINE void huffman_add(huffman_stream *stream, uint64_t entry, uint64_t mask)
{
    stream->bits = (stream->bits >> (entry & 63)) | (entry & mask);
    stream->count += (unsigned)entry & 63;
}

HUFFMAN_INLINE void huffman_five(huffman_stream *stream, const uint64_t *table)
{
    stream->next -= 5;
    /* The lengths get in below the codes. That is harmless up to 60 bits of codes; before the last there are 7 + 44. */
    huffman_add(stream, table[stream->next[4]], UINT64_MAX);
    huffman_add(stream, table[stream->next[3]], UINT64_MAX);
    huffman_add(stream, table[stream->next[2]], UINT64_MAX);
    huffman_add(stream, table[stream->next[1]], UINT64_MAX);
    huffman_add(stream, table[stream->next[0]], ~UINT64_C(63));
    const uint64_t word = stream->bits >> (64 - stream->count);
    memcpy(stream->at, &word, 8);
    stream->at += stream->count >> 3;
    stream->count &= 7;
}

HUFFMAN_INLINE void huffman_rest(huffman_stream *stream, const uint64_t *table)
{
    while (stream->next > stream->first) {
        huffman_add(stream, table[*--stream->next], UINT64_MAX);
        for (; stream->count >= 8; stream->count -= 8)
            *stream->at++ = (uint8_t)(stream->bits >> (64 - stream->count));
    }
    *stream->at = (uint8_t)((stream->bits >> 1 | UINT64_C(1) << 63) >> (63 - stream->count)); /* the end mark */
}

/* How many times five bytes can be coded without bounds checks: five codes take at most 7 bytes, and 8 are written. */
HUFFMAN_INLINE size_t huffman_fives(const huffman_stream *stream)
{
    const size_t left = (size_t)(stream->next - stream->first) / 5, room = (size_t)(stream->end - stream->at);
    const size_t fit = room < 8 ? 0 : (room - 1) / 7;
    return left < fit ? left : fit;
}

HUFFMAN_INLINE void huffman_streams_body(huffman_stream *streams, const uint64_t *table)
{
    huffman_stream a = streams[0], b = streams[1], c = streams[2], d = streams[3];
    for (;;) {
        size_t fives = huffman_fives(&a);
        fives = huffman_fives(&b) < fives ? huffman_fives(&b) : fives;
        fives = huffman_fives(&c) < fives ? huffman_fives(&c) : fives;
        fives = huffman_fives(&d) < fives ? huffman_fives(&d) : fives;
        if (fives == 0)
            break;
        for (; fives; fives--) {
            huffman_five(&a, table);
            huffman_five(&b, table);
            huffman_five(&c, table);
            huffman_five(&d, table);
        }
    }
    huffman_rest(&a, table);
    huffman_rest(&b, table);
    huffman_rest(&c, table);
    huffman_rest(&d, table);
}

static void huffman_streams(huffman_stream *streams, const uint64_t *table) { huffman_streams_body(streams, table); }

#if defined(__x86_64__)
/* BMI2 has shifts by a register that leave the flags alone. */
__attribute__((target("bmi2"))) static void huffman_streams_bmi2(huffman_stream *streams, const uint64_t *table)
{
    huffman_streams_body(streams, table);
}
#endif

typedef void (*huffman_coder)(huffman_stream *, const uint64_t *);

/* Write a block of compressed literals, without its head, for bytes with at least two distinct values. Return its size,
 * or 0 if that is not less than n. */
static size_t huffman_block(huffman_coder coder, const uint8_t *bytes, size_t n, uint8_t *out)
{
    uint32_t counts[4][256], total[256], lengths[256];
    uint8_t symbols[256], weights[256], description[HUFFMAN_DESCRIPTION];
    uint64_t table[256];
    const size_t quarter = (n + 3) / 4, sizes[4] = {quarter, quarter, quarter, n - 3 * quarter};
    const uint8_t *const quarters[4] = {bytes, bytes + quarter, bytes + 2 * quarter, bytes + 3 * quarter};
    memset(counts, 0, sizeof counts);
    for (size_t i = 0; i < sizes[3]; i++)
        for (int k = 0; k < 4; k++)
            counts[k][quarters[k][i]]++;
    for (int k = 0; k < 3; k++)
        for (size_t i = sizes[3]; i < quarter; i++)
            counts[k][quarters[k][i]]++;
    for (int s = 0; s < 256; s++)
        total[s] = counts[0][s] + counts[1][s] + counts[2][s] + counts[3][s];

    const int m = (int)huffman_sort(total, symbols);
    for (int i = 0; i < m; i++)
        lengths[i] = total[symbols[i]];
    huffman_depths(lengths, m);
    if (!huffman_limit(lengths, m))
        return 0;
    unsigned longest = lengths[0], code = 0;
    for (int i = 0; i < m; i++)
        longest = lengths[i] > longest ? lengths[i] : longest;
    memset(weights, 0, sizeof weights);
    for (int i = 0; i < m; i++)
        weights[symbols[i]] = (uint8_t)(longest + 1 - lengths[i]);
    int last = 255, most = 0;
    while (!weights[last])
        last--;
    for (int s = 0; s <= last; s++)
        most = weights[s] > most ? weights[s] : most;
    for (int w = 1; w <= most; w++) {
        const unsigned length = longest + 1 - (unsigned)w;
        for (int s = 0; s <= last; s++)
            if (weights[s] == w)
                table[s] = (uint64_t)code++ << (64 - length) | length;
        code >>= 1;
    }
    const size_t described = huffman_describe(weights, last, most, description);
    size_t coded[4], size = described + 6;
    for (int k = 0; k < 4; k++) {
        size_t used = 1;
        for (int i = 0; i < m; i++)
            used += counts[k][symbols[i]] * (table[symbols[i]] & 63);
        coded[k] = (used + 7) / 8;
        size += coded[k];
    }
    if (!described || size + 6 >= n)
        return 0;

    /* Literals: compressed, four streams, sizes of 18 bits. Sequences: none. */
    const uint64_t head = 2 | 3 << 2 | (uint64_t)n << 4 | (uint64_t)size << 22;
    for (int i = 0; i < 5; i++)
        *out++ = (uint8_t)(head >> (8 * i));
    memcpy(out, description, described);
    out += described;
    for (int k = 0; k < 3; k++) {
        *out++ = (uint8_t)coded[k];
        *out++ = (uint8_t)(coded[k] >> 8);
    }
    huffman_stream streams[4];
    for (int k = 0; k < 4; k++) {
        streams[k] = (huffman_stream){0, 0, quarters[k], quarters[k] + sizes[k], out, out + coded[k]};
        out += coded[k];
    }
    coder(streams, table);
    *out = 0;
    return 5 + size + 1;
}

/* Write 0 < n < 2^31 bytes as a zstd frame; return its size, or 0 if it exceeds `room`. */
static size_t huffman_frame(huffman_coder coder, const uint8_t *bytes, size_t n, uint8_t *out, size_t room)
{
    enum { RAW, REPEATED, COMPRESSED };
    uint8_t block[HUFFMAN_BLOCK];
    /* Magic; a single segment, content size in 4 bytes. */
    const uint8_t head[9] = {0x28, 0xb5, 0x2f, 0xfd, 0xa0, (uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16),
                             (uint8_t)(n >> 24)};
    size_t at = sizeof head;
    if (room < at)
        return 0;
    memcpy(out, head, at);
    for (size_t start = 0; start < n; start += HUFFMAN_BLOCK) {
        const size_t m = n - start < HUFFMAN_BLOCK ? n - start : HUFFMAN_BLOCK;
        const uint8_t *content = bytes + start;
        uint32_t type = RAW, size = (uint32_t)m, stored = (uint32_t)m;
        if (memcmp(content, content + 1, m - 1) == 0) {
            type = REPEATED;
            stored = 1;
        } else if (m >= HUFFMAN_FEWEST) {
            const size_t coded = huffman_block(coder, content, m, block);
            if (coded) {
                type = COMPRESSED;
                size = stored = (uint32_t)coded;
                content = block;
            }
        }
        if (room - at < 3 + (size_t)stored)
            return 0;
        const uint32_t block_head = (start + m == n) | type << 1 | size << 3;
        for (int i = 0; i < 3; i++)
            out[at++] = (uint8_t)(block_head >> (8 * i));
        memcpy(out + at, content, stored);
        at += stored;
    }
    return at;
}

#endif
