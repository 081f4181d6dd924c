"""The lossy mode: a floating-point tensor that moved by no more than a threshold is not stored again.

The distance is the relative L2 norm, ‖current − stored‖₂ / ‖stored‖₂, always from what is *stored*, so that small
drifts cannot add up unnoticed. Integers, bools and bytes are always exact.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.staging import detect
from incckpt.state.entries import TensorEntry

__all__ = ["RangeThresholds", "Thresholds", "float_ranges"]


@dataclass(frozen=True)
class RangeThresholds:
    """The threshold of each byte range of a state.

    Attributes
    ----------
    threshold
        ``float64[r]``; 0 if the range must be compared exactly.
    dtype_code
        ``int64[r]``, for :func:`incckpt.staging.detect.relative_l2`; 0 if it does not matter.
    names
        The first tensor in each range.
    """

    threshold: npt.NDArray[np.float64]
    dtype_code: npt.NDArray[np.int64]
    names: list[str]

    @property
    def lossy(self) -> npt.NDArray[np.bool_]:
        """Which ranges have a threshold; ``bool[r]``."""
        return self.threshold > 0


class Thresholds:
    """Thresholds by tensor name.

    Parameters
    ----------
    spec
        One threshold for all tensors, or thresholds by glob of the dotted name. The first match counts; a tensor
        without a match is exact. 0 means exact.

    Raises
    ------
    OptionError
        If a threshold is not a number in [0, 1).
    """

    def __init__(self, spec: float | Mapping[str, float] = 0.0) -> None:
        self._rules = list(spec.items()) if isinstance(spec, Mapping) else [("*", spec)]
        for pattern, threshold in self._rules:
            try:
                valid = 0.0 <= threshold < 1.0
            except (TypeError, ValueError, RuntimeError):
                valid = False
            if not valid:
                raise OptionError(
                    f"threshold must be a number in [0, 1), or such by glob; not {shown(threshold)} ({shown(pattern)})"
                )
        self.active = any(threshold > 0 for _, threshold in self._rules)

    def of(self, name: str) -> float:
        """Return the threshold of a tensor."""
        return next((value for pattern, value in self._rules if fnmatch.fnmatchcase(name, pattern)), 0.0)

    def by_range(
        self, entries: Sequence[TensorEntry], nbytes: Sequence[int], exact: Collection[int] = ()
    ) -> RangeThresholds:
        """Return the threshold of each range.

        A range has one only if it is a single floating-point tensor, dense in memory, or several that coincide: if
        tensors merely overlap, a part could move further than the whole. The entries `exact` have none: scales, say,
        without which the codes beside them would mean something else.
        """
        code, names = float_ranges(entries, nbytes)
        threshold = np.full(len(nbytes), math.inf)
        for index, entry in enumerate(entries):
            if entry.range >= 0:
                limit = 0.0 if index in exact else self.of(entry.name)
                threshold[entry.range] = min(threshold[entry.range], limit)
        return RangeThresholds(np.where(np.isinf(threshold) | (code < 0), 0.0, threshold), np.maximum(code, 0), names)


def float_ranges(entries: Sequence[TensorEntry], nbytes: Sequence[int]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return which ranges are one floating-point tensor, or several that coincide, dense in memory.

    Returns
    -------
    code, names
        ``int64[r]``: the range's element type, one of `incckpt.staging.detect.DTYPE_CODES`, or -1 if it is not such a
        range; and the name of its first tensor.
    """
    unknown, other = -2, -1
    code = np.full(len(nbytes), unknown, np.int64)
    names = [""] * len(nbytes)
    for entry in entries:
        index = entry.range
        if index < 0:
            continue
        names[index] = names[index] or entry.name
        kind = detect.DTYPE_CODES.get(_dtype_name(entry))
        whole = entry.nbytes == nbytes[index]
        code[index] = kind if kind is not None and whole and code[index] in (unknown, kind) else other
    return np.maximum(code, other), names


_NUMPY_NAMES = {"<f8": "float64", "<f4": "float32", "<f2": "float16", "<c16": "complex128", "<c8": "complex64"}


def _dtype_name(entry: TensorEntry) -> str:
    return entry.dtype if entry.kind == "torch" else _NUMPY_NAMES.get(entry.dtype, entry.dtype)
