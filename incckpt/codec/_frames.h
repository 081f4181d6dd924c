/* Codes frames without Python: chooses the way and carries it out, for many chunks in one call.
 *
 * Each call that releases the interpreter's lock may put the training thread to sleep when it takes the lock back. So
 * chunks are coded in a few calls, not in several per frame. What needs zstd's matcher stays open: frames_code sets
 * blocks of low entropy aside, with their heads in place, and marks frames that repeat themselves. The caller has zstd
 * code each kind in one call, and frames_close inserts the results.
 *
 * The layout is in docs/objects.md. Nothing here checks its arguments; _planes.pyx does.
 */
#ifndef INCCKPT_FRAMES_H
#define INCCKPT_FRAMES_H

#include "_planes.h"

enum { WAY_RAW, WAY_INTRA, WAY_DELTA, WAY_ZSTD };
enum { BLOCK_RAW, BLOCK_CONSTANT, BLOCK_MASKED, BLOCK_ZSTD, BLOCK_SPARSE };
enum { FRAME_BYTES = 1 << 20, BLOCK_HEAD = 5, PLANE_GAP = 192 }; /* the gap keeps planes from sharing cache sets */
enum { REPEATS_BYTES = 16 << 10, REPEATS_LOG = 12, REPEATS_COST = 2 /* bytes of a match in zstd, roughly */ };
#define REPEATS_SIGN 0.98 /* chance matches in numbers save less than this */

typedef struct {
    double worthwhile;    /* coded/raw size that a block must reach to repay its decoding */
    double huffman_bits;  /* entropy per byte below which zstd beats Huffman codes, which take at least a bit */
    double masked_share;  /* share of the commonest byte from which a mask is smaller and faster than Huffman codes */
    double delta_gain;    /* delta/intra cost below which a delta repays reading its base */
    double zstd_gain;     /* zstd/planes size below which zstd repays its slower decoding */
    size_t fewest;        /* elements below which planes do not repay their heads */
} frames_rules;

typedef struct {
    uint8_t *head;  /* of its block; the content will follow it */
    uint8_t *outer; /* head of the masked or sparse block around it, or NULL */
    const uint8_t *data;
    size_t nbytes;
} frames_aside;

typedef struct {
    const uint8_t *raw;
    size_t raw_nbytes;
    uint8_t *start;
    size_t nbytes;      /* at `start` */
    size_t full_nbytes; /* estimated size without a base */
    size_t asides;      /* blocks set aside, still to be inserted */
    int way;
    int repeats; /* whether it repeats itself, so that zstd is worth a try */
} frames_frame;

typedef struct {
    const uint8_t *raw, *base;
    size_t nbytes;
    int itemsize;
    uint8_t *out;
} frames_chunk;

typedef struct {
    const void *data;
    size_t nbytes;
} frames_bytes;

typedef struct {
    const planes_variant *kernels;
    frames_rules rules;
    uint8_t *planes, *others, *bitmap; /* scratch */
    uint8_t *end;                      /* of the bytes that this frame may take */
    uint8_t *side;                     /* where the next block set aside goes */
    frames_aside *asides;
    size_t count;
} frames_coder;

/* The most bytes, and the most blocks, that all frames of `nbytes` can set aside. */
static size_t frames_side(size_t nbytes) { return nbytes + nbytes / 8 + 16 * (nbytes / FRAME_BYTES + 1); }
static size_t frames_most_asides(size_t nbytes) { return 16 * (nbytes / FRAME_BYTES + 1); }

static size_t frames_count(size_t nbytes) { return (nbytes + FRAME_BYTES - 1) / FRAME_BYTES; }

static void frames_head(uint8_t *at, uint8_t kind, size_t length)
{
    at[0] = kind;
    for (int i = 0; i < 4; i++)
        at[1 + i] = (uint8_t)(length >> (8 * i));
}

static size_t frames_length(const uint8_t *head)
{
    return (size_t)head[1] | (size_t)head[2] << 8 | (size_t)head[3] << 16 | (size_t)head[4] << 24;
}

/* ---- the choice of a way ----------------------------------------------------------------------------------------- */

/* The expected coded/raw size of planes with these statistics. */
static double frames_cost(const frames_coder *coder, const planes_statistics *planes, int itemsize)
{
    double bits = 0.0;
    for (int j = 0; j < itemsize; j++)
        bits += planes[j].bits < 8.0 * coder->rules.worthwhile ? planes[j].bits : 8.0;
    return bits / (8.0 * itemsize);
}

