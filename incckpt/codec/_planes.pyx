"""Codec kernels: elements to byte planes and back, masks, and statistics of sampled planes.

Bytes in, bytes and numbers out; no policy. Every function checks sizes, runs on one thread without the interpreter's
lock, and takes the index in ``VARIANTS`` of the instruction set to use.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_FromMemory
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

    ctypedef struct unhuffman_stream:
        pass

    ctypedef struct unhuffman_table:
        pass

    ctypedef void (*huffman_coder)(huffman_stream *, const uint64_t *) noexcept nogil
    ctypedef int (*unhuffman_decoder)(unhuffman_stream *, const unhuffman_table *, int) noexcept nogil

    ctypedef struct planes_variant:
        const char *name
        void (*split)(const uint8_t *, const uint8_t *, size_t, int, uint8_t **) noexcept nogil
        void (*join)(const uint8_t **, const uint8_t *, size_t, int, uint8_t *) noexcept nogil
        bint (*constant)(const uint8_t *, size_t) noexcept nogil
        size_t (*popcount)(const uint8_t *, size_t) noexcept nogil
        size_t (*mask)(const uint8_t *, size_t, uint8_t, uint8_t *, uint8_t *) noexcept nogil
        void (*unmask)(const uint8_t *, const uint8_t *, size_t, size_t, uint8_t, uint8_t *) noexcept nogil
        huffman_coder coder
        unhuffman_decoder decoder

    const planes_variant planes_variants[3]
    int planes_usable() noexcept
    size_t gaps_from_bitmap(const uint8_t *, size_t, uint8_t *, size_t) noexcept
    size_t gaps_ends(const uint8_t *, size_t) noexcept
    int gaps_fill(const uint8_t *, size_t, const uint8_t *, uint8_t, uint8_t *, size_t) noexcept
    size_t huffman_frame(huffman_coder, const uint8_t *, size_t, uint8_t *, size_t) noexcept
    bint unhuffman_frame(unhuffman_decoder, const uint8_t *, size_t, uint8_t *, size_t) noexcept
    void planes_survey(
        const planes_variant *, const uint8_t *, const uint8_t *, size_t, int, planes_statistics *
    ) noexcept

    const size_t FRAME_NBYTES "FRAME_BYTES"
    const size_t PLANE_SPACING "PLANE_GAP"

    ctypedef struct frames_rules:
        double worthwhile
        double huffman_bits
        double masked_share
        double delta_gain
        double zstd_gain
        size_t fewest

    ctypedef struct frames_aside:
        const uint8_t *data
        size_t nbytes

    ctypedef struct frames_frame:
        const uint8_t *raw
        size_t raw_nbytes
        uint8_t *start
        size_t nbytes
        size_t full_nbytes
        int way
        int repeats

    ctypedef struct frames_chunk:
        const uint8_t *raw
        const uint8_t *base
        size_t nbytes
        int itemsize
        uint8_t *out

    ctypedef struct frames_bytes:
        const void *data
        size_t nbytes

    ctypedef struct frames_coder:
        const planes_variant *kernels
        frames_rules rules
        uint8_t *planes
        uint8_t *others
        uint8_t *bitmap
        uint8_t *side
        frames_aside *asides
        size_t count

    size_t frames_count(size_t nbytes) noexcept
    size_t frames_side(size_t nbytes) noexcept
    size_t frames_most_asides(size_t nbytes) noexcept
    void frames_code(frames_coder *, const frames_chunk *, frames_frame *) noexcept
    void frames_close(
        const frames_coder *,
        const frames_chunk *,
        frames_frame *,
        const frames_aside **,
        const frames_bytes **,
        const frames_bytes **,
    ) noexcept


FRAME_BYTES = FRAME_NBYTES
PLANE_GAP = PLANE_SPACING
VARIANTS = tuple(planes_variants[i].name.decode() for i in range(planes_usable()))
BEST = len(VARIANTS) - 1

cdef int usable = BEST + 1
cdef size_t SMALL = 4096


cdef const planes_variant *chosen(int variant) except NULL:
    if not 0 <= variant < usable:
        raise IndexError(f"no variant {variant}; this processor can run {VARIANTS}")
    return &planes_variants[variant]


cdef class Pinned:
    """The addresses of up to eight buffers, which stay valid as long as this object exists."""

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
        1, 2, 4 or 8 planes (``w``), each ``uint8[n]``, the lowest byte's first. They must not overlap each other, `raw`
        or `base`.
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
    """Write the elements with these byte planes to `raw`, which may be `base` itself: the inverse of `split`."""
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
    """Return statistics of each byte plane that `split` would write, from 16 samples of 256 elements.

    Returns
    -------
    list of (float, float, int)
        Entropy in bits per byte, share of the commonest byte, and that byte; 0, 1 and 0 for no bytes.
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


