"""Finds which bytes of a state changed, and copies them.

The state is a flat table of *segments*: runs of bytes in host memory, given by numpy arrays of addresses and lengths.
Results are per *group* of segments (a chunk or a tensor). Segments are cut into blocks, in a way that depends only on
the lengths, and the kernels spread the blocks over threads, without the GIL. So ten thousand small tensors need no
Python call each, and one large tensor keeps every thread busy.

The caller keeps the memory alive and unchanged during a call. Addresses need no alignment.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from incckpt.errors import KernelError, OptionError
from incckpt.options import MAX_THREADS, checked_count
from incckpt.staging import _detect

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]
    Addresses = npt.NDArray[np.uintp]
    Float64s = npt.NDArray[np.float64]

__all__ = [
    "BLOCK_BYTES",
    "DTYPE_CODES",
    "KERNELS",
    "Blocks",
    "blocks_of",
    "changed_exact",
    "chosen_threads",
    "copy",
    "default_kernel",
    "default_threads",
    "relative_l2",
    "within",
]

_logger = logging.getLogger(__name__)

#: Two blocks, one from each side, fit into a core's L2 cache; fetching one takes a ten-thousandth of comparing it.
BLOCK_BYTES = 256 << 10

#: The kernels of this build that `relative_l2` can use on this processor, fastest first.
KERNELS: tuple[str, ...] = _detect.KERNELS

#: Torch's names of the element types that `relative_l2` knows, and their codes. Complex numbers are pairs of real ones.
DTYPE_CODES: Mapping[str, int] = MappingProxyType(
    {
        "float64": 0,
        "complex128": 0,
        "float32": 1,
        "complex64": 1,
        "bfloat16": 2,
        "float16": 3,
        "complex32": 3,
        "float8_e4m3fn": 4,
        "float8_e5m2": 5,
    }
)
_CODE_BYTES = np.array([8, 4, 2, 2, 1, 1], np.int64)


@dataclass(frozen=True)
class Blocks:
    """Pieces of segments, of at most `BLOCK_BYTES`, in the order of the segments.

    Parameters
    ----------
    segment, offset, nbytes
        ``int64[b]``: the segment of each block, its offset there, and its length in bytes.
    """

    segment: Int64s
    offset: Int64s
    nbytes: Int64s


def blocks_of(nbytes: Int64s) -> Blocks:
    """Cut segments of lengths ``nbytes`` (``int64[m]``, bytes) into blocks; an empty segment has none."""
    count = -(-nbytes // BLOCK_BYTES)
    segment = np.repeat(np.arange(len(nbytes), dtype=np.int64), count)
    first = np.cumsum(count) - count
    offset = (np.arange(len(segment), dtype=np.int64) - first[segment]) * BLOCK_BYTES
    return Blocks(segment, offset, np.minimum(nbytes[segment] - offset, BLOCK_BYTES))


def changed_exact(
    src: Addresses, base: Addresses, nbytes: Int64s, group: Int64s, n_groups: int, *, threads: int
) -> npt.NDArray[np.bool_]:
    """Return which groups differ in any bit.

    A group is read up to the first block that differs.

    Parameters
    ----------
    src, base
        ``uintp[m]``: addresses of the segments, and of the bytes to compare them with.
    nbytes
        ``int64[m]``: their lengths in bytes.
    group
        ``int64[m]``: the group of each, in ``range(n_groups)``.
    n_groups
        Number of groups; one without segments has not changed.
    threads
        Threads to use, at least 1.

    Returns
    -------
    bool[n_groups]
        The same for any number of threads.

    Raises
    ------
    OptionError
        If an argument has a wrong type, shape or value.
    """
    _check_segments(nbytes, src=src, base=base)
    _check_groups(group, len(nbytes), n_groups)
    blocks = blocks_of(nbytes)
    flags = np.zeros(n_groups, np.uint8)
    _detect.flag_differences(
        src, base, blocks.segment, blocks.offset, blocks.nbytes, group, flags, _checked_threads(threads)
    )
    return flags.view(np.bool_)


def relative_l2(
    src: Addresses,
    base: Addresses,
    nbytes: Int64s,
    group: Int64s,
    dtype_code: Int64s,
    n_groups: int,
    *,
    threads: int,
    kernel: str | None = None,
) -> tuple[Float64s, Float64s]:
    """Add up, for each group, the squares of the change and of the base, in one pass; for `within`.

    float64 and float32 are subtracted, squared and added in float64. bfloat16 is subtracted in float32, with a relative
    error of at most 2**-24. The squares of float16 and float8 are added in float32, eight at a time, with a relative
    error below 1e-6. NaN and infinity yield NaN or infinity, and so do squares beyond the range of float64. If
    differences of float64 are too small to be squared, their sum is 2**-900, an upper bound. In all these cases the
    tensor counts as changed.

    Parameters
    ----------
    src, base
        ``uintp[m]``: addresses of the current elements and of the base's.
    nbytes
        ``int64[m]``: lengths in bytes, whole elements.
    group
        ``int64[m]``: the group of each segment, in ``range(n_groups)``.
    dtype_code
        ``int64[m]``: the element type of each segment, one of the values of `DTYPE_CODES`.
    n_groups
        Number of groups; the sums of one without segments are 0.
    threads
        Threads to use, at least 1.
    kernel
        One of `KERNELS`, by default `default_kernel`. Kernels differ in the order of their additions.

    Returns
    -------
    sum_diff, sum_base : float64[n_groups]
        Sums of ``abs(src - base)**2`` and of ``abs(base)**2``; bit for bit the same for any number of threads.

    Raises
    ------
    OptionError
        If an argument has a wrong type, shape or value, or a length is not a whole number of elements.
    KernelError
        If the kernel is not available.
    """
    _check_segments(nbytes, src=src, base=base)
    _check_groups(group, len(nbytes), n_groups)
    _check_array("dtype_code", dtype_code, np.int64, len(nbytes))
    if ((dtype_code < 0) | (dtype_code >= len(_CODE_BYTES))).any():
        raise OptionError(f"dtype_code has values outside 0..{len(_CODE_BYTES) - 1}; use those of DTYPE_CODES")
    partial = np.flatnonzero(nbytes % _CODE_BYTES[dtype_code])
    if len(partial):
        at = int(partial[0])
        raise OptionError(
            f"nbytes[{at}] is {nbytes[at]}, which is not a whole number of elements of "
            f"{_CODE_BYTES[dtype_code[at]]} bytes"
        )
    blocks = blocks_of(nbytes)
    sums = np.empty((len(blocks.segment), 2))
    _detect.sum_squares(
        src,
        base,
        blocks.segment,
        blocks.offset,
        blocks.nbytes,
        dtype_code,
        sums,
        _checked_kernel(default_kernel() if kernel is None else kernel),
        _checked_threads(threads),
    )
    of_block = group[blocks.segment]  # bincount adds in the order of the blocks
    diff, squares = (np.bincount(of_block, sums[:, side], n_groups) for side in (0, 1))
    return diff.astype(np.float64, copy=False), squares.astype(np.float64, copy=False)


def within(sum_diff: Float64s, sum_base: Float64s, threshold: float) -> npt.NDArray[np.bool_]:
    """Return which groups are clean: ``sqrt(sum_diff) <= threshold * sqrt(sum_base)``, and both are finite.

    Parameters
    ----------
    sum_diff, sum_base
        ``float64[n]`` from `relative_l2`.
    threshold
        The largest relative L2 change that is not worth saving, at least 0.

    Returns
    -------
    bool[n]
        An all-zero base is clean only if nothing changed.

    Raises
    ------
    OptionError
        If the threshold is negative, infinite or NaN.
    """
    if not 0 <= threshold < float("inf"):
        raise OptionError(f"threshold must be a finite number, 0 or more, not {threshold}")
    finite = np.isfinite(sum_diff) & np.isfinite(sum_base)
    with np.errstate(invalid="ignore"):  # 0 * infinity: NaN, and so not finite
        return finite & (np.sqrt(sum_diff) <= threshold * np.sqrt(sum_base))


def copy(src: Addresses, dst: Addresses, nbytes: Int64s, *, threads: int) -> None:
    """Copy segments; large ones bypass the cache.

    Parameters
    ----------
    src, dst
        ``uintp[m]``: addresses to read and to write. Written bytes must not overlap any others in the table.
    nbytes
        ``int64[m]``: lengths in bytes.
    threads
        Threads to use, at least 1.

    Raises
    ------
    OptionError
        If an argument has a wrong type, shape or value.
    """
    _check_segments(nbytes, src=src, dst=dst)
    blocks = blocks_of(nbytes)
    _detect.copy(src, dst, blocks.segment, blocks.offset, blocks.nbytes, _checked_threads(threads))


def default_kernel() -> str:
    """Return the fastest of `KERNELS`, or the one named by the environment variable ``INCCKPT_KERNEL``.

    Raises
    ------
    KernelError
        If the named kernel is not available.
    """
    return _checked_kernel(os.environ.get("INCCKPT_KERNEL") or KERNELS[0])


def default_threads() -> int:
    """Return the number of processors that this process may use, or ``OMP_NUM_THREADS`` if that is less."""
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has one number per nesting level
    return min(processors, int(asked)) if asked.isdecimal() and int(asked) > 0 else processors


def chosen_threads(threads: int | None) -> int:
    """Return the number of threads that a caller asks for; by default that of `default_threads`.

    Raises
    ------
    OptionError
        If it is not a usable number.
    """
    return default_threads() if threads is None else checked_count("threads", threads, 1, MAX_THREADS)


def _checked_kernel(kernel: str) -> str:
    if kernel not in KERNELS:
        raise KernelError(
            f"the kernel {kernel!r} is not in this build or not for this processor; there are: {', '.join(KERNELS)}"
        )
    return kernel


def _checked_threads(threads: int) -> int:
    if threads < 1:
        raise OptionError(f"threads must be 1 or more, not {threads}")
    if threads > 1 and not _detect.OPENMP:
        _warn_of_single_thread()
        return 1
    return threads


@functools.cache
def _warn_of_single_thread() -> None:
    _logger.warning("incckpt was built without OpenMP: changes are detected and copied on one thread only")


def _check_segments(nbytes: Int64s, **addresses: Addresses) -> None:
    _check_array("nbytes", nbytes, np.int64, len(nbytes))
    if (nbytes < 0).any():
        raise OptionError(f"nbytes[{int(np.argmax(nbytes < 0))}] is negative")
    for name, values in addresses.items():
        _check_array(name, values, np.uintp, len(nbytes))
        null = (values == 0) & (nbytes > 0)
        if null.any():
            raise OptionError(f"{name}[{int(np.argmax(null))}] is a null address")


def _check_groups(group: Int64s, length: int, n_groups: int) -> None:
    _check_array("group", group, np.int64, length)
    if n_groups < 0:
        raise OptionError(f"n_groups must be 0 or more, not {n_groups}")
    outside = (group < 0) | (group >= n_groups)
    if outside.any():
        at = int(np.argmax(outside))
        raise OptionError(f"group[{at}] is {group[at]}, which is not in range({n_groups})")


def _check_array(name: str, values: npt.NDArray[Any], dtype: type[np.generic], length: int) -> None:
    if values.ndim != 1 or values.dtype != dtype or not values.flags.c_contiguous:
        raise OptionError(
            f"{name} must be a contiguous one-dimensional array of {np.dtype(dtype)}, not of shape {values.shape} and "
            f"type {values.dtype}"
        )
    if len(values) != length:
        raise OptionError(f"{name} has {len(values)} elements where nbytes has {length}")
