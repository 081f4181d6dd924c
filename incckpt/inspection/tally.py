"""Norms and counts of two tensors' elements, added up a part at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from incckpt.run.reader import Bytes
from incckpt.state.entries import TensorEntry, byte_extent, byte_strides, packed_shape

__all__ = ["Layout", "Measure", "NumberTally"]

_AT_ONCE = 1 << 20  # elements
_NO_NUMBERS = ("bits", "float4")


@dataclass(frozen=True, slots=True)
class Measure:
    """How far the numbers of a tensor have moved, in L2 norms; complex ones count as pairs.

    Attributes
    ----------
    before, after
        Norm of the tensor.
    moved
        Norm of the difference.
    largest
        Largest absolute difference of an element.
    """

    before: float
    after: float
    moved: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference's norm over the norm before; infinite where that was 0."""
        if self.before:
            return self.moved / self.before
        return math.inf if self.moved else 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a tensor lie in its range.

    Attributes
    ----------
    start, stop
        The bytes that it spans.
    stride
        In bytes; empty for a packed tensor, whose elements lie end to end.
    dense
        Whether every byte that it spans belongs to one element.
    view
        What is to be done to the elements besides: their conjugate, their negative.
    """

    start: int
    stop: int
    stride: tuple[int, ...]
    dense: bool
    view: tuple[bool, bool]

    @classmethod
    def of(cls, entry: TensorEntry) -> Layout:
        """Return the layout of an entry, from byte 0."""
        strides, view = byte_strides(entry), (entry.conj, entry.neg)
        if entry.range < 0 or not prod(entry.shape):
            return cls(0, 0, (), True, view)
        if entry.packed:
            nbytes = prod(packed_shape(entry.shape, strides)) * entry.itemsize
            return cls(entry.offset, entry.offset + nbytes, (), True, view)
        low, high = byte_extent(entry.shape, strides, entry.itemsize)
        # Dense and without overlap: sorted by stride, each dimension steps over all that the smaller ones span.
        sizes = sorted((abs(stride), size) for size, stride in zip(entry.shape, strides, strict=True) if size > 1)
        expected, dense = entry.itemsize, True
        for stride, size in sizes:
            dense &= stride == expected
            expected *= size
        return cls(entry.offset + low, entry.offset + high, strides, dense, view)

    def __eq__(self, other: object) -> bool:
        """Whether elements lie alike; where the range begins does not matter."""
        if not isinstance(other, Layout):
            return NotImplemented
        return (self.stop - self.start, self.stride, self.dense, self.view) == (
            other.stop - other.start,
            other.stride,
            other.dense,
            other.view,
        )

    def __hash__(self) -> int:
        return hash((self.stop - self.start, self.stride))


class NumberTally:
    """Adds up what `Measure` has, and counts elements that differ in any bit.

    Parameters
    ----------
    entry
        What the elements are.

    Attributes
    ----------
    changed
        How many elements differ.
    """

    def __init__(self, entry: TensorEntry) -> None:
        self.changed = 0
        self._kind = entry.kind
        self._dtype = entry.dtype
        self._itemsize = entry.itemsize
        self._numeric = entry.numpy_dtype.kind in "biufc" if entry.kind == "numpy" else _torch_numbers(entry.dtype)
        self._squares = [0.0, 0.0, 0.0]
        self._largest = 0.0
        self._rest = (np.empty(0, np.uint8), np.empty(0, np.uint8))

    def add(self, before: Bytes, after: Bytes) -> None:
        """Add the next bytes of both; elements may lie across two calls.

        Parameters
        ----------
        before, after
            ``uint8[n]``.
        """
        if self._rest[0].nbytes:
            before, after = np.concatenate([self._rest[0], before]), np.concatenate([self._rest[1], after])
        whole = before.nbytes // self._itemsize * self._itemsize
        self._rest = before[whole:].copy(), after[whole:].copy()
        step = _AT_ONCE * self._itemsize
        for start in range(0, whole, step):
            self._add(before[start : min(start + step, whole)], after[start : min(start + step, whole)])

    def add_tensors(self, before: Any, after: Any) -> None:
        """Add two whole tensors or arrays of one shape."""
        self.add(_elements(before), _elements(after))

    def measure(self) -> Measure | None:
        """Return the norms, if the elements are numbers."""
        if not self._numeric:
            return None
        before, after, moved = (math.sqrt(square) for square in self._squares)
        return Measure(before, after, moved, self._largest)

    def _add(self, before: Bytes, after: Bytes) -> None:
        differs = (before != after).reshape(-1, self._itemsize).any(axis=1)
        self.changed += int(np.count_nonzero(differs))
        if not self._numeric:
            return
        old, new = self._numbers(before), self._numbers(after)
        with np.errstate(all="ignore"):  # NaN and infinities stay what they are
            moved = np.where(old == new, 0.0, new - old)
            for index, values in enumerate((old, new, moved)):
                self._squares[index] += float(np.dot(values, values))
            self._largest = float(np.maximum(self._largest, np.abs(moved).max(initial=0.0)))

    def _numbers(self, data: Bytes) -> npt.NDArray[np.float64]:
        if self._kind == "numpy":
            values = data.view(np.dtype(self._dtype))
            if values.dtype.kind == "c":
                values = values.view(values.real.dtype)
            return values.astype(np.float64)
        tensor = torch.frombuffer(bytearray(data), dtype=getattr(torch, self._dtype))
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor).reshape(-1)
        numbers: npt.NDArray[np.float64] = tensor.to(torch.float64).numpy()
        return numbers


def _torch_numbers(dtype: str) -> bool:
    kind = getattr(torch, dtype, None)
    if kind is None or dtype.startswith(_NO_NUMBERS):
        return False
    if kind.is_complex:
        return True
    try:
        torch.zeros(1, dtype=kind).to(torch.float64)
    except (RuntimeError, NotImplementedError):  # a dtype that only has a name
        return False
    return True


def _elements(value: Any) -> Bytes:
    """Return the bytes of a tensor's elements, in row-major order."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
