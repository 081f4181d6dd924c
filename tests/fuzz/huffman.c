/* Fuzz target: the hand-written Huffman coder against libzstd (`make fuzz-coder`).
 *
 * What has to hold, whatever the input:
 *   - What the encoder writes, libzstd and the decoder read back to exactly the content. It takes no more than the room it
 *     was given, and the room it needs is enough. All variants (instruction sets) write the same bytes.
 *   - The decoder reads and writes within bounds: every buffer is allocated at its exact size, under AddressSanitizer.
 *   - A frame that the decoder accepts, libzstd decodes to the same bytes.
 *
 * The first byte of an input chooses how the rest is used. Contents are described by short scripts, so that the fuzzer
 * reaches blocks of 64 KiB with inputs of a few bytes. Frames are made valid first, with the encoder's codes or any others,
 * and damaged then, or assembled around fuzzed tables and streams, so that it does not have to guess magic and sizes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zstd.h>

#include "_planes.h"

enum { MOST_CONTENT = 3 * HUFFMAN_BLOCK + 1000 };
enum { CONTENT, PLAIN_CONTENT, DAMAGED, ASSEMBLED, PLAIN_FRAME, OTHER_CODES, MODES };

#define CHECK(condition)                                                                                               \
    do                                                                                                                 \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: this does not hold: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                                                   \
        }                                                                                                              \
    while (0)

/* ---- reading the input ------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *at, *end;
} script;

static unsigned take(script *input) { return input->at < input->end ? *input->at++ : 0; }

static unsigned take_two(script *input)
{
    const unsigned low = take(input);
    return low | take(input) << 8;
}

static uint32_t randomly(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

/* An allocation of its own, whose ends AddressSanitizer watches; of no bytes too. */
static uint8_t *exactly(size_t n)
{
    uint8_t *const memory = malloc(n);
    CHECK(memory || !n);
    return memory;
}

static uint8_t *copy_of(const uint8_t *bytes, size_t n)
{
    uint8_t *const copy = exactly(n);
    if (n)
        memcpy(copy, bytes, n);
    return copy;
}

/* Run a script that describes content, up to its end mark or the input's end; return its bytes, at least one. */
static uint8_t *describe(script *input, size_t *n)
{
    enum { END, LITERAL, RUN, SKEWED, UNIFORM, AGAIN, OPERATIONS };
    uint8_t *const out = exactly(MOST_CONTENT), *content;
    size_t at = 0;
    unsigned operation;
    while (input->at < input->end && at < MOST_CONTENT && (operation = take(input) % OPERATIONS) != END) {
        const unsigned shift = take(input) & 15; /* short ones as often as long ones */
        size_t length = (operation == LITERAL ? take(input) : take_two(input) >> shift) + 1;
        length = length < MOST_CONTENT - at ? length : MOST_CONTENT - at;
        const unsigned first = take(input), parameter = operation >= SKEWED ? take(input) : 0;
        uint32_t state = 0x9e3779b9u ^ first << 8 ^ parameter;
        for (size_t i = 0; i < length; i++, at++)
            switch (operation) {
            case LITERAL: out[at] = (uint8_t)take(input); break;
            case RUN: out[at] = (uint8_t)first; break;
            /* Each next symbol is half as common, or less uneven: codes up to and beyond the longest that is allowed. */
            case SKEWED: {
                const uint32_t bits = randomly(&state);
                const unsigned step = (unsigned)__builtin_ctz(bits | UINT32_C(1) << 24) << (parameter & 3);
                out[at] = (uint8_t)(first + step + (bits >> 25 & ((1u << (parameter & 3)) - 1)));
                break;
            }
            case UNIFORM: out[at] = (uint8_t)(first + randomly(&state) % (parameter + 1)); break;
            case AGAIN: out[at] = at ? out[(first << 8 | parameter) % at] : 0; break;
            }
    }
    if (at == 0)
        out[at++] = (uint8_t)take(input);
    content = copy_of(out, at);
    free(out);
    *n = at;
    return content;
}

/* ---- what is checked --------------------------------------------------------------------------------------------- */

/* Variants that this processor runs; neighbours that share their coder count once. */
static int next_variant(int variant)
{
    for (variant++; variant < planes_usable(); variant++)
        if (planes_variants[variant].coder != planes_variants[variant - 1].coder
            || planes_variants[variant].decoder != planes_variants[variant - 1].decoder)
            break;
    return variant;
}

