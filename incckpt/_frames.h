/* Frames to planes to blocks, without Python: what `frames.encode_frames` decided, carried out for many frames at once.
 *
 * Each call that takes and gives back the interpreter's lock may put the training thread to sleep, so a chunk has to be
 * coded in a few calls, not in several for each frame. Blocks that need zstd's matcher cannot be coded here: their bytes
 * are set aside, their heads left in place, and the caller puts their content in.
 *
 * The layout is in docs/objects.md. Nothing here checks its arguments; _planes.pyx does.
 */
#ifndef INCCKPT_FRAMES_H
#define INCCKPT_FRAMES_H

#include "_planes.h"

enum { BLOCK_RAW, BLOCK_CONSTANT, BLOCK_MASKED, BLOCK_ZSTD, BLOCK_SPARSE };
enum { BLOCK_HEAD = 5, PLANE_GAP = 192 }; /* bytes between planes: a power of two apart they would share cache sets */

#define FRAMES_FULL SIZE_MAX

typedef struct {
    size_t at;     /* of its block's head in `out`; the content is to follow that */
    size_t outer;  /* of the head of the masked block around it, or FRAMES_FULL */
    size_t start;  /* in `side` */
    size_t nbytes;
} frames_aside;

typedef struct {
    const planes_variant *kernels;
    double raw_bits;     /* entropy of a byte from which a plane is not tried */
    double huffman_bits; /* below which zstd's matcher is better */
    double masked_share; /* of the commonest byte, above which a plane is masked */
    double worthwhile;   /* of its size, to which coding must bring a block */
    uint8_t *planes, *others, *bitmap;
    uint8_t *out;
    size_t end; /* of what this frame may take of `out` */
    uint8_t *side;
    size_t side_at, side_end;
    frames_aside *asides;
    size_t count, most;
} frames_coder;

static void frames_head(uint8_t *at, uint8_t kind, size_t length)
{
    at[0] = kind;
    for (int i = 0; i < 4; i++)
        at[1 + i] = (uint8_t)(length >> (8 * i));
}

/* Write a block without a mask at `at` and return where it ends. */
static size_t frames_plain_block(frames_coder *coder, size_t at, size_t outer, const uint8_t *data, size_t n,
                                 const planes_statistics *found)
{
    uint8_t *const head = coder->out + at;
    const size_t room = (size_t)(coder->worthwhile * (double)n);
    size_t left;
    if (coder->end - at < BLOCK_HEAD)
        return FRAMES_FULL;
    left = coder->end - at - BLOCK_HEAD;
    if (n > 1 && found->share == 1.0 && left && coder->kernels->constant(data, n)) {
        head[BLOCK_HEAD] = (uint8_t)found->commonest;
        frames_head(head, BLOCK_CONSTANT, 1);
        return at + BLOCK_HEAD + 1;
    }
    if (n && found->bits < coder->huffman_bits) {
        frames_aside *const aside = coder->asides + coder->count;
        if (coder->count == coder->most || coder->side_end - coder->side_at < n)
            return FRAMES_FULL;
        memcpy(coder->side + coder->side_at, data, n);
        *aside = (frames_aside){at, outer, coder->side_at, n};
        coder->side_at += n;
        coder->count++;
        frames_head(head, BLOCK_ZSTD, 0);
        return at + BLOCK_HEAD;
    }
    if (n && found->bits < coder->raw_bits) {
        const size_t size =
            huffman_frame(coder->kernels->coder, data, n, head + BLOCK_HEAD, room < left ? room : left);
        if (size) {
            frames_head(head, BLOCK_ZSTD, size);
            return at + BLOCK_HEAD + size;
        }
    }
    if (left < n)
        return FRAMES_FULL;
    memcpy(head + BLOCK_HEAD, data, n);
    frames_head(head, BLOCK_RAW, n);
    return at + BLOCK_HEAD + n;
}

/* Whether the set bits of a bitmap, `count` of n, are few and lie anywhere: gaps are then shorter than the bitmap's bytes
 * can be coded. Where they lie in rows, as in an embedding, zstd's matches in the bitmap are better. */
