"""Codec kernels: elements to byte planes and back, masks, and what a sample of the planes looks like.

Bytes in, bytes and numbers out; no policy. Every function checks the sizes that it is given, runs on one thread without
the interpreter's lock, and takes the number of the instruction set to use, an index into ``VARIANTS``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy


cdef extern from "_frames.h" nogil:
    ctypedef struct huffman_stream:
        pass

    ctypedef struct planes_statistics:
        double bits
        double share
        double commonest

    ctypedef void (*huffman_coder)(huffman_stream *, const uint64_t *) noexcept nogil

    ctypedef struct planes_variant:
        const char *name
        void (*split)(const uint8_t *, const uint8_t *, size_t, int, uint8_t **) noexcept nogil
        void (*join)(const uint8_t **, const uint8_t *, size_t, int, uint8_t *) noexcept nogil
        bint (*constant)(const uint8_t *, size_t) noexcept nogil
        size_t (*popcount)(const uint8_t *, size_t) noexcept nogil
        size_t (*mask)(const uint8_t *, size_t, uint8_t, uint8_t *, uint8_t *) noexcept nogil
        void (*unmask)(const uint8_t *, const uint8_t *, size_t, size_t, uint8_t, uint8_t *) noexcept nogil
        huffman_coder coder

    const planes_variant planes_variants[3]
    int planes_usable() noexcept
    size_t gaps_from_bitmap(const uint8_t *, size_t, uint8_t *, size_t) noexcept
    size_t gaps_ends(const uint8_t *, size_t) noexcept
    int gaps_fill(const uint8_t *, size_t, const uint8_t *, uint8_t, uint8_t *, size_t) noexcept
    size_t huffman_frame(huffman_coder, const uint8_t *, size_t, uint8_t *, size_t) noexcept
    void planes_survey(
        const planes_variant *, const uint8_t *, const uint8_t *, size_t, int, planes_statistics *
    ) noexcept

    const size_t FRAMES_FULL
    const size_t PLANE_GAP

    ctypedef struct frames_aside:
        size_t at
        size_t outer
        size_t start
        size_t nbytes

    ctypedef struct frames_coder:
        const planes_variant *kernels
        double raw_bits
        double huffman_bits
        double masked_share
        double worthwhile
        uint8_t *planes
        uint8_t *others
        uint8_t *bitmap
        uint8_t *out
        uint8_t *side
        size_t side_at
        size_t side_end
        frames_aside *asides
        size_t count
        size_t most

    size_t frames_code(
        frames_coder *, size_t, const uint8_t *, const uint8_t *, size_t, int, const planes_statistics *
    ) noexcept


ctypedef uint8_t *(*hash_function)(const uint8_t *, size_t, uint8_t *) noexcept nogil

VARIANTS = tuple(planes_variants[i].name.decode() for i in range(planes_usable()))
BEST = len(VARIANTS) - 1

cdef int usable = BEST + 1
cdef size_t SMALL = 4096


cdef const planes_variant *chosen(int variant) except NULL:
    if not 0 <= variant < usable:
        raise IndexError(f"no variant {variant}; this processor can run {VARIANTS}")
    return &planes_variants[variant]


cdef class Pinned:
    """The addresses of up to eight buffers, which cannot be resized or freed before this object is."""

    cdef Py_buffer buffers[8]
    cdef uint8_t *addresses[8]
    cdef int count
    cdef size_t nbytes

    def __cinit__(self, objects, int flags):
        self.count = 0
        if len(objects) not in (1, 2, 4, 8):
            raise ValueError(f"1, 2, 4 or 8 planes, not {len(objects)}")
        for item in objects:
            PyObject_GetBuffer(item, &self.buffers[self.count], flags)
            self.addresses[self.count] = <uint8_t *> self.buffers[self.count].buf
            self.count += 1
            if <size_t> self.buffers[self.count - 1].len != <size_t> self.buffers[0].len:
                raise ValueError("planes differ in length")
        self.nbytes = <size_t> self.buffers[0].len

    def __dealloc__(self):
        for i in range(self.count):
            PyBuffer_Release(&self.buffers[i])


cdef const uint8_t *address(const uint8_t[::1] view) noexcept:
    return &view[0] if view is not None and view.shape[0] else NULL


def split(const uint8_t[::1] raw not None, const uint8_t[::1] base, planes, int variant):
    """Write the byte planes of elements, intra or as a delta.

    Parameters
    ----------
    raw
        ``uint8[w * n]``, elements of ``w`` bytes, at any address.
    base
        ``uint8[w * n]`` for a delta, or ``None``.
    planes
        ``w`` times ``uint8[n]``: 1, 2, 4 or 8 planes, the lowest byte's first; apart from each other, `raw` and `base`.
    variant
        Index into ``VARIANTS``.

    Raises
    ------
    ValueError
        If the sizes do not fit.
    """
    cdef const planes_variant *kernels = chosen(variant)
    cdef Pinned pinned = Pinned(planes, PyBUF_SIMPLE | PyBUF_WRITABLE)
    if <size_t> raw.shape[0] != pinned.nbytes * <size_t> pinned.count:
        raise ValueError(f"{pinned.count} planes of {pinned.nbytes} bytes cannot take {raw.shape[0]}")
    if base is not None and base.shape[0] != raw.shape[0]:
        raise ValueError(f"base has {base.shape[0]} bytes, not {raw.shape[0]}")
    cdef const uint8_t *source = address(raw)
    cdef const uint8_t *before = address(base)
    with nogil:
        kernels.split(source, before, pinned.nbytes, pinned.count, pinned.addresses)


def join(planes, const uint8_t[::1] base, uint8_t[::1] raw not None, int variant):
    """Write the elements whose byte planes `planes` are: the inverse of `split`. `raw` may be the memory of `base`."""
    cdef const planes_variant *kernels = chosen(variant)
    cdef Pinned pinned = Pinned(planes, PyBUF_SIMPLE)
    if <size_t> raw.shape[0] != pinned.nbytes * <size_t> pinned.count:
        raise ValueError(f"{pinned.count} planes of {pinned.nbytes} bytes do not fill {raw.shape[0]}")
    if base is not None and base.shape[0] != raw.shape[0]:
        raise ValueError(f"base has {base.shape[0]} bytes, not {raw.shape[0]}")
    cdef uint8_t *target = <uint8_t *> address(raw)
    cdef const uint8_t *before = address(base)
    with nogil:
        kernels.join(<const uint8_t **> pinned.addresses, before, pinned.nbytes, pinned.count, target)


def survey(const uint8_t[::1] raw not None, const uint8_t[::1] base, int itemsize, int variant):
    """Return for every byte plane, as `split` would write it, what a sample of 16 times 256 elements says.

    Returns
    -------
    list of (float, float, int)
        Entropy in bits per byte; share of the commonest byte; that byte. Of no bytes: 0, 1 and 0.
    """
    cdef const planes_variant *kernels = chosen(variant)
    cdef planes_statistics found[8]
    if itemsize not in (1, 2, 4, 8) or raw.shape[0] % itemsize:
        raise ValueError(f"{raw.shape[0]} bytes are no elements of {itemsize}")
    if base is not None and base.shape[0] != raw.shape[0]:
        raise ValueError(f"base has {base.shape[0]} bytes, not {raw.shape[0]}")
    cdef const uint8_t *source = address(raw)
    cdef const uint8_t *before = address(base)
    cdef size_t n = <size_t> raw.shape[0] // itemsize
    with nogil:
        planes_survey(kernels, source, before, n, itemsize, found)
    return [(found[j].bits, found[j].share, <int> found[j].commonest) for j in range(itemsize)]


def survey_frames(const uint8_t[::1] raw not None, const uint8_t[::1] base, int itemsize, size_t frame, int variant):
    """Return what `survey` says of each frame of `frame` bytes, the last of which may be shorter, in one call.

    Bytes beyond a frame's last element are left out.

    Returns
    -------
    list of list of (float, float, int)
        For each frame, for each plane, without the base.
    list of list of (float, float, int)
        The same as a delta; empty without a base.
    """
    cdef const planes_variant *kernels = chosen(variant)
    if itemsize not in (1, 2, 4, 8) or not frame:
        raise ValueError(f"frames of {frame} bytes are not to be cut into elements of {itemsize}")
    if base is not None and base.shape[0] != raw.shape[0]:
        raise ValueError(f"base has {base.shape[0]} bytes, not {raw.shape[0]}")
    cdef size_t nbytes = <size_t> raw.shape[0]
    cdef size_t width = <size_t> itemsize
    cdef size_t count = (nbytes + frame - 1) // frame
    cdef const uint8_t *source = address(raw)
    cdef const uint8_t *before = address(base)
    cdef size_t rows = count if base is None else 2 * count
    cdef planes_statistics *found = <planes_statistics *> malloc((rows * width + 1) * sizeof(planes_statistics))
    cdef size_t i, j, start
    if found == NULL:
        raise MemoryError
    try:
        with nogil:
            for i in range(rows):
                start = i % count * frame
                planes_survey(
                    kernels,
                    source + start,
                    before + start if i >= count else NULL,
                    min(frame, nbytes - start) // width,
                    itemsize,
                    found + i * width,
                )
        answers = [
            [
                (found[i * width + j].bits, found[i * width + j].share, <int> found[i * width + j].commonest)
                for j in range(width)
            ]
            for i in range(rows)
        ]
        return answers[:count], answers[count:]
    finally:
        free(found)


cdef class Coder:
    """Codes frames as planes, many in one call, in scratch memory of its own.

    Parameters
    ----------
    frames
        The most frames in one call.
    frame
        Bytes of a frame.
    raw_bits, huffman_bits, masked_share, worthwhile
        Entropy in bits from which a plane is not coded, and below which zstd's matcher has to do it; share of the
        commonest byte above which it is masked; part of its size to which coding has to bring a block.
    """

    cdef frames_coder state
    cdef size_t frame
    cdef readonly object out
    """``uint8[frames * frame]``: where `code` writes."""
    cdef readonly object side
    """What `code` set aside."""
    cdef object scratch
    cdef Py_buffer buffers[3]
    cdef int held

    def __cinit__(
        self, size_t frames, size_t frame, double raw_bits, double huffman_bits, double masked_share, double worthwhile
    ):
        cdef size_t planes = frame + 8 * PLANE_GAP
        self.held = 0
        self.frame = frame
        self.out = bytearray(frames * frame)
        self.side = bytearray(frames * (frame + frame // 8 + 64))
        self.scratch = bytearray(planes + frame + frame // 8 + 64)
        for owner in (self.out, self.side, self.scratch):
            PyObject_GetBuffer(owner, &self.buffers[self.held], PyBUF_SIMPLE | PyBUF_WRITABLE)
            self.held += 1
        self.state.raw_bits, self.state.huffman_bits = raw_bits, huffman_bits
        self.state.masked_share, self.state.worthwhile = masked_share, worthwhile
        self.state.out = <uint8_t *> self.buffers[0].buf
        self.state.side = <uint8_t *> self.buffers[1].buf
        self.state.side_end = <size_t> self.buffers[1].len
        self.state.planes = <uint8_t *> self.buffers[2].buf
        self.state.others = self.state.planes + planes
        self.state.bitmap = self.state.others + frame
        self.state.most = frames * 16  # planes of a frame times blocks of a masked plane
        self.state.asides = <frames_aside *> malloc(self.state.most * sizeof(frames_aside))
        if self.state.asides == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.state.asides)
        for i in range(self.held):
            PyBuffer_Release(&self.buffers[i])

    def code(self, const uint8_t[::1] raw not None, const uint8_t[::1] base, int itemsize, plans, int variant):
        """Code the frames of `raw` that have a plan.

        Parameters
        ----------
        raw
            ``uint8[n]``, frames one after the other; only the last may be shorter than a frame.
        base
            ``uint8[n]``, or ``None``.
        plans
            For each frame ``None``, or whether it is to be a delta and the statistics of its planes.

        Returns
        -------
        list of (int, int) or None
            For each frame, where in `out` its bytes begin and end; ``None`` without a plan, or if it is not smaller.
        list of (int, int, int, int)
            Blocks with no content yet, in order: the place of the head in `out`, of the head of the masked block around
            it or -1, and start and length in `side` of the bytes to be coded.
        """
        cdef size_t nbytes = <size_t> raw.shape[0]
        cdef size_t count = (nbytes + self.frame - 1) // self.frame
        cdef size_t i, j, start, at, end
        if itemsize not in (1, 2, 4, 8):
            raise ValueError(f"no elements of {itemsize} bytes")
        if base is not None and base.shape[0] != raw.shape[0]:
            raise ValueError(f"base has {base.shape[0]} bytes, not {raw.shape[0]}")
        if <size_t> len(plans) != count or count * self.frame > <size_t> self.buffers[0].len:
            raise ValueError(f"{len(plans)} plans for {count} frames, of at most {self.buffers[0].len // self.frame}")
        self.state.kernels = chosen(variant)
        self.state.count = self.state.side_at = 0
        cdef const uint8_t *source = address(raw)
        cdef const uint8_t *before = address(base)
        cdef size_t size = count * (sizeof(planes_statistics) * <size_t> itemsize + sizeof(size_t)) + 1
        cdef planes_statistics *found = <planes_statistics *> malloc(size)
        if found == NULL:
            raise MemoryError
        cdef size_t *ends = <size_t *> (found + count * <size_t> itemsize)  # what is wanted, then what was done
        try:
            for i in range(count):
                ends[i] = 0
                plan = plans[i]
                if plan is not None:
                    delta, statistics = plan
                    if delta and base is None:
                        raise ValueError("a delta needs a base")
                    if len(statistics) != itemsize:
                        raise ValueError(f"statistics of {len(statistics)} planes, not of {itemsize}")
                    ends[i] = 2 if delta else 1
                    for j in range(<size_t> itemsize):
                        bits, share, commonest = statistics[j]
                        found[i * itemsize + j].bits = bits
                        found[i * itemsize + j].share = share
                        found[i * itemsize + j].commonest = <uint8_t> commonest
            with nogil:
                for i in range(count):
                    if ends[i]:
                        start = i * self.frame
                        ends[i] = frames_code(
                            &self.state,
                            start,
                            source + start,
                            before + start if ends[i] == 2 else NULL,
                            min(self.frame, nbytes - start),
                            itemsize,
                            found + i * <size_t> itemsize,
                        )
                    else:
                        ends[i] = FRAMES_FULL
            spans = [None if ends[i] == FRAMES_FULL else (i * self.frame, ends[i]) for i in range(count)]
        finally:
            free(found)
        return spans, [
            (
                self.state.asides[i].at,
                -1 if self.state.asides[i].outer == FRAMES_FULL else <Py_ssize_t> self.state.asides[i].outer,
                self.state.asides[i].start,
                self.state.asides[i].nbytes,
            )
            for i in range(self.state.count)
        ]


def gather(parts, uint8_t[::1] out not None):
    """Copy `parts`, bytes-like objects, end to end to the beginning of `out`; return where they end.

    Raises
    ------
    ValueError
        They do not fit.
    """
    cdef size_t count = <size_t> len(parts)
    cdef size_t room = <size_t> out.shape[0]
    cdef size_t total = 0, held = 0, i
    cdef uint8_t *target = <uint8_t *> address(out)
    cdef Py_buffer *buffers = <Py_buffer *> malloc((count + 1) * sizeof(Py_buffer))
    if buffers == NULL:
        raise MemoryError
    try:
        for part in parts:
            PyObject_GetBuffer(part, &buffers[held], PyBUF_SIMPLE)
            held += 1
            total += <size_t> buffers[held - 1].len
        if total > room:
            raise ValueError(f"{total} bytes do not fit into {room}")
        with nogil:
            for i in range(count):
                memcpy(target, buffers[i].buf, <size_t> buffers[i].len)
                target += buffers[i].len
    finally:
        for i in range(held):
            PyBuffer_Release(&buffers[i])
        free(buffers)
    return total


def constant(const uint8_t[::1] data not None, int variant):
    """Return whether all bytes are the same."""
    cdef const planes_variant *kernels = chosen(variant)
    cdef const uint8_t *source = address(data)
    cdef size_t n = <size_t> data.shape[0]
    cdef bint answer
    with nogil:
        answer = kernels.constant(source, n)
    return answer


def mask(
    const uint8_t[::1] data not None,
    uint8_t common,
    uint8_t[::1] bitmap not None,
    uint8_t[::1] others not None,
    int variant,
):
    """Find the bytes that are not `common`.

    Parameters
    ----------
    data
        ``uint8[n]``.
    bitmap
        ``uint8[ceil(n / 8)]``, filled: a bit for every byte, the lowest first, set where it is not `common`.
    others
        ``uint8[at least n]``: begins with those bytes afterwards; the rest is undefined.

    Returns
    -------
    int
        How many they are.
    """
    cdef const planes_variant *kernels = chosen(variant)
    cdef size_t n = <size_t> data.shape[0]
    cdef size_t count
    if <size_t> bitmap.shape[0] != (n + 7) // 8 or <size_t> others.shape[0] < n:
        raise ValueError(f"masking {n} bytes needs {(n + 7) // 8} for the bitmap and {n} for the others")
    cdef const uint8_t *source = address(data)
    cdef uint8_t *bits = <uint8_t *> address(bitmap)
    cdef uint8_t *rest = <uint8_t *> address(others)
    with nogil:
        count = kernels.mask(source, n, common, bits, rest)
    return count


def popcount(const uint8_t[::1] bitmap not None, int variant):
    """Return how many bits are set."""
    cdef const planes_variant *kernels = chosen(variant)
    cdef const uint8_t *bits = address(bitmap)
    cdef size_t n = <size_t> bitmap.shape[0]
    cdef size_t count
    with nogil:
        count = kernels.popcount(bits, n)
    return count


def unmask(
    const uint8_t[::1] bitmap not None,
    const uint8_t[::1] others not None,
    uint8_t common,
    uint8_t[::1] data not None,
    int variant,
):
    """Fill `data`, ``uint8[n]``: the inverse of `mask`, `others` being exactly as long as bits are set.

    Raises
    ------
    ValueError
        If it is not, or bits are set beyond the n-th.
    """
    cdef const planes_variant *kernels = chosen(variant)
    cdef size_t n = <size_t> data.shape[0]
    cdef size_t total = <size_t> others.shape[0]
    cdef const uint8_t *bits = address(bitmap)
    cdef const uint8_t *rest = address(others)
    cdef uint8_t *target = <uint8_t *> address(data)
    if <size_t> bitmap.shape[0] != (n + 7) // 8:
        raise ValueError(f"a bitmap of {n} bytes has {(n + 7) // 8} bytes, not {bitmap.shape[0]}")
    if n % 8 and bits[n // 8] >> (n % 8):
        raise ValueError("the bitmap has bits set beyond its end")
    cdef size_t set_bits
    with nogil:
        set_bits = kernels.popcount(bits, (n + 7) // 8)
        if set_bits == total:  # with more, the kernel would read beyond the others
            kernels.unmask(bits, rest, total, n, common, target)
    if set_bits != total:
        raise ValueError(f"the bitmap has {set_bits} bits set, not {total}")


def gaps(const uint8_t[::1] bitmap not None, size_t n, uint8_t[::1] out not None):
    """Write how many clear bits come before each set one of a bitmap of `n` bits: 255 for as many that go on, then less.

    Returns
    -------
    int
        How many bytes were written to `out`; if they do not fit, one more than it has.
    """
    cdef const uint8_t *bits = address(bitmap)
    cdef uint8_t *target = <uint8_t *> address(out)
    cdef size_t room = <size_t> out.shape[0]
    cdef size_t count
    if <size_t> bitmap.shape[0] != (n + 7) // 8 or (n % 8 and bits[n // 8] >> (n % 8)):
        raise ValueError(f"not a bitmap of {n} bits")
    with nogil:
        count = gaps_from_bitmap(bits, n, target, room)
    return count


def gap_ends(const uint8_t[::1] gaps not None):
    """Return how many bytes `gaps`, as the function of that name writes them, are in front of."""
    cdef const uint8_t *source = address(gaps)
    cdef size_t n = <size_t> gaps.shape[0]
    cdef size_t count
    with nogil:
        count = gaps_ends(source, n)
    return count


def fill_gaps(
    const uint8_t[::1] gaps not None, const uint8_t[::1] others not None, uint8_t common, uint8_t[::1] data not None
):
    """Fill `data` with `common` but for `others`, each behind its gap.

    Raises
    ------
    ValueError
        If they are not as many as the gaps say, or do not fit.
    """
    cdef const uint8_t *source = address(gaps)
    cdef const uint8_t *rest = address(others)
    cdef uint8_t *target = <uint8_t *> address(data)
    cdef size_t m = <size_t> gaps.shape[0]
    cdef size_t n = <size_t> data.shape[0]
    cdef size_t total = <size_t> others.shape[0]
    cdef size_t ends
    cdef bint fits = False
    with nogil:
        ends = gaps_ends(source, m)
        if ends == total:  # with more, the kernel would read beyond the others
            fits = gaps_fill(source, m, rest, common, target, n)
    if ends != total:
        raise ValueError(f"the gaps are in front of {ends} bytes, not {total}")
    if not fits:
        raise ValueError(f"the gaps go beyond {n} bytes")


def copy(const uint8_t[::1] source not None, uint8_t[::1] target not None):
    """Copy ``uint8[n]``. A slice assignment does the same, and holds the interpreter's lock all the while.

    Raises
    ------
    ValueError
        The lengths differ.
    """
    cdef size_t n = source.shape[0]
    cdef const uint8_t *start = address(source)
    cdef uint8_t *end = <uint8_t *> address(target)
    if <size_t> target.shape[0] != n:
        raise ValueError(f"{n} bytes do not fit into {target.shape[0]}")
    if n < SMALL:  # handing the lock over and back takes longer
        memcpy(end, start, n)
    else:
        with nogil:
            memcpy(end, start, n)


def digests(size_t sha256, const uint8_t[::1] raw not None, size_t frame):
    """Return the SHA-256 digests of the frames of `frame` bytes of `raw`, end to end, in one call.

    Parameters
    ----------
    sha256
        Address of a function ``unsigned char *(const unsigned char *data, size_t nbytes, unsigned char *digest)``, such
        as OpenSSL's ``SHA256``, that needs no lock.
    """
    cdef size_t nbytes = <size_t> raw.shape[0]
    cdef size_t count = (nbytes + frame - 1) // frame
    cdef hash_function function = <hash_function> <void *> sha256
    cdef const uint8_t *source = address(raw)
    found = bytearray(32 * count)
    cdef uint8_t[::1] view = found
    cdef uint8_t *target = &view[0] if count else NULL
    cdef size_t i
    cdef bint failed = False
    with nogil:
        for i in range(count):
            if function(source + i * frame, min(frame, nbytes - i * frame), target + 32 * i) == NULL:
                failed = True
                break
    if failed:
        raise RuntimeError("the SHA-256 function failed")
    return bytes(found)


def huffman(const uint8_t[::1] data not None, uint8_t[::1] out not None, int variant):
    """Write `data` as a zstd frame of Huffman-coded literals and return its size, or 0 if `out` is too small."""
    cdef const planes_variant *kernels = chosen(variant)
    cdef size_t n = <size_t> data.shape[0]
    cdef size_t room = <size_t> out.shape[0]
    cdef const uint8_t *source = address(data)
    cdef uint8_t *target = <uint8_t *> address(out)
    cdef size_t size
    if not 0 < n < (1 << 31):
        raise ValueError(f"a frame of {n} bytes")
    with nogil:
        size = huffman_frame(kernels.coder, source, n, target, room)
    return size
