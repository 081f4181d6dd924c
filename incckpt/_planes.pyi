from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from zstandard import BufferSegment

_Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

VARIANTS: Final[tuple[str, ...]]
BEST: Final[int]

def split(raw: _Buffer, base: _Buffer | None, planes: Sequence[_Buffer], variant: int) -> None: ...
def join(planes: Sequence[_Buffer], base: _Buffer | None, raw: _Buffer, variant: int) -> None: ...
def survey(raw: _Buffer, base: _Buffer | None, itemsize: int, variant: int) -> list[tuple[float, float, int]]: ...
def survey_frames(
    raw: _Buffer, base: _Buffer | None, itemsize: int, frame: int, variant: int
) -> tuple[list[list[tuple[float, float, int]]], list[list[tuple[float, float, int]]]]: ...
def gather(parts: Sequence[_Buffer | BufferSegment], out: _Buffer) -> int: ...
def digests(sha256: int, raw: _Buffer, frame: int) -> bytes: ...
def constant(data: _Buffer, variant: int) -> bool: ...
def mask(data: _Buffer, common: int, bitmap: _Buffer, others: _Buffer, variant: int) -> int: ...
def popcount(bitmap: _Buffer, variant: int) -> int: ...
def unmask(bitmap: _Buffer, others: _Buffer, common: int, data: _Buffer, variant: int) -> None: ...
def copy(source: _Buffer, target: _Buffer) -> None: ...
def huffman(data: _Buffer, out: _Buffer, variant: int) -> int: ...

class Coder:
    out: Final[bytearray]
    side: Final[bytearray]

    def __init__(
        self,
        frames: int,
        frame: int,
        raw_bits: float,
        huffman_bits: float,
        masked_share: float,
        worthwhile: float,
    ) -> None: ...
    def code(
        self,
        raw: _Buffer,
        base: _Buffer | None,
        itemsize: int,
        plans: Sequence[tuple[bool, Sequence[tuple[float, float, int]]] | None],
        variant: int,
    ) -> tuple[list[tuple[int, int] | None], list[tuple[int, int, int, int]]]: ...
