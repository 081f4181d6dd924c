from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

_Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

PAIRED: Final[bool]

def digests(chunks: Sequence[_Buffer], frame_nbytes: int, function: int) -> list[bytes]: ...