/* The expected coded/raw size if matches of four bytes or more are coded and every other byte costs `literal`, from a
 * sample in the middle of the frame. */
static double frames_repeats(const uint8_t *raw, size_t nbytes, double literal)
{
    uint16_t seen[1 << REPEATS_LOG];
    const size_t n = nbytes < REPEATS_BYTES ? nbytes : REPEATS_BYTES;
    size_t literals = 0, matches = 0, misses = 0, i = 0;
    raw += (nbytes - n) / 2;
    memset(seen, 0, sizeof seen);
    while (i + 4 <= n) {
        uint32_t word, other;
        memcpy(&word, raw + i, 4);
        uint16_t *const place = &seen[(uint32_t)(word * UINT32_C(2654435761)) >> (32 - REPEATS_LOG)];
        const size_t before = *place;
        *place = (uint16_t)i;
        memcpy(&other, raw + before, 4);
        if (before < i && other == word) {
            size_t length = 4;
            while (i + length < n && raw[before + length] == raw[i + length])
                length++;
            i += length;
            matches++;
            misses = 0;
        } else { /* the longer nothing is found, the larger the steps */
            const size_t step = 1 + misses++ / 32;
            literals += step;
            i += step;
        }
    }
    return ((double)literals * literal + (double)(matches * REPEATS_COST)) / (double)n;
}

/* Choose a way from samples, and fill in the statistics of the planes. Return whether to code planes at all. */
static int frames_choose(const frames_coder *coder, frames_frame *frame, const uint8_t *base, int itemsize,
                         planes_statistics *planes)
{
    const size_t n = frame->raw_nbytes / (size_t)itemsize;
    double cost, full;
    frame->repeats = 0;
    frame->full_nbytes = frame->raw_nbytes;
    if (n < coder->rules.fewest)
        return 0;
    planes_survey(coder->kernels, frame->raw, NULL, n, itemsize, planes);
    cost = frames_cost(coder, planes, itemsize);
    full = cost < 1.0 ? cost : 1.0;
    frame->way = WAY_INTRA;
    if (base) {
        planes_statistics differences[8];
        double delta;
        planes_survey(coder->kernels, frame->raw, base, n, itemsize, differences);
        delta = frames_cost(coder, differences, itemsize);
        if (delta < coder->rules.delta_gain * full) {
            frame->way = WAY_DELTA;
            frame->full_nbytes = (size_t)(full * (double)frame->raw_nbytes + 0.5);
            cost = delta;
            memcpy(planes, differences, sizeof differences);
        }
    }
    cost = cost < 1.0 ? cost : 1.0;
    /* A sample shows little of distant repeats, so a faint sign is enough. */
    frame->repeats = frames_repeats(frame->raw, frame->raw_nbytes, full) < REPEATS_SIGN * cost;
    return cost < 1.0;
}

/* ---- planes to blocks -------------------------------------------------------------------------------------------- */

/* Write a block without a mask at `at` and return where it ends, or NULL if it does not fit. */
static uint8_t *frames_plain_block(frames_coder *coder, uint8_t *at, uint8_t *outer, const uint8_t *data, size_t n,
                                   const planes_statistics *found)
{
    uint8_t *const content = at + BLOCK_HEAD;
    const size_t room = (size_t)(coder->rules.worthwhile * (double)n);
    if (coder->end - at < BLOCK_HEAD)
        return NULL;
    const size_t left = (size_t)(coder->end - content);
    if (n > 1 && found->share == 1.0 && left && coder->kernels->constant(data, n)) {
        content[0] = (uint8_t)found->commonest;
        frames_head(at, BLOCK_CONSTANT, 1);
        return content + 1;
    }
    if (n && found->bits < coder->rules.huffman_bits) {
        memcpy(coder->side, data, n);
        coder->asides[coder->count++] = (frames_aside){at, outer, coder->side, n};
        coder->side += n;
        return content;
    }
    if (n && found->bits < 8.0 * coder->rules.worthwhile) {
        const size_t size = huffman_frame(coder->kernels->coder, data, n, content, room < left ? room : left);
        if (size) {
            frames_head(at, BLOCK_ZSTD, size);
            return content + size;
        }
    }
    if (left < n)
        return NULL;
    memcpy(content, data, n);
    frames_head(at, BLOCK_RAW, n);
    return content + n;
}

/* Whether the set bits of a bitmap, `count` of n, are few and scattered: gaps are then shorter than the coded bitmap.
 * If they lie in rows, as in an embedding, zstd's matches in the bitmap are better. */
