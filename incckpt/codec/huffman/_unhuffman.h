/* Decodes what _huffman.h writes: two blocks at a time, in eight parallel streams.
 *
 * A code's length is known only after its lookup, so with one stream the processor mostly waits. zstd decodes the four
 * streams of a block together; this decodes the eight of two blocks. It reads only frames as _huffman.h writes them and
 * refuses all others, damaged or not, which the caller then passes to zstd.
 *
 * Coded bytes are not trusted: nothing outside of them is read, and nothing beyond the requested output is written.
 * References are to RFC 8878, as in _huffman.h.
 */
#ifndef INCCKPT_UNHUFFMAN_H
#define INCCKPT_UNHUFFMAN_H

#include "_huffman.h"

enum { UNHUFFMAN_SIZE = 1 << HUFFMAN_LIMIT, UNHUFFMAN_FIVE = 7 /* the most bytes that five codes take */ };
enum { UNHUFFMAN_STRIDE = HUFFMAN_BLOCK / 4 /* between the streams of a full block */ };

/* Indexed by the next bits, as many as the longest code has. Two arrays need two loads instead of one from pairs, but
 * no shift to take a pair apart, and shifts are what a processor can do the fewest of. */
typedef struct {
    uint8_t lengths[UNHUFFMAN_SIZE];     /* of the code that these bits begin with */
    uint8_t symbols[UNHUFFMAN_SIZE + 8]; /* filled eight at a time */
    unsigned longest;
} unhuffman_table;

typedef struct {
    const uint8_t *first; /* of its bytes; they are read from the last to the first */
    size_t bits;          /* left, below the end mark */
    uint8_t *out, *end;
} unhuffman_stream;