static int frames_scattered(size_t count, size_t n, const planes_statistics *bitmap)
{
    const double share = (double)count / (double)n;
    const double bits = -8.0 * (share * log2(share) + (1.0 - share) * log2(1.0 - share)); /* of a byte, at random */
    return count && count <= n / 16 && bitmap->bits > 0.85 * bits;
}

/* Write a plane as a block at `at` and return where it ends. */
static size_t frames_block(frames_coder *coder, size_t at, const uint8_t *data, size_t n,
                           const planes_statistics *found)
{
    const uint8_t common = (uint8_t)found->commonest;
    const uint8_t *inner[2] = {coder->bitmap, coder->others};
    planes_statistics statistics;
    uint8_t kind = BLOCK_MASKED;
    size_t lengths[2], end;
    if (found->share <= coder->masked_share || (found->share == 1.0 && coder->kernels->constant(data, n)))
        return frames_plain_block(coder, at, FRAMES_FULL, data, n, found);
    if (coder->end - at < BLOCK_HEAD + 1)
        return FRAMES_FULL;
    lengths[0] = (n + 7) / 8;
    lengths[1] = coder->kernels->mask(data, n, common, coder->bitmap, coder->others);
    coder->out[at + BLOCK_HEAD] = common;
    end = at + BLOCK_HEAD + 1;
    planes_survey(coder->kernels, inner[0], NULL, lengths[0], 1, &statistics);
    if (frames_scattered(lengths[1], n, &statistics)) {
        uint8_t *const gaps = coder->others + n / 2; /* of n bytes, the others take the first sixteenth */
        const size_t m = gaps_from_bitmap(coder->bitmap, n, gaps, n / 8);
        if (m <= n / 8 && coder->end - end >= 4) {
            kind = BLOCK_SPARSE;
            inner[0] = gaps;
            lengths[0] = m;
            for (int i = 0; i < 4; i++)
                coder->out[end++] = (uint8_t)(m >> (8 * i));
            planes_survey(coder->kernels, gaps, NULL, m, 1, &statistics);
        }
    }
    end = frames_plain_block(coder, end, at, inner[0], lengths[0], &statistics);
    if (end != FRAMES_FULL) {
        planes_survey(coder->kernels, inner[1], NULL, lengths[1], 1, &statistics);
        end = frames_plain_block(coder, end, at, inner[1], lengths[1], &statistics);
    }
    if (end != FRAMES_FULL)
        frames_head(coder->out + at, kind, end - at - BLOCK_HEAD);
    return end;
}

/* Write the planes of a frame of `nbytes` as blocks at `at`, and what is left over; return where that ends. */
static size_t frames_code(frames_coder *coder, size_t at, const uint8_t *raw, const uint8_t *base, size_t nbytes,
                          int itemsize, const planes_statistics *found)
{
    const size_t n = nbytes / (size_t)itemsize, body = n * (size_t)itemsize, slot = BLOCK_HEAD + n;
    const size_t count = coder->count, side_at = coder->side_at;
    uint8_t *planes[8];
    int noise = 0;
    coder->end = at + nbytes;
    /* The low planes are mostly noise: those below the first that is not are split right to where they are stored. */
    while (noise < itemsize && found[noise].bits >= coder->raw_bits && (size_t)(noise + 1) * slot <= nbytes)
        noise++;
    for (int j = 0; j < itemsize; j++)
        planes[j] = j < noise ? coder->out + at + (size_t)j * slot + BLOCK_HEAD
                              : coder->planes + (size_t)j * (n + PLANE_GAP);
    coder->kernels->split(raw, base, n, itemsize, planes);
    for (int j = 0; j < noise; j++, at += slot)
        frames_head(coder->out + at, BLOCK_RAW, n);
    for (int j = noise; j < itemsize && at != FRAMES_FULL; j++)
        at = frames_block(coder, at, planes[j], n, &found[j]);
    if (at == FRAMES_FULL || coder->end - at < nbytes - body) {
        coder->count = count;
        coder->side_at = side_at;
        return FRAMES_FULL;
    }
    memcpy(coder->out + at, raw + body, nbytes - body);
    return at + (nbytes - body);
}

#endif
