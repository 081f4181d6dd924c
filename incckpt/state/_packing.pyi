from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

class Rules:
    def __init__(
        self,
        most_depth: int,
        numpy_scalars: dict[type, str],
        others: frozenset[type],
        *,
        encode_other: Callable[[Any], bytes],
        decode_other: Callable[[bytes], Any],
        fields_of: Callable[[type], tuple[str, tuple[str, ...]] | None],
        type_of: Callable[[str, tuple[str, ...]], type],
        scalar_of: Callable[[str, bytes | None], Any],
    ) -> None: ...

def weigh(rules: Rules, value: Any, depth: int, heavy: int) -> int: ...
def pack(rules: Rules, value: Any, depth: int, block_bytes: int) -> list[bytes]: ...
def unpack(rules: Rules, data: bytes | memoryview | npt.NDArray[np.uint8], pairs: bool) -> Any: ...
