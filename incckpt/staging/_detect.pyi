from typing import Final

import numpy as np
import numpy.typing as npt

OPENMP: Final[bool]
KERNELS: Final[tuple[str, ...]]

def flag_differences(
    src: npt.NDArray[np.uintp],
    base: npt.NDArray[np.uintp],
    segment: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    group: npt.NDArray[np.int64],
    flags: npt.NDArray[np.uint8],
    threads: int,
) -> None: ...
def sum_squares(
    src: npt.NDArray[np.uintp],
    base: npt.NDArray[np.uintp],
    segment: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    dtype_code: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
    kernel: str,
    threads: int,
) -> None: ...
def copy(
    src: npt.NDArray[np.uintp],
    dst: npt.NDArray[np.uintp],
    segment: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    threads: int,
) -> None: ...
def read(
    src: npt.NDArray[np.uintp],
    base: npt.NDArray[np.uintp],
    segment: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    threads: int,
) -> int: ...
