"""How far each tensor moved since the checkpoint before, from a sample of its elements.

Exact changes are found without any arithmetic, and what a save is compared with is each chunk's last *full* object,
which may be many checkpoints old. So a sample of every tensor is kept from save to save: it costs a thousandth of
what a copy of the state would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from incckpt.staging.content import Content
from incckpt.staging.detect import DTYPE_CODES
from incckpt.staging.layout import Layout
from incckpt.staging.threshold import float_ranges
from incckpt.state.entries import TensorEntry

__all__ = ["MovementMeter"]

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

_MOST_OF_ONE = 256  # elements of a tensor: the estimate is off by some 4 %
_MOST = 1 << 20  # elements of a state
_LEAST_OF_ONE = 1  # where a state has a million tensors

_DIGITS = 4


class MovementMeter:
    """Estimates the relative change of each floating-point tensor from one checkpoint to the next.

    Of a tensor with at most 256 components all are compared; of a larger one as many, one from each of equal
    parts, at places that stay the same. Integers and single numbers are left out, and so are tensors that share
    memory in part.
    """

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._before: tuple[int, _Plan, _Sample] | None = None
        self._now: tuple[int, _Plan, _Sample] | None = None

    @property
    def since(self) -> int | None:
        """The step that the last `measure` compared with, if there was one."""
        if self._before is None or self._now is None or self._before[1] is not self._now[1]:
            return None
        return self._before[0]

    def measure(
        self, step: int, layout: Layout, entries: Sequence[TensorEntry], contents: Sequence[Content]
    ) -> dict[str, tuple[float, float]]:
        """Return what moved since the step that was settled last: by tensor, its relative change and its norm then.

        Parameters
        ----------
        contents
            One per chunk of the layout. Chunks whose bytes are not in memory are left out.

        Returns
        -------
        dict
            Tensors in whose sample nothing changed are left out; all are if the state has other tensors now. A change
            from all zeros is infinite; one from or to a NaN is NaN.
        """
        self._now = None
        if not entries or any(content.raw is None for content in contents):
            return {}
        if self._plan is None or not self._plan.fits(layout, entries):
            self._plan = _Plan.of(layout, entries)
        plan = self._plan
        sample = plan.draw(contents)
        self._now = step, plan, sample
        if self._before is None or self._before[1] is not plan:
            return {}
        return _moved(plan, sample, self._before[2])

    def settle(self) -> None:
        """Note that the step measured last is committed: later ones are compared with it."""
        self._before, self._now = self._now, None


_Sample = Mapping[int, npt.NDArray[np.generic]]
"""By dtype code, the bits of what was sampled; without a code of which a chunk is not in memory."""


@dataclass(frozen=True)
class _Group:
    """The places sampled of all tensors of one floating-point type, ordered by chunk.

    Attributes
    ----------
    tensor
        ``int64[k]``: which of the plan's tensors each place belongs to.
    chunk, element
        ``int64[k]``: the chunk, and the component in it.
    """

    tensor: Int64s
    chunk: Int64s
    element: Int64s


@dataclass(frozen=True)
class _Plan:
    """Which components of which tensors are sampled.

    Attributes
    ----------
    names
        Of the tensors.
    counts, sampled
        ``int64[t]``: components of each, and how many are sampled.
    groups
        By dtype code.
    """

    layout: Layout
    entries: Sequence[TensorEntry]
    names: list[str]
    counts: Int64s
    sampled: Int64s
    groups: Mapping[int, _Group]

    @classmethod
    def of(cls, layout: Layout, entries: Sequence[TensorEntry]) -> _Plan:
        """Choose the places for a state."""
        code, names = float_ranges(entries, [nbytes for nbytes, _ in layout.sizes])
        nbytes = np.array([nbytes for nbytes, _ in layout.sizes], np.int64).reshape(-1)
        width = _WIDTHS[np.maximum(code, 0)]
        chosen = np.flatnonzero((code >= 0) & (nbytes > width))
        counts = nbytes[chosen] // width[chosen]
        most = int(np.clip(_MOST // max(len(chosen), 1), _LEAST_OF_ONE, _MOST_OF_ONE))
        sampled = np.minimum(counts, most)
        groups = {
            int(kind): _places(
                layout, chosen, counts, sampled, np.flatnonzero(code[chosen] == kind), int(_WIDTHS[kind])
            )
            for kind in np.unique(code[chosen])
        }
        return cls(layout, entries, [names[index] for index in chosen.tolist()], counts, sampled, groups)

    def fits(self, layout: Layout, entries: Sequence[TensorEntry]) -> bool:
        """Whether it is the plan of this state."""
        return layout is self.layout and entries == self.entries

    def draw(self, contents: Sequence[Content]) -> _Sample:
        """Take the sample."""
        sample: dict[int, npt.NDArray[np.generic]] = {}
        for code, group in self.groups.items():
            dtype = np.dtype(f"u{_WIDTHS[code]}")
            bits = np.empty(len(group.chunk), dtype)
            heads = np.flatnonzero(np.diff(group.chunk, prepend=-1)).tolist()
            for first, after in zip(heads, [*heads[1:], len(bits)], strict=True):
                raw = contents[int(group.chunk[first])].raw
                if raw is None:
                    break
                np.take(raw.view(dtype), group.element[first:after], out=bits[first:after])
            else:
                sample[code] = bits
        return sample


def _places(layout: Layout, chosen: Int64s, counts: Int64s, sampled: Int64s, mine: Int64s, width: int) -> _Group:
    """Choose the places of the tensors `mine`: one at random from each of equal parts, the same ones every time."""
    table = layout.table
    tensor = np.repeat(mine, sampled[mine])
    first = np.cumsum(sampled[mine]) - sampled[mine]
    part = np.arange(len(tensor)) - np.repeat(first, sampled[mine])
    within = np.random.default_rng(0).random(len(tensor))
    scale = counts[tensor] / sampled[tensor]
    whole = counts[tensor] == sampled[tensor]
    place = np.where(whole, part, np.minimum(((part + within) * scale).astype(np.int64), counts[tensor] - 1)) * width
    # A range's segments are consecutive in this order, and all but its last hold `chunk_bytes`.
    order = np.lexsort((table.seg_range_offset, table.seg_range))
    segment = order[np.searchsorted(table.seg_range[order], chosen[tensor]) + place // layout.chunk_bytes]
    chunk = table.seg_chunk[segment]
    offset = table.seg_chunk_offset[segment] + place - table.seg_range_offset[segment]
    by_chunk = np.argsort(chunk, kind="stable")
    return _Group(tensor[by_chunk], chunk[by_chunk], offset[by_chunk] // width)


def _moved(plan: _Plan, now: _Sample, before: _Sample) -> dict[str, tuple[float, float]]:
    diff, base = np.zeros(len(plan.names)), np.zeros(len(plan.names))
    for code in now.keys() & before.keys():
        tensor = plan.groups[code].tensor
        with np.errstate(invalid="ignore", over="ignore"):
            old, new = _to_float(before[code], code), _to_float(now[code], code)
            change = np.where(before[code] == now[code], 0.0, new - old)
            diff += np.bincount(tensor, change * change, len(plan.names))
            base += np.bincount(tensor, old * old, len(plan.names))
    moved = np.flatnonzero(diff != 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.sqrt(diff[moved]) / np.sqrt(base[moved])
        norm = np.sqrt(base[moved] * (plan.counts[moved] / plan.sampled[moved]))
    return {
        plan.names[index]: (_rounded(one), _rounded(other))
        for index, one, other in zip(moved.tolist(), relative.tolist(), norm.tolist(), strict=True)
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")


def _to_float(bits: npt.NDArray[np.generic], code: int) -> Float64s:
    """Return the numbers that bits of a dtype stand for."""
    dtype = _DTYPES[code]
    if dtype in (torch.float64, torch.float32, torch.float16):
        return bits.view(f"f{bits.itemsize}").astype(np.float64)
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
    numbers: Float64s = signed.view(dtype).to(torch.float64).numpy()
    return numbers


_DTYPES = {code: getattr(torch, name) for name, code in DTYPE_CODES.items() if "complex" not in name}
_WIDTHS = np.array([_DTYPES[code].itemsize for code in range(len(_DTYPES))], np.int64)
