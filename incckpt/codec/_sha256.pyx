"""SHA-256 of the frames of many chunks, without the interpreter's lock.

Bytes in, digests out; which of the two functions to take is for the caller to say.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc

from itertools import pairwise


cdef extern from "_sha256.h" nogil:
    ctypedef struct sha256_piece:
        const uint8_t *data
        size_t nbytes
        uint8_t *digest

    void sha256_pairs(const sha256_piece *, size_t) noexcept
    bint sha256_paired() noexcept


ctypedef uint8_t *(*hash_function)(const uint8_t *, size_t, uint8_t *) noexcept nogil

PAIRED = bool(sha256_paired())


def digests(chunks, size_t frame_nbytes, size_t function):
    """Return, for each of `chunks` (``uint8[n]``), the concatenated SHA-256 digests of its frames.

    Parameters
    ----------
    frame_nbytes
        Bytes of a frame, the last one excepted.
    function
        Address of a function ``unsigned char *(const unsigned char *data, size_t nbytes, unsigned char *digest)`` that
        needs no lock, such as OpenSSL's ``SHA256``; or 0 for the processor's own instructions, two frames at a time.

    Raises
    ------
    ValueError
        If this processor has no such instructions, or a frame no bytes.
    MemoryError
        If there is not enough memory, or the function fails.
    """
    if not function and not PAIRED:
        raise ValueError("this processor has no instructions for SHA-256")
    if not frame_nbytes:
        raise ValueError("frames of 0 bytes")
    items = list(chunks)
    ends = [0]
    cdef size_t held = 0, frames = 0, frame = 0, i, at
    cdef bint failed = False
    cdef sha256_piece *pieces = NULL
    cdef Py_buffer *sources = <Py_buffer *> malloc((len(items) + 1) * sizeof(Py_buffer))
    if sources == NULL:
        raise MemoryError
    try:
        for item in items:
            PyObject_GetBuffer(item, &sources[held], PyBUF_SIMPLE)
            frames += (<size_t> sources[held].len + frame_nbytes - 1) // frame_nbytes
            held += 1
            ends.append(32 * frames)
        found = bytearray(32 * frames)
        pieces = <sha256_piece *> malloc((frames + 1) * sizeof(sha256_piece))
        if pieces == NULL:
            raise MemoryError
        for i in range(held):
            at = 0
            while at < <size_t> sources[i].len:
                pieces[frame].data = <const uint8_t *> sources[i].buf + at
                pieces[frame].nbytes = min(frame_nbytes, <size_t> sources[i].len - at)
                pieces[frame].digest = <uint8_t *> <char *> found + 32 * frame
                at += frame_nbytes
                frame += 1
        with nogil:
            if function:
                failed = not hash_each(<hash_function> <void *> function, pieces, frames)
            else:
                sha256_pairs(pieces, frames)
    finally:
        free(pieces)
        for i in range(held):
            PyBuffer_Release(&sources[i])
        free(sources)
    if failed:
        raise MemoryError("the function for SHA-256 failed")
    return [bytes(found[start:end]) for start, end in pairwise(ends)]


cdef bint hash_each(hash_function function, const sha256_piece *pieces, size_t count) noexcept nogil:
    for i in range(count):
        if function(pieces[i].data, pieces[i].nbytes, pieces[i].digest) == NULL:
            return False
    return True
