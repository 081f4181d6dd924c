"""Codec kernels: elements to byte planes and back, masks, and what a sample of the planes looks like.

Bytes in, bytes and numbers out; no policy. Every function checks the sizes that it is given, runs on one thread without
the interpreter's lock, and takes the number of the instruction set to use, an index into ``VARIANTS``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy


cdef extern from "_planes.h" nogil:
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
    size_t huffman_frame(huffman_coder, const uint8_t *, size_t, uint8_t *, size_t) noexcept
    void planes_survey(
        const planes_variant *, const uint8_t *, const uint8_t *, size_t, int, planes_statistics *
    ) noexcept


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
