"""Kernels of change detection and staging: bytes in, flags, sums or bytes out.

Nothing here checks its arguments; detect.py does, and cuts the blocks. Block ``i`` is ``nbytes[i]`` bytes at
``offset[i]`` in segment ``s = segment[i]``, whose addresses are ``src[s]`` and ``base[s]``. Kernels run without the
GIL, and no result depends on the number of threads.
"""

from cython.parallel import parallel, prange

from libc.stdint cimport int64_t, uint64_t, uintptr_t


cdef extern from *:
    """
    #ifdef _OPENMP
    #define INCCKPT_OPENMP 1
    #else
    #define INCCKPT_OPENMP 0
    #endif
    """
    const bint INCCKPT_OPENMP


cdef extern from "_detect.h":
    ctypedef struct SumsFunction:
        pass
    const SumsFunction *sums_functions(const char *kernel) noexcept nogil
    void flag_difference(uintptr_t a, uintptr_t b, size_t n, unsigned char *flag) noexcept nogil
    void add_squares(
        const SumsFunction *functions, int type, uintptr_t c, uintptr_t b, size_t n, double *out
    ) noexcept nogil
    uint64_t use_default_float_mode() noexcept nogil
    void restore_float_mode(uint64_t mode) noexcept nogil
    void copy_block(uintptr_t source, uintptr_t target, size_t n) noexcept nogil
    uint64_t read_block(uintptr_t a, uintptr_t b, size_t n) noexcept nogil


OPENMP = bool(INCCKPT_OPENMP)
KERNELS = tuple(name for name in ("avx512", "avx2", "generic") if sums_functions(name.encode()) != NULL)


cdef Py_ssize_t _turn(Py_ssize_t blocks, int threads) noexcept nogil:
    """The number of blocks that a thread takes at a time: few enough that all threads finish together."""
    return max(1, min(8, blocks // (4 * threads)))


def flag_differences(
    const uintptr_t[::1] src,
    const uintptr_t[::1] base,
    const int64_t[::1] segment,
    const int64_t[::1] offset,
    const int64_t[::1] nbytes,
    const int64_t[::1] group,
    unsigned char[::1] flags,
    int threads,
):
    """Set ``flags[group[s]]`` for every segment ``s`` that differs; stop reading a group once its flag is set."""
    cdef Py_ssize_t i, n = segment.shape[0], turn = _turn(n, threads)
    cdef int64_t s
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=turn):
        s = segment[i]
        flag_difference(src[s] + offset[i], base[s] + offset[i], nbytes[i], &flags[group[s]])


def sum_squares(
    const uintptr_t[::1] src,
    const uintptr_t[::1] base,
    const int64_t[::1] segment,
    const int64_t[::1] offset,
    const int64_t[::1] nbytes,
    const int64_t[::1] dtype_code,
    double[:, ::1] sums,
    str kernel,
    int threads,
):
    """Write, for every block ``i``, the sums of ``(src - base)**2`` and of ``base**2`` to ``sums[i]``."""
    cdef Py_ssize_t i, n = segment.shape[0], turn = _turn(n, threads)
    cdef int64_t s
    cdef uint64_t mode = 0
    cdef const SumsFunction *functions = sums_functions(kernel.encode())
    with nogil, parallel(num_threads=threads):
        mode = use_default_float_mode()
        for i in prange(n, schedule="dynamic", chunksize=turn):
            s = segment[i]
            add_squares(functions, <int>dtype_code[s], src[s] + offset[i], base[s] + offset[i], nbytes[i], &sums[i, 0])
        restore_float_mode(mode)


def copy(
    const uintptr_t[::1] src,
    const uintptr_t[::1] dst,
    const int64_t[::1] segment,
    const int64_t[::1] offset,
    const int64_t[::1] nbytes,
    int threads,
):
    """Copy every block from ``src`` to ``dst``."""
    cdef Py_ssize_t i, n = segment.shape[0], turn = _turn(n, threads)
    cdef int64_t s
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=turn):
        s = segment[i]
        copy_block(src[s] + offset[i], dst[s] + offset[i], nbytes[i])


def read(
    const uintptr_t[::1] src,
    const uintptr_t[::1] base,
    const int64_t[::1] segment,
    const int64_t[::1] offset,
    const int64_t[::1] nbytes,
    int threads,
):
    """Read both sides of every block and do almost nothing with them, as a yardstick for the other kernels."""
    cdef Py_ssize_t i, n = segment.shape[0], turn = _turn(n, threads)
    cdef int64_t s
    cdef uint64_t seen = 0
    for i in prange(n, nogil=True, num_threads=threads, schedule="dynamic", chunksize=turn):
        s = segment[i]
        seen += read_block(src[s] + offset[i], base[s] + offset[i], nbytes[i])
    return seen
