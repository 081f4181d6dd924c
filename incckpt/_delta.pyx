"""Detection and staging kernels."""

from cython.parallel import prange


def openmp() -> bool:
    """Whether the kernels were built with threads."""
    return OPENMP


cdef extern from *:
    """
    #ifdef _OPENMP
    #define INCCKPT_OPENMP 1
    #else
    #define INCCKPT_OPENMP 0
    #endif
    """
    const bint OPENMP "INCCKPT_OPENMP"