/* Encode `n` bytes; return the frame, of `size` bytes. */
static uint8_t *encoded(const uint8_t *content, size_t n, huffman_coder coder, size_t *size)
{
    const size_t most = 9 + n + 3 * (n / HUFFMAN_BLOCK + 1);
    uint8_t *const ample = exactly(most);
    *size = huffman_frame(coder, content, n, ample, most);
    CHECK(*size > 9 && *size <= most);
    uint8_t *const frame = copy_of(ample, *size);
    free(ample);
    return frame;
}

/* Whether the room that a frame needs is enough, and a byte less is not. */
static void fit(const uint8_t *content, size_t n, huffman_coder coder, const uint8_t *frame, size_t size)
{
    uint8_t *const exact = exactly(size), *const less = exactly(size - 1);
    CHECK(huffman_frame(coder, content, n, exact, size) == size);
    CHECK(memcmp(frame, exact, size) == 0);
    CHECK(huffman_frame(coder, content, n, less, size - 1) == 0);
    CHECK(huffman_frame(coder, content, n, less, size < 8 ? size : 8) == 0);
    free(exact);
    free(less);
}

/* Decode with every variant; where one accepts, all have to and libzstd has to agree. Returns whether they accept. */
static int decode(const uint8_t *frame, size_t nbytes, size_t n)
{
    uint8_t *const expected = exactly(n);
    const size_t answer = ZSTD_decompress(expected, n, frame, nbytes);
    int accepted = 0;
    for (int variant = 0; variant < planes_usable(); variant = next_variant(variant)) {
        uint8_t *const out = exactly(n);
        const int accepts = unhuffman_frame(planes_variants[variant].decoder, frame, nbytes, out, n);
        CHECK(variant == 0 || accepts == accepted);
        accepted = accepts;
        if (accepts) {
            CHECK(!ZSTD_isError(answer));
            CHECK(answer == n);
            CHECK(n == 0 || memcmp(out, expected, n) == 0);
        }
        free(out);
    }
    free(expected);
    return accepted;
}

static void round_trip(const uint8_t *content, size_t n)
{
    size_t size;
    uint8_t *const frame = encoded(content, n, planes_variants[0].coder, &size), *const out = exactly(n);
    CHECK(ZSTD_decompress(out, n, frame, size) == n);
    CHECK(memcmp(out, content, n) == 0);
    CHECK(decode(frame, size, n));
    for (int variant = 0; variant < planes_usable(); variant = next_variant(variant))
        fit(content, n, planes_variants[variant].coder, frame, size);
    free(frame);
    free(out);
}

/* Edit a frame of `size` bytes as the input says, and decode it. */
static void damage(const uint8_t *valid, size_t size, size_t n, script *input)
{
    enum { SET, FLIP, INSERT, CUT, TRUNCATE, CONTENT_SIZE, EDITS };
    uint8_t *const frame = exactly(size + 64);
    memcpy(frame, valid, size);
    for (int edits = 0; edits < 64 && input->at < input->end; edits++) {
        const unsigned edit = take(input) % EDITS;
        size_t at = take(input);
        if (at >= 128) /* anywhere, else among the first bytes */
            at = ((at & 127) << 16 | take_two(input));
        const unsigned value = take(input);
        at %= size + 1;
        switch (edit) {
        case SET:
            if (at < size)
                frame[at] = (uint8_t)value;
            break;
        case FLIP:
            if (at < size)
                frame[at] ^= (uint8_t)(1u << (value & 7));
            break;
        case INSERT:
            memmove(frame + at + 1, frame + at, size - at);
            frame[at] = (uint8_t)value;
            size++;
            break;
        case CUT:
            if (at < size) {
                memmove(frame + at, frame + at + 1, size - at - 1);
                size--;
            }
            break;
        case TRUNCATE: size = at; break;
        case CONTENT_SIZE:
            n = (n + value - 128) % MOST_CONTENT;
            for (int i = 0; size >= 9 && i < 4; i++)
                frame[5 + i] = (uint8_t)(n >> (8 * i));
            break;
        }
    }
    uint8_t *const exact = copy_of(frame, size);
    free(frame);
    decode(exact, size, n);
    free(exact);
}

/* ---- frames that the encoder does not write ---------------------------------------------------------------------- */