static uint64_t unhuffman_load(const uint8_t *at)
{
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

static unsigned unhuffman_highest(unsigned x) { return 31 - (unsigned)__builtin_clz(x); }

/* Return the `count` (at most 16) bits below bit `end` of `bytes`, padded with zeros below bit 0. */
static unsigned unhuffman_peek(const uint8_t *bytes, size_t end, unsigned count)
{
    const size_t low = end > count ? end - count : 0;
    uint32_t word = 0;
    for (size_t i = low / 8, k = 0; i * 8 < end; i++, k++)
        word |= (uint32_t)bytes[i] << (8 * k);
    word = word >> (low % 8) & ((UINT32_C(1) << (end - low)) - 1);
    return word << (count - (unsigned)(end - low));
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

/* Read FSE-coded weights (4.1, 4.2.1.2) from exactly `n` bytes; return their number, at most 255, or 0. */
static int unhuffman_fse(const uint8_t *bytes, size_t n, uint8_t *weights)
{
    struct {
        uint8_t symbol, bits, next;
    } states[HUFFMAN_STATES];
    int counts[16], symbols = 0, remaining;
    uint8_t next[16];
    size_t at = 4; /* bits */
    const unsigned log = (bytes[0] & 15) + 5;
    const size_t bits = 8 * n;
    if (log > HUFFMAN_LOG)
        return 0;
    for (remaining = (1 << log) + 1; remaining > 1;) {
        /* A number up to `remaining`, of which the smaller ones take one bit less. */
        const unsigned width = unhuffman_highest((unsigned)remaining) + 1;
        const int spare = (1 << width) - 1 - remaining;
        unsigned value = 0;
        if (symbols == 16 || at + width > bits)
            return 0;
        for (unsigned i = 0; i < width; i++)
            value |= (unsigned)(bytes[(at + i) / 8] >> ((at + i) % 8) & 1) << i;
        const int low = (int)(value & ((1u << (width - 1)) - 1));
        int count;
        if (low < spare) {
            count = low;
            at += width - 1;
        } else {
            count = (int)value < 1 << (width - 1) ? (int)value : (int)value - spare;
            at += width;
        }
        count--; /* -1: less than one */
        counts[symbols++] = count;
        remaining -= count < 0 ? 1 : count;
        while (count == 0) { /* followed by the number of further zeros */
            if (at + 2 > bits)
                return 0;
            const int zeros = (bytes[at / 8] >> (at % 8) | (at % 8 == 7 && at / 8 + 1 < n ? bytes[at / 8 + 1] << 1 : 0)) & 3;
            at += 2;
            if (symbols + zeros > 16)
                return 0;
            for (int i = 0; i < zeros; i++)
                counts[symbols++] = 0;
            if (zeros < 3)
                break;
        }
    }
    if (remaining != 1)
        return 0;
    const size_t first = (at + 7) / 8;
    if (first >= n || bytes[n - 1] == 0)
        return 0;

    const int size = 1 << log;
    int high = size - 1, place = 0;
    for (int s = 0; s < symbols; s++) {
        next[s] = (uint8_t)(counts[s] < 0 ? 1 : counts[s]);
        if (counts[s] < 0)
            states[high--].symbol = (uint8_t)s;
    }
    for (int s = 0; s < symbols; s++)
        for (int i = 0; i < counts[s]; i++) {
            states[place].symbol = (uint8_t)s;
            do
                place = (place + (size >> 1) + (size >> 3) + 3) & (size - 1);
            while (place > high);
        }
    for (int i = 0; i < size; i++) {
        const unsigned state = next[states[i].symbol]++;
        states[i].bits = (uint8_t)(log - unhuffman_highest(state));
        states[i].next = (uint8_t)((state << states[i].bits) - (unsigned)size);
    }

    /* Two states alternate; the end is where one needs more bits than are left. */
    size_t left = 8 * (n - first) - 8 + unhuffman_highest(bytes[n - 1]);
    unsigned state[2];
    int count = 0;
    if (left < 2 * log)
        return 0;
    for (int k = 0; k < 2; k++, left -= log)
        state[k] = unhuffman_peek(bytes + first, left, log);
    for (int k = 0;; k ^= 1) {
        if (count >= 254)
            return 0;
        weights[count++] = states[state[k]].symbol;
        if (states[state[k]].bits > left)
            break;
        const unsigned width = states[state[k]].bits;
        state[k] = states[state[k]].next + (width ? unhuffman_peek(bytes + first, left, width) : 0);
        left -= width;
    }
    weights[count] = states[state[(count & 1)]].symbol;
    return left == 0 ? count + 1 : 0;
}

/* Read the description of a code (4.2.1) of at most `n` bytes; return its length, or 0. */
static size_t unhuffman_describe(const uint8_t *bytes, size_t n, unhuffman_table *table)
{
    uint8_t weights[256], sorted[256];
    unsigned starts[HUFFMAN_LIMIT + 2] = {0}, total = 0, longest, place = 0;
    int count;
    size_t size;
    if (n < 2)
        return 0;
    if (bytes[0] < 128) {
        size = 1 + (size_t)bytes[0];
        count = size > n || size < 3 ? 0 : unhuffman_fse(bytes + 1, size - 1, weights);
    } else {
        count = bytes[0] - 127;
        size = 1 + (size_t)(count + 1) / 2;
        if (size > n)
            return 0;
        for (int i = 0; i < count; i++)
            weights[i] = i % 2 ? bytes[1 + i / 2] & 15 : bytes[1 + i / 2] >> 4;
    }
    if (count == 0)
        return 0;
    for (int s = 0; s < count; s++) {
        if (weights[s] > HUFFMAN_LIMIT)
            return 0;
        total += (1u << weights[s]) >> 1;
    }
    /* The last weight completes the total to a power of two. */
    if (total == 0 || (longest = unhuffman_highest(total) + 1) > HUFFMAN_LIMIT)
        return 0;
    const unsigned missing = (1u << longest) - total;
    if (missing & (missing - 1))
        return 0;
    weights[count] = (uint8_t)(unhuffman_highest(missing) + 1);
    table->longest = longest;
    for (int s = 0; s <= count; s++)
        starts[weights[s] + 1]++; /* of one weight, after those of smaller ones */
    if (!starts[2]) /* the longest codes come in pairs; without any, zstd refuses the table */
        return 0;
    for (unsigned w = 1; w <= longest; w++) {
        const unsigned nbytes = starts[w + 1] << (w - 1);
        memset(table->lengths + place, (int)(longest + 1 - w), nbytes);
        place += nbytes;
        starts[w + 1] += starts[w];
    }
    for (int s = 0; s <= count; s++)
        sorted[starts[weights[s]]++] = (uint8_t)s;
    /* In ascending order, so that each symbol overwrites what the one before filled beyond its span. */
    uint8_t *at = table->symbols;
    for (int i = (int)starts[0]; i <= count; i++) {
        const uint64_t eight = sorted[i] * UINT64_C(0x0101010101010101);
        const unsigned span = 1u << (weights[sorted[i]] - 1);
        for (unsigned filled = 0; filled < span; filled += 8)
            memcpy(at + filled, &eight, 8);
        at += span;
    }
    return size;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* Set up the streams of a block of literals (3.1.1.3.1.1) that decodes to n bytes; return whether it is one. */
static int unhuffman_open(const uint8_t *bytes, size_t nbytes, size_t n, uint8_t *out, unhuffman_table *table,
                          unhuffman_stream *streams)
{
    size_t sizes[4], at = 5, left;
    if (nbytes < 5 + 1 || (bytes[0] & 15) != (2 | 3 << 2))
        return 0;
    const uint64_t head = (uint64_t)bytes[0] | (uint64_t)bytes[1] << 8 | (uint64_t)bytes[2] << 16
                          | (uint64_t)bytes[3] << 24 | (uint64_t)bytes[4] << 32;
    const size_t regenerated = head >> 4 & 0x3ffff, size = head >> 22 & 0x3ffff;
    if (regenerated != n || n < HUFFMAN_FEWEST || 5 + size + 1 != nbytes || bytes[nbytes - 1] != 0)
        return 0; /* the last byte is the number of sequences */
    const size_t described = unhuffman_describe(bytes + at, size, table);
    if (!described || size - described < 6 + 4)
        return 0;
    at += described;
    left = size - described - 6;
    for (int k = 0; k < 3; k++, at += 2) {
        sizes[k] = (size_t)bytes[at] | (size_t)bytes[at + 1] << 8;
        if (sizes[k] >= left)
            return 0;
        left -= sizes[k];
    }
    sizes[3] = left;
    for (int k = 0; k < 4; k++) {
        const uint8_t *const first = bytes + at;
        at += sizes[k];
        if (sizes[k] == 0 || bytes[at - 1] == 0)
            return 0;
        const size_t begin = (size_t)k * ((n + 3) / 4), end = k < 3 ? begin + (n + 3) / 4 : n;
        streams[k] = (unhuffman_stream){first, 8 * (sizes[k] - 1) + unhuffman_highest(bytes[at - 1]), out + begin,
                                        out + end};
    }
    return 1;
}

/* Decode the rest of a stream, with bounds checks for each symbol; return whether it ends as it should. */
static int unhuffman_rest(unhuffman_stream *stream, const unhuffman_table *table)
{
    while (stream->out < stream->end) {
        const unsigned next = unhuffman_peek(stream->first, stream->bits, table->longest);
        if (table->lengths[next] > stream->bits)
            return 0;
        stream->bits -= table->lengths[next];
        *stream->out++ = table->symbols[next];
    }
    return stream->bits == 0;
}

/* Decode as much of `count` streams, 4 or 8, four to a table, as is possible without bounds checks.
 *
 * With a stride that the compiler knows, one register serves all of `out`, and leaves the others to the words. */
HUFFMAN_INLINE void unhuffman_fives(unhuffman_stream *streams, const unhuffman_table *tables, const int count,
                                    const size_t stride)
{
    uint64_t words[8]; /* the highest bits are next; the position of the lowest set bit tells how many are used */
    const uint8_t *at[8];
    uint8_t *out[8];
    unsigned shifts[2];
    for (int k = 0; k < count; k++) {
        const size_t end = streams[k].bits;
        if (end < 64)
            return;
        at[k] = streams[k].first + (end + 7) / 8 - 8;
        words[k] = (unhuffman_load(at[k]) | 1) << ((8 - end % 8) % 8);
        out[k] = streams[k].out;
        shifts[k / 4] = 64 - tables[k / 4].longest;
    }
    for (;;) {
        size_t fives = SIZE_MAX;
        for (int k = 0; k < count; k++) {
            const size_t left = (size_t)(at[k] - streams[k].first) / UNHUFFMAN_FIVE;
            const size_t room = (size_t)(streams[k].end - out[k]) / 5;
            fives = left < fives ? left : fives;
            fives = room < fives ? room : fives;
        }
        if (fives == 0)
            break;
        for (size_t done = 0; done < fives; done++) {
#pragma GCC unroll 5
            for (int i = 0; i < 5; i++)
#pragma GCC unroll 8
                for (int k = 0; k < count; k++) {
                    const size_t next = words[k] >> shifts[k / 4];
                    words[k] <<= tables[k / 4].lengths[next] & 63;
                    *(stride ? out[0] + (size_t)k * stride + i : out[k] + i) = tables[k / 4].symbols[next];
                }
#pragma GCC unroll 8
            for (int k = 0; k < count; k++) {
                const unsigned used = (unsigned)__builtin_ctzll(words[k]);
                at[k] -= used >> 3;
                words[k] = (unhuffman_load(at[k]) | 1) << (used & 7);
            }
            for (int k = 0; k < (stride ? 1 : count); k++)
                out[k] += 5;
        }
        for (int k = 1; stride && k < count; k++)
            out[k] = out[0] + (size_t)k * stride;
    }
    for (int k = 0; k < count; k++) {
        streams[k].bits = 8 * (size_t)(at[k] - streams[k].first) + 64 - (size_t)__builtin_ctzll(words[k]);
        streams[k].out = out[k];
    }
}

static int unhuffman_regular(const unhuffman_stream *streams)
{
    for (int k = 1; k < 8; k++)
        if (streams[k].out - streams[0].out != k * UNHUFFMAN_STRIDE)
            return 0;
    return 1;
}

/* Decode the streams of one block or two; return whether they end as they should. */
HUFFMAN_INLINE int unhuffman_blocks_body(unhuffman_stream *streams, const unhuffman_table *tables, int blocks)
{
    if (blocks == 2 && unhuffman_regular(streams))
        unhuffman_fives(streams, tables, 8, UNHUFFMAN_STRIDE);
    else if (blocks == 2)
        unhuffman_fives(streams, tables, 8, 0);
    for (int i = 0; i < blocks; i++)
        unhuffman_fives(streams + 4 * i, tables + i, 4, 0);
    for (int k = 0; k < 4 * blocks; k++)
        if (!unhuffman_rest(&streams[k], &tables[k / 4]))
            return 0;
    return 1;
}

static int unhuffman_blocks(unhuffman_stream *streams, const unhuffman_table *tables, int blocks)
{
    return unhuffman_blocks_body(streams, tables, blocks);
}

#if defined(__x86_64__)
/* BMI2 has shifts by a register that leave the flags alone. */
__attribute__((target("bmi,bmi2"))) static int unhuffman_blocks_bmi2(unhuffman_stream *streams,
                                                                     const unhuffman_table *tables, int blocks)
{
    return unhuffman_blocks_body(streams, tables, blocks);
}
#endif

typedef int (*unhuffman_decoder)(unhuffman_stream *, const unhuffman_table *, int);

/* Decode a zstd frame to exactly n bytes; return whether it is one as huffman_frame writes them. */
static int unhuffman_frame(unhuffman_decoder decoder, const uint8_t *bytes, size_t nbytes, uint8_t *out, size_t n)
{
    enum { RAW, REPEATED, COMPRESSED };
    const uint8_t head[5] = {0x28, 0xb5, 0x2f, 0xfd, 0xa0};
    unhuffman_table tables[2];
    unhuffman_stream streams[8];
    size_t at = 9, done = 0;
    int opened = 0;
    if (nbytes < at || memcmp(bytes, head, sizeof head) != 0)
        return 0;
    if (((size_t)bytes[5] | (size_t)bytes[6] << 8 | (size_t)bytes[7] << 16 | (size_t)bytes[8] << 24) != n)
        return 0;
    for (int last = 0; !last;) {
        if (nbytes - at < 3 || done == n)
            return 0;
        const uint32_t block = (uint32_t)bytes[at] | (uint32_t)bytes[at + 1] << 8 | (uint32_t)bytes[at + 2] << 16;
        const size_t m = n - done < HUFFMAN_BLOCK ? n - done : HUFFMAN_BLOCK, size = block >> 3;
        const size_t stored = (block >> 1 & 3) == REPEATED ? 1 : size;
        at += 3;
        last = block & 1;
        if (nbytes - at < stored)
            return 0;
        switch (block >> 1 & 3) {
        case RAW:
            if (size != m)
                return 0;
            memcpy(out + done, bytes + at, m);
            break;
        case REPEATED:
            if (size != m)
                return 0;
            memset(out + done, bytes[at], m);
            break;
        case COMPRESSED:
            if (size > m) /* the format allows no block longer than its content */
                return 0;
            if (!unhuffman_open(bytes + at, size, m, out + done, &tables[opened], streams + 4 * opened))
                return 0;
            if (++opened == 2) {
                if (!decoder(streams, tables, 2))
                    return 0;
                opened = 0;
            }
            break;
        default: return 0;
        }
        at += stored;
        done += m;
    }
    if (opened && !decoder(streams, tables, 1))
        return 0;
    return done == n && at == nbytes;
}

#endif