static int frames_scattered(size_t count, size_t n, const planes_statistics *bitmap)
{
    const double share = (double)count / (double)n;
    const double bits = -8.0 * (share * log2(share) + (1.0 - share) * log2(1.0 - share)); /* of a byte of random bits */
    return count && count <= n / 16 && bitmap->bits > 0.85 * bits;
}

/* Write a plane as a block at `at` and return where it ends, or NULL if it does not fit. */
static uint8_t *frames_block(frames_coder *coder, uint8_t *at, const uint8_t *data, size_t n,
                             const planes_statistics *found)
{
    const uint8_t common = (uint8_t)found->commonest;
    const uint8_t *inner[2] = {coder->bitmap, coder->others};
    planes_statistics statistics;
    uint8_t *end = at + BLOCK_HEAD + 1, kind = BLOCK_MASKED;
    size_t lengths[2];
    if (found->share <= coder->rules.masked_share || (found->share == 1.0 && coder->kernels->constant(data, n)))
        return frames_plain_block(coder, at, NULL, data, n, found);
    if (coder->end - at < BLOCK_HEAD + 1)
        return NULL;
    lengths[0] = (n + 7) / 8;
    lengths[1] = coder->kernels->mask(data, n, common, coder->bitmap, coder->others);
    at[BLOCK_HEAD] = common;
    planes_survey(coder->kernels, inner[0], NULL, lengths[0], 1, &statistics);
    if (frames_scattered(lengths[1], n, &statistics)) {
        uint8_t *const gaps = coder->others + n / 2; /* the others take at most the first n/16 bytes */
        const size_t m = gaps_from_bitmap(coder->bitmap, n, gaps, n / 8);
        if (m <= n / 8 && coder->end - end >= 4) {
            kind = BLOCK_SPARSE;
            inner[0] = gaps;
            lengths[0] = m;
            for (int i = 0; i < 4; i++)
                *end++ = (uint8_t)(m >> (8 * i));
            planes_survey(coder->kernels, gaps, NULL, m, 1, &statistics);
        }
    }
    end = frames_plain_block(coder, end, at, inner[0], lengths[0], &statistics);
    if (end) {
        planes_survey(coder->kernels, inner[1], NULL, lengths[1], 1, &statistics);
        end = frames_plain_block(coder, end, at, inner[1], lengths[1], &statistics);
    }
    if (end)
        frames_head(at, kind, (size_t)(end - at) - BLOCK_HEAD);
    return end;
}

/* Write a frame's planes as blocks, then its remaining bytes, at its start. Return where they end, or NULL if they do
 * not fit into the frame's raw size. */
static uint8_t *frames_planes(frames_coder *coder, const frames_frame *frame, const uint8_t *base, int itemsize,
                              const planes_statistics *found)
{
    const size_t n = frame->raw_nbytes / (size_t)itemsize, body = n * (size_t)itemsize, slot = BLOCK_HEAD + n;
    const size_t tail = frame->raw_nbytes - body;
    uint8_t *planes[8], *at = frame->start;
    int noise = 0;
    coder->end = frame->start + frame->raw_nbytes;
    /* The low planes are mostly noise. Split those below the first that is not straight to where they are stored. */
    while (noise < itemsize && found[noise].bits >= 8.0 * coder->rules.worthwhile
           && (size_t)(noise + 1) * slot <= frame->raw_nbytes)
        noise++;
    for (int j = 0; j < itemsize; j++)
        planes[j] = j < noise ? at + (size_t)j * slot + BLOCK_HEAD : coder->planes + (size_t)j * (n + PLANE_GAP);
    coder->kernels->split(frame->raw, base, n, itemsize, planes);
    for (int j = 0; j < noise; j++, at += slot)
        frames_head(at, BLOCK_RAW, n);
    for (int j = noise; j < itemsize && at; j++)
        at = frames_block(coder, at, planes[j], n, &found[j]);
    if (!at || (size_t)(coder->end - at) < tail)
        return NULL;
    memcpy(at, frame->raw + body, tail);
    return at + tail;
}

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

static void frames_store(frames_frame *frame)
{
    memcpy(frame->start, frame->raw, frame->raw_nbytes);
    frame->way = WAY_RAW;
    frame->nbytes = frame->full_nbytes = frame->raw_nbytes;
    frame->asides = 0;
}