cdef class Held:
    """Buffers, which stay valid as long as this object exists."""

    cdef Py_buffer *buffers
    cdef size_t count

    def __cinit__(self, size_t most):
        self.count = 0
        self.buffers = <Py_buffer *> malloc((most + 1) * sizeof(Py_buffer))
        if self.buffers == NULL:
            raise MemoryError

    cdef Py_buffer *hold(self, item, int flags) except NULL:
        """Hold one more buffer, at most `most` in all."""
        PyObject_GetBuffer(item, &self.buffers[self.count], flags)
        self.count += 1
        return &self.buffers[self.count - 1]

    cdef const frames_bytes *as_bytes(self, frames_bytes *places) noexcept:
        for i in range(self.count):
            places[i].data, places[i].nbytes = self.buffers[i].buf, <size_t> self.buffers[i].len
        return places

    def __dealloc__(self):
        for i in range(self.count):
            PyBuffer_Release(&self.buffers[i])
        free(self.buffers)


cdef class Coder:
    """Codes the frames of many chunks in one call, with scratch memory of its own; for one thread at a time.

    Parameters
    ----------
    worthwhile
        Coded/raw size that a block must reach.
    huffman_bits
        Entropy in bits per byte below which zstd's matcher codes a block.
    masked_share
        Share of the commonest byte above which a plane is masked.
    delta_gain
        Delta/intra cost below which a frame becomes a delta.
    zstd_gain
        Zstd/planes size below which a frame is coded with zstd.
    fewest
        Elements below which a frame is stored raw.
    """

    cdef frames_coder state
    cdef uint8_t *scratch
    cdef uint8_t *side
    cdef size_t side_nbytes

    def __cinit__(
        self,
        double worthwhile,
        double huffman_bits,
        double masked_share,
        double delta_gain,
        double zstd_gain,
        size_t fewest,
    ):
        cdef size_t planes = FRAME_NBYTES + 8 * PLANE_SPACING
        self.state.rules.worthwhile, self.state.rules.huffman_bits = worthwhile, huffman_bits
        self.state.rules.masked_share, self.state.rules.delta_gain = masked_share, delta_gain
        self.state.rules.zstd_gain, self.state.rules.fewest = zstd_gain, fewest
        self.scratch = <uint8_t *> malloc(planes + FRAME_NBYTES + FRAME_NBYTES // 8 + 64)
        if self.scratch == NULL:
            raise MemoryError
        self.state.planes = self.scratch
        self.state.others = self.scratch + planes
        self.state.bitmap = self.state.others + FRAME_NBYTES

    def __dealloc__(self):
        free(self.scratch)
        free(self.side)

    cdef size_t reserve(self, size_t nbytes) except 0:
        """Make room for all that `nbytes` raw bytes may set aside; unused room is never touched."""
        cdef size_t wanted = frames_side(nbytes) + 1
        if wanted > self.side_nbytes:
            free(self.side)
            self.side = <uint8_t *> malloc(wanted)
            self.side_nbytes = wanted if self.side != NULL else 0
            if self.side == NULL:
                raise MemoryError
        self.state.side = self.side
        return wanted

    def encode(self, chunks, fast, general, int variant):
        """Code chunks, each at the start of its `out`.

        Releases the interpreter's lock once, and up to three times more if zstd is needed.

        Parameters
        ----------
        chunks
            For each: the raw bytes, ``uint8[n]``; the base, ``uint8[n]`` or ``None``; bytes per element, 1, 2, 4 or 8;
            `out`, at least ``uint8[n]``.
        fast, general
            Called with a list of memoryviews, none empty, they return each as coded by zstd's fast or better matcher.
        variant
            Index into ``VARIANTS``.

        Returns
        -------
        list of list of (int, int, int)
            For each chunk and each of its frames: its way, its coded size, and its estimated size without a base.
        """
        if not chunks:
            return []
        cdef size_t many = <size_t> len(chunks), frames = 0, nbytes = 0, texts = 0, i, j
        cdef Held held = Held(3 * many)
        cdef Held contents, others
        cdef frames_chunk *sources = <frames_chunk *> malloc((many + 1) * sizeof(frames_chunk))
        cdef frames_frame *found = NULL
        cdef frames_frame *frame
        cdef frames_aside *asides = NULL
        cdef frames_bytes *places = NULL
        cdef const frames_aside *next_aside
        cdef const frames_bytes *next_content
        cdef const frames_bytes *next_text
        cdef Py_buffer *buffer
        try:
            if sources == NULL:
                raise MemoryError
            for i in range(many):
                raw, base, itemsize, out = chunks[i]
                buffer = held.hold(raw, PyBUF_SIMPLE)
                sources[i].raw, sources[i].nbytes = <const uint8_t *> buffer.buf, <size_t> buffer.len
                sources[i].base, sources[i].itemsize = NULL, itemsize
                if itemsize not in (1, 2, 4, 8):
                    raise ValueError(f"no elements of {itemsize} bytes")
                if base is not None:
                    buffer = held.hold(base, PyBUF_SIMPLE)
                    sources[i].base = <const uint8_t *> buffer.buf
                    if <size_t> buffer.len != sources[i].nbytes:
                        raise ValueError(f"base has {buffer.len} bytes, not {sources[i].nbytes}")
                buffer = held.hold(out, PyBUF_SIMPLE | PyBUF_WRITABLE)
                sources[i].out = <uint8_t *> buffer.buf
                if <size_t> buffer.len < sources[i].nbytes:
                    raise ValueError(f"{sources[i].nbytes} bytes may not fit into {buffer.len}")
                frames += frames_count(sources[i].nbytes)
                nbytes += sources[i].nbytes
            # Bounded per frame: chunks may be many and small.
            found = <frames_frame *> malloc((frames + 1) * sizeof(frames_frame))
            asides = <frames_aside *> malloc(frames_most_asides(frames * FRAME_NBYTES) * sizeof(frames_aside))
            if found == NULL or asides == NULL:
                raise MemoryError
            self.reserve(nbytes + 16 * (frames + 1))
            self.state.kernels, self.state.asides, self.state.count = chosen(variant), asides, 0
            with nogil:
                frame = found
                for i in range(many):
                    frames_code(&self.state, &sources[i], frame)
                    frame += frames_count(sources[i].nbytes)
                for j in range(frames):
                    if found[j].repeats:
                        texts += 1
            if self.state.count or texts:
                contents = held_all(
                    fast,
                    [
                        PyMemoryView_FromMemory(<char *> asides[j].data, <Py_ssize_t> asides[j].nbytes, PyBUF_READ)
                        for j in range(self.state.count)
                    ],
                )
                others = held_all(
                    general,
                    [
                        PyMemoryView_FromMemory(<char *> found[j].raw, <Py_ssize_t> found[j].raw_nbytes, PyBUF_READ)
                        for j in range(frames)
                        if found[j].repeats
                    ],
                )
                places = <frames_bytes *> malloc((contents.count + others.count + 1) * sizeof(frames_bytes))
                if places == NULL:
                    raise MemoryError
                next_aside = asides
                next_content = contents.as_bytes(places)
                next_text = others.as_bytes(places + contents.count)
                with nogil:
                    frame = found
                    for i in range(many):
                        frames_close(&self.state, &sources[i], frame, &next_aside, &next_content, &next_text)
                        frame += frames_count(sources[i].nbytes)
            answers = []
            frame = found
            for i in range(many):
                answer = []
                for j in range(frames_count(sources[i].nbytes)):
                    answer.append((frame[j].way, frame[j].nbytes, frame[j].full_nbytes))
                answers.append(answer)
                frame += frames_count(sources[i].nbytes)
            return answers
        finally:
            free(sources)
            free(found)
            free(asides)
            free(places)


cdef Held held_all(function, data):
    """Call `function` with a list, unless it is empty, and hold the buffers that it returns, one for each item."""
    results = list(function(data)) if data else []
    if len(results) != len(data):
        raise ValueError(f"{len(results)} results for {len(data)} buffers")
    cdef Held held = Held(<size_t> len(results))
    for item in results:
        held.hold(item, PyBUF_SIMPLE)
    return held


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
        ``uint8[ceil(n / 8)]``; receives one bit per byte, the lowest first, set where the byte is not `common`.
    others
        At least ``uint8[n]``; receives those bytes, and is undefined behind them.

    Returns
    -------
    int
        Their number.
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
    """Return the number of set bits."""
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
    """Fill `data`, ``uint8[n]``: the inverse of `mask`, with one of `others` for each set bit.

    Raises
    ------
    ValueError
        If there are more or fewer `others` than set bits, or if bits are set beyond the n-th.
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
        if set_bits == total:  # with more bits, the kernel would read beyond the others
            kernels.unmask(bits, rest, total, n, common, target)
    if set_bits != total:
        raise ValueError(f"the bitmap has {set_bits} bits set, not {total}")


def gaps(const uint8_t[::1] bitmap not None, size_t n, uint8_t[::1] out not None):
    """For each set bit of a bitmap of `n` bits, write the number of clear bits before it: bytes of 255, then the rest.

    Returns
    -------
    int
        The number of bytes written to `out`; if they do not fit, one more than its size.
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
    """Return the number of bytes that `gaps`, as written by the function of that name, precede."""
    cdef const uint8_t *source = address(gaps)
    cdef size_t n = <size_t> gaps.shape[0]
    cdef size_t count
    with nogil:
        count = gaps_ends(source, n)
    return count


def fill_gaps(
    const uint8_t[::1] gaps not None, const uint8_t[::1] others not None, uint8_t common, uint8_t[::1] data not None
):
    """Fill `data` with `common`, except for `others`, each after its gap.

    Raises
    ------
    ValueError
        If the number of `others` does not match the gaps, or they do not fit.
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
        if ends == total:  # with more gaps, the kernel would read beyond the others
            fits = gaps_fill(source, m, rest, common, target, n)
    if ends != total:
        raise ValueError(f"the gaps are in front of {ends} bytes, not {total}")
    if not fits:
        raise ValueError(f"the gaps go beyond {n} bytes")


def copy(const uint8_t[::1] source not None, uint8_t[::1] target not None):
    """Copy ``uint8[n]`` without the interpreter's lock, which a slice assignment would hold.

    Raises
    ------
    ValueError
        If the lengths differ.
    """
    cdef size_t n = source.shape[0]
    cdef const uint8_t *start = address(source)
    cdef uint8_t *end = <uint8_t *> address(target)
    if <size_t> target.shape[0] != n:
        raise ValueError(f"{n} bytes do not fit into {target.shape[0]}")
    if n < SMALL:  # releasing and taking the lock would take longer
        if n:
            memcpy(end, start, n)
    else:
        with nogil:
            memcpy(end, start, n)


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


def unhuffman(const uint8_t[::1] coded not None, uint8_t[::1] out not None, int variant):
    """Decode a frame written by `huffman` into `out`; return whether it is one, with exactly as many bytes.

    If it is not, `out` is undefined, and zstd may still be able to read the frame.
    """
    cdef const planes_variant *kernels = chosen(variant)
    cdef const uint8_t *source = address(coded)
    cdef uint8_t *target = <uint8_t *> address(out)
    cdef size_t nbytes = <size_t> coded.shape[0], n = <size_t> out.shape[0]
    cdef bint done
    with nogil:
        done = unhuffman_frame(kernels.decoder, source, nbytes, target, n)
    return done
