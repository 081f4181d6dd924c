from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from zstandard import BufferSegment

_Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

FRAME_BYTES: Final[int]
VARIANTS: Final[tuple[str, ...]]
BEST: Final[int]

def split(raw: _Buffer, base: _Buffer | None, planes: Sequence[_Buffer], variant: int) -> None: ...
def join(planes: Sequence[_Buffer], base: _Buffer | None, raw: _Buffer, variant: int) -> None: ...
def survey(raw: _Buffer, base: _Buffer | None, itemsize: int, variant: int) -> list[tuple[float, float, int]]: ...
def digests(sha256: int, chunks: Sequence[_Buffer]) -> list[bytes]: ...
def constant(data: _Buffer, variant: int) -> bool: ...
def mask(data: _Buffer, common: int, bitmap: _Buffer, others: _Buffer, variant: int) -> int: ...
def popcount(bitmap: _Buffer, variant: int) -> int: ...
def unmask(bitmap: _Buffer, others: _Buffer, common: int, data: _Buffer, variant: int) -> None: ...
def copy(source: _Buffer, target: _Buffer) -> None: ...
def huffman(data: _Buffer, out: _Buffer, variant: int) -> int: ...

class Coder:
    def __init__(
        self,
        worthwhile: float,
        huffman_bits: float,
        masked_share: float,
        delta_gain: float,
        zstd_gain: float,
        fewest: int,
    ) -> None: ...
    def encode(
        self,
        chunks: Sequence[tuple[_Buffer, _Buffer | None, int, _Buffer]],
        fast: Callable[[list[memoryview]], Iterable[_Buffer | BufferSegment]],
        general: Callable[[list[memoryview]], Iterable[_Buffer | BufferSegment]],
        variant: int,
    ) -> list[list[tuple[int, int, int]]]: ...