typedef struct {
    uint8_t *bytes;
    size_t at, n; /* bytes written, and how many they decode to */
} frame_builder;

enum { MOST_FRAME = 1 << 19 };

static void little_endian(uint8_t *at, uint64_t value, int nbytes)
{
    for (int i = 0; i < nbytes; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

static frame_builder begin_frame(void)
{
    const uint8_t magic[5] = {0x28, 0xb5, 0x2f, 0xfd, 0xa0};
    frame_builder frame = {exactly(MOST_FRAME), 9, 0};
    memcpy(frame.bytes, magic, sizeof magic);
    return frame;
}

/* Head of a block that decodes to m bytes, whose table begins at `table` and whose streams end where the frame does. */
static void end_block(frame_builder *frame, size_t table, size_t m, int last)
{
    const size_t coded = frame->at - table;
    frame->bytes[frame->at++] = 0; /* sequences */
    little_endian(frame->bytes + table - 5, 2 | 3 << 2 | (uint64_t)m << 4 | (uint64_t)coded << 22, 5);
    little_endian(frame->bytes + table - 8, (uint64_t)last | 2 << 1 | (uint64_t)(coded + 6) << 3, 3);
    frame->n += m;
    little_endian(frame->bytes + 5, frame->n, 4);
}

/* How many bytes a block is to hold: all but the last are full. */
static size_t block_of(script *input, int last)
{
    return last ? HUFFMAN_FEWEST + take_two(input) % (HUFFMAN_BLOCK - HUFFMAN_FEWEST + 1) : HUFFMAN_BLOCK;
}

/* A frame with right sizes everywhere, around tables and streams that are the fuzzer's. */
static void assemble(script *input)
{
    frame_builder frame = begin_frame();
    for (unsigned left = 1 + take(input) % 3; left--;) {
        const size_t m = block_of(input, left == 0), table = frame.at + 8, described = take(input);
        size_t sizes[4];
        for (int k = 0; k < 4; k++)
            sizes[k] = take(input) << (take(input) & 7);
        frame.at = table;
        for (size_t i = 0; i < described; i++)
            frame.bytes[frame.at++] = (uint8_t)take(input);
        for (int k = 0; k < 3; k++, frame.at += 2)
            little_endian(frame.bytes + frame.at, sizes[k] & 0xffff, 2);
        for (int k = 0; k < 4; k++) {
            uint32_t state = 1 + take(input);
            const unsigned given = take(input);
            for (size_t i = 0; i < sizes[k]; i++)
                frame.bytes[frame.at++] = (uint8_t)(i + given >= sizes[k] ? take(input) : randomly(&state));
        }
        end_block(&frame, table, m, left == 0);
    }
    uint8_t *const exact = copy_of(frame.bytes, frame.at);
    free(frame.bytes);
    decode(exact, frame.at, frame.n);
    free(exact);
}

/* Choose a complete code: return its last symbol, and each symbol's weight and entry in the coder's table. */
static int choose_code(script *input, uint8_t *weights, uint64_t *table, int *most)
{
    const int given = 1 + (int)take(input) % 200;
    unsigned total = 0, longest = 1, code = 0;
    int last = 0;
    memset(weights, 0, 256);
    for (int s = 0; s < given; s++) {
        const unsigned weight = take(input) % (HUFFMAN_LIMIT + 1);
        if (total + ((1u << weight) >> 1) < 1u << HUFFMAN_LIMIT) {
            weights[s] = (uint8_t)weight;
            total += (1u << weight) >> 1;
        }
    }
    if (total == 0)
        total = weights[0] = 1;
    while (1u << longest <= total)
        longest++;
    /* What is missing to a power of two goes to further symbols; the last of them is not described but follows. */
    for (unsigned weight = 1, missing = (1u << longest) - total; missing; weight++, missing >>= 1)
        if (missing & 1)
            weights[given + last++] = (uint8_t)weight;
    last += given - 1;
    *most = 0;
    for (int s = 0; s <= last; s++)
        *most = weights[s] > *most ? weights[s] : *most;
    for (unsigned weight = 1; weight <= longest; weight++, code >>= 1)
        for (int s = 0; s <= last; s++)
            if (weights[s] == weight)
                table[s] = (uint64_t)code++ << (64 - (longest + 1 - weight)) | (longest + 1 - weight);
    return last;
}

/* A frame whose codes are the fuzzer's, good for its content or not; then damage to it. Its last block may hold other
 * than the number of bytes that it promises, so that streams go on after the end or end before. */
static void other_codes(script *input)
{
    frame_builder frame = begin_frame();
    uint8_t *const content = exactly(MOST_CONTENT);
    int valid = 1, complete = 1;
    for (unsigned left = 1 + take(input) % 3; left--;) {
        const size_t m = block_of(input, left == 0), start = frame.at + 8, quarter = (m + 3) / 4;
        uint8_t weights[256], present[256], *const bytes = content + frame.n;
        uint64_t table[256];
        int most, symbols = 0;
        const int last = choose_code(input, weights, table, &most);
        uint32_t state = 1 + take(input);
        const unsigned narrow = take(input);
        for (int s = last; s >= 0; s--)
            if (weights[s])
                present[symbols++] = (uint8_t)s;
        for (size_t i = 0; i < m; i++)
            bytes[i] = present[randomly(&state) % (1 + narrow % (unsigned)symbols)];
        const size_t described = huffman_describe(weights, last, most, frame.bytes + start);
        complete = described != 0;
        if (!complete) /* too many weights, too alike: for the encoder to store as they are */
            break;
        frame.at = start + described + 6;
        huffman_stream streams[4];
        for (int k = 0; k < 4; k++) {
            const uint8_t *const first = bytes + k * quarter, *const end = k < 3 ? first + quarter : bytes + m;
            size_t used = 1;
            for (const uint8_t *at = first; at < end; at++)
                used += table[*at] & 63;
            const size_t size = (used + 7) / 8;
            streams[k] = (huffman_stream){0, 0, first, end, frame.bytes + frame.at, frame.bytes + frame.at + size};
            if (k < 3)
                little_endian(frame.bytes + start + described + 2 * k, size & 0xffff, 2);
            valid &= size <= 0xffff;
            frame.at += size;
        }
        planes_variants[planes_usable() - 1].coder(streams, table);
        /* The decoder has to refuse what the RFC or versions of zstd do: a code without symbols of the least weight, a
         * block that is larger than what it holds. */
        const size_t promised = left || take(input) & 3 ? m : HUFFMAN_FEWEST + take_two(input) % (m - HUFFMAN_FEWEST + 8);
        end_block(&frame, start, promised, left == 0);
        valid &= promised == m && memchr(weights, 1, sizeof weights) != NULL && frame.at - start + 5 <= m;
    }
    if (frame.n) {
        uint8_t *const exact = copy_of(frame.bytes, frame.at);
        const int accepted = decode(exact, frame.at, frame.n);
        CHECK(accepted == (valid && complete));
        if (accepted) {
            uint8_t *const out = exactly(frame.n);
            CHECK(ZSTD_decompress(out, frame.n, exact, frame.at) == frame.n);
            CHECK(memcmp(out, content, frame.n) == 0);
            free(out);
        }
        damage(exact, frame.at, frame.n, input);
        free(exact);
    }
    free(content);
    free(frame.bytes);
}

/* Any bytes as a frame; the size that is asked for is the one they promise, unless that is too much. */
static void plain_frame(const uint8_t *bytes, size_t nbytes)
{
    uint8_t *const frame = copy_of(bytes, nbytes);
    size_t n = 0;
    for (size_t i = 0; nbytes >= 9 && i < 4; i++)
        n |= (size_t)bytes[5 + i] << (8 * i);
    decode(frame, nbytes, n % MOST_CONTENT);
    free(frame);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    script input = {data, data + size};
    size_t n, nbytes;
    uint8_t *content, *frame;
    switch (take(&input) % MODES) {
    case CONTENT:
        content = describe(&input, &n);
        round_trip(content, n);
        free(content);
        break;
    case PLAIN_CONTENT:
        n = (size_t)(input.end - input.at);
        content = copy_of(input.at, n);
        if (n)
            round_trip(content, n);
        free(content);
        break;
    case DAMAGED:
        content = describe(&input, &n);
        frame = encoded(content, n, planes_variants[planes_usable() - 1].coder, &nbytes);
        damage(frame, nbytes, n, &input);
        free(content);
        free(frame);
        break;
    case ASSEMBLED: assemble(&input); break;
    case PLAIN_FRAME: plain_frame(input.at, (size_t)(input.end - input.at)); break;
    case OTHER_CODES: other_codes(&input); break;
    }
    return 0;
}