static void frames_code_one(frames_coder *coder, frames_frame *frame, const uint8_t *base, int itemsize)
{
    planes_statistics planes[8];
    uint8_t *const side = coder->side;
    const size_t count = coder->count;
    if (frames_choose(coder, frame, base, itemsize, planes)) {
        uint8_t *const end = frames_planes(coder, frame, frame->way == WAY_DELTA ? base : NULL, itemsize, planes);
        if (end) {
            frame->nbytes = (size_t)(end - frame->start);
            frame->asides = coder->count - count;
            if (frame->way != WAY_DELTA)
                frame->full_nbytes = frame->nbytes;
            return;
        }
        coder->count = count;
        coder->side = side;
    }
    frames_store(frame);
}

/* Code the frames of a chunk to `out` and describe them in `frames`. A frame that stays open gets as much room as it
 * has raw bytes, so that it can be closed in place. */
static void frames_code(frames_coder *coder, const frames_chunk *chunk, frames_frame *frames)
{
    uint8_t *at = chunk->out;
    for (size_t start = 0; start < chunk->nbytes; start += FRAME_BYTES, frames++) {
        const size_t left = chunk->nbytes - start;
        frames->raw = chunk->raw + start;
        frames->raw_nbytes = left < FRAME_BYTES ? left : FRAME_BYTES;
        frames->start = at;
        frames_code_one(coder, frames, chunk->base ? chunk->base + start : NULL, chunk->itemsize);
        at = frames->asides || frames->repeats ? chunk->out + start + frames->raw_nbytes : at + frames->nbytes;
    }
}

static int frames_worthwhile(const frames_coder *coder, const frames_aside *aside, const frames_bytes *content)
{
    return content->nbytes <= (size_t)(coder->rules.worthwhile * (double)aside->nbytes);
}

/* Insert what was set aside: `contents[i]`, or `asides[i].data` if coding did not pay. Go from the last to the first,
 * so that everything moves towards the end, and only once. */
static void frames_fill(const frames_coder *coder, frames_frame *frame, const frames_aside *asides,
                        const frames_bytes *contents)
{
    uint8_t *source = frame->start + frame->nbytes, *target;
    size_t total = frame->nbytes;
    for (size_t i = 0; i < frame->asides; i++)
        total += frames_worthwhile(coder, &asides[i], &contents[i]) ? contents[i].nbytes : asides[i].nbytes;
    if (total >= frame->raw_nbytes) {
        frames_store(frame);
        return;
    }
    target = frame->start + total;
    for (size_t i = frame->asides; i-- > 0;) {
        const int coded = frames_worthwhile(coder, &asides[i], &contents[i]);
        const size_t length = coded ? contents[i].nbytes : asides[i].nbytes;
        uint8_t *const follows = asides[i].head + BLOCK_HEAD;
        target -= source - follows;
        memmove(target, follows, (size_t)(source - follows));
        target -= length;
        memcpy(target, coded ? contents[i].data : asides[i].data, length);
        frames_head(asides[i].head, coded ? BLOCK_ZSTD : BLOCK_RAW, length);
        if (asides[i].outer)
            frames_head(asides[i].outer, asides[i].outer[0], frames_length(asides[i].outer) + length);
        source = follows;
    }
    frame->nbytes = total;
    if (frame->way != WAY_DELTA)
        frame->full_nbytes = total;
}

/* Complete the frames of a chunk and move them together. `asides` and `contents` belong to its frames, in order, and so
 * do `texts`, the frames that repeat themselves as coded by zstd; all three pointers advance past what was used. */
static void frames_close(const frames_coder *coder, const frames_chunk *chunk, frames_frame *frames,
                         const frames_aside **asides, const frames_bytes **contents, const frames_bytes **texts)
{
    uint8_t *at = chunk->out;
    for (size_t i = 0; i < frames_count(chunk->nbytes); i++) {
        frames_frame *const frame = frames + i;
        const size_t count = frame->asides;
        if (count)
            frames_fill(coder, frame, *asides, *contents);
        *asides += count;
        *contents += count;
        if (frame->repeats) {
            const frames_bytes *const text = (*texts)++;
            if (text->nbytes < frame->full_nbytes)
                frame->full_nbytes = text->nbytes;
            if ((double)text->nbytes < coder->rules.zstd_gain * (double)frame->nbytes) {
                memcpy(frame->start, text->data, text->nbytes);
                frame->way = WAY_ZSTD;
                frame->nbytes = text->nbytes;
            }
        }
        memmove(at, frame->start, frame->nbytes);
        frame->start = at;
        at += frame->nbytes;
    }
}

#endif
