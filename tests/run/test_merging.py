"""What several processes have stored, put together: read back it is the state; where a part is wrong it is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import StateError
from incckpt.run.contents import Contents
from incckpt.run.merging import Leaf, merge
from incckpt.run.parts import Parts, Place
from incckpt.run.report import SaveReport
from incckpt.run.shards import Shard
from incckpt.run.snapshot import stage
from incckpt.staging.baseline import Baseline
from incckpt.store.blocks import Block, fault
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.objects import manifest_keys, manifest_sizes
from incckpt.store.refs import RefName
from tests.effort import tries
from tests.store.test_blocks import covers

_AT_LEISURE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
_DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.complex128)


@dataclass
class Case:
    """A state, and what its processes have stored.

    Attributes
    ----------
    tensors
        The whole of each tensor.
    leaves, shards
        What is merged.
    raw
        The bytes of each chunk, numbered over all processes.
    """

    tensors: dict[str, torch.Tensor]
    leaves: list[Leaf]
    shards: list[Shard]
    raw: list[np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tensors in blocks over up to four processes; some are whole, and one process has a value that is none."""
    tensors: dict[str, torch.Tensor] = {}
    values: list[dict[str, object]] = [{} for _ in range(draw(st.integers(1, 4)))]
    places: list[dict[str, Place]] = [{} for _ in values]
    leaves: list[Leaf] = []
    for number in range(draw(st.integers(1, 4))):
        name = f"w{number}"
        shape, blocks = draw(covers())
        elements = torch.arange(math.prod(shape)) + number
        tensors[name] = tensor = elements.to(draw(st.sampled_from(_DTYPES))).reshape(shape)
        for at, size in [*blocks, *([Block((0,) * len(shape), (0, *shape[1:]))] if draw(st.booleans()) else [])]:
            process = draw(st.integers(0, len(values) - 1))
            key = f"{name}@{len(values[process])}"
            part = tensor[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))].contiguous()
            if size == shape:
                values[process][name] = part
            else:
                values[process][key] = part
                places[process][key] = Place(name, at)
        count = sum(place.name == name for found in places for place in found.values())
        leaves.append(Leaf(name, ("model", name), shape, count + any(name in found for found in values)))
    values[-1]["epoch"] = {"number": 7}
    leaves.append(Leaf("epoch", ("epoch",)))
    case = Case(tensors, leaves, [], [])
    for number, (mine, where) in enumerate(zip(values, places, strict=True)):
        base = Baseline(1 << 20)
        snapshot = stage(0, dict(mine), {}, SaveReport(), base=base, allow_pickle=False)()
        chunks = []
        for content in snapshot.contents:
            assert content.raw is not None
            chunks.append(Chunk(f"{len(case.raw):064x}", content.nbytes, content.itemsize, f"{number:016x}", 100))
            case.raw.append(content.raw)
        case.shards.append(Shard.of(snapshot, where, chunks, SaveReport()))
    return case


def merged(case: Case) -> Manifest:
    """Return the manifest of a case, as a writer makes it."""
    return merge(case.leaves, case.shards).manifest("run", RefName(1, 1, "0" * 16), 0.0, {})


@settings(_AT_LEISURE, max_examples=tries(40))
@given(cases())
def test_what_is_merged_reads_back_as_the_state(case: Case) -> None:
    """Every byte of every tensor, found through the manifest that a reader has parsed and checked."""
    written = merged(case)
    read = Manifest.from_json(written.to_json(), "manifest")
    assert tuple(written.ranges) == read.ranges
    assert tuple(written.chunks) == read.chunks
    assert written.nbytes == read.nbytes == sum(raw.nbytes for raw in case.raw)
    assert manifest_keys(written) == manifest_keys(read)
    assert manifest_sizes(written) == manifest_sizes(read)
    contents = Contents.of(read)
    assert {entry.name for entry in contents.entries} == {f"model.{name}" for name in case.tensors}
    for entry in contents.entries:
        parts = read.ranges[entry.range].part(entry.offset, entry.offset + entry.nbytes)
        found = np.concatenate([case.raw[chunk][offset : offset + nbytes] for chunk, offset, nbytes in parts])
        expected = case.tensors[entry.name.removeprefix("model.")]
        assert entry.shape == expected.shape
        assert found.tobytes() == expected.reshape(-1).view(torch.uint8).numpy().tobytes(), f"{entry.name} differs"


def _with(parts: Parts, **columns: object) -> Parts:
    return replace(parts, **columns)  # type: ignore[arg-type]


def _without_row(parts: Parts, row: int) -> Parts:
    """Return a table without one of its rows."""
    keep = np.arange(len(parts.names)) != row
    cells, pieces = np.repeat(keep, parts.dimensions), np.repeat(keep, parts.counts)
    return Parts(
        [name for name, kept in zip(parts.names, keep.tolist(), strict=True) if kept],
        parts.kinds,
        parts.kind[keep],
        parts.dimensions[keep],
        parts.at[cells],
        parts.shape[cells],
        parts.itemsize[keep],
        parts.counts[keep],
        parts.pieces[pieces],
    )


def _shifted(column: str) -> Callable[[Parts, int], Parts]:
    def change(parts: Parts, row: int) -> Parts:
        changed = getattr(parts, column).copy()
        changed[int(parts.dimensions[:row].sum())] += 1
        return _with(parts, **{column: changed})

    return change


def _piece(column: int, add: int) -> Callable[[Parts, int], Parts]:
    def change(parts: Parts, row: int) -> Parts:
        pieces = parts.pieces.copy()
        pieces[int(parts.counts[:row].sum()), column] += add
        return _with(parts, pieces=pieces)

    return change


def _other_dtype(parts: Parts, row: int) -> Parts:
    other = parts.kinds[int(parts.kind[row])]
    kind = parts.kind.copy()
    kind[row] = len(parts.kinds)
    dtype = {1: "int8", 2: "int16", 4: "int32", 16: "complex128"}[other.itemsize]
    return _with(
        parts, kinds=[*parts.kinds, other._replace(dtype=dtype if dtype != other.dtype else "complex64")], kind=kind
    )


_FAULTS: dict[str, Callable[[Parts, int], Parts]] = {
    "a part is missing": _without_row,
    "a part is elsewhere": _shifted("at"),
    "a part has another shape": _shifted("shape"),
    "a piece begins beyond its chunk": _piece(1, 1 << 40),
    "a piece is longer than its chunk": _piece(2, 1 << 40),
    "a piece is shorter than its part": _piece(2, -1),
    "a piece is of a chunk that is not there": _piece(0, 1 << 40),
    "a piece is of another process's chunk": _piece(0, -(1 << 40)),
    "a part has another dtype": _other_dtype,
}


@pytest.mark.parametrize("fault", _FAULTS)
@settings(_AT_LEISURE, max_examples=tries(10))
@given(case=cases(), data=st.data())
def test_a_wrong_part_is_refused(fault: str, case: Case, data: st.DataObject) -> None:
    """Whatever is wrong with one part of one process."""
    rows = [
        (process, row)
        for process, shard in enumerate(case.shards)
        for row, name in enumerate(shard.parts.names)
        if shard.parts.counts[row] and (fault != "a part has another dtype" or _parts_with_bytes(case, name) > 1)
    ]
    if not rows:
        return
    process, row = data.draw(st.sampled_from(rows))
    shard = case.shards[process]
    case.shards[process] = replace(shard, parts=_FAULTS[fault](shard.parts, row))
    with pytest.raises(StateError):
        merged(case)


def _parts_with_bytes(case: Case, name: str) -> int:
    return sum(
        found == name and count > 0
        for shard in case.shards
        for found, count in zip(shard.parts.names, shard.parts.counts.tolist(), strict=True)
    )


@settings(_AT_LEISURE, max_examples=tries(20))
@given(cases(), st.data())
def test_a_process_without_a_report_is_noticed(case: Case, data: st.DataObject) -> None:
    """Whether it had parts, whole tensors or other values; the error names one of them."""
    process = data.draw(st.integers(0, len(case.shards) - 1))
    shard = case.shards[process]
    if not (shard.nodes or shard.parts.names):
        return
    case.shards[process] = Shard.empty()
    with pytest.raises(StateError, match=r"w\d|epoch"):
        merged(case)


def test_thousands_of_blocks_in_a_grid_are_checked() -> None:
    """A tensor split in rows and columns over many processes is taken, and with a part moved onto another it is not."""
    grid = list(itertools.product(range(40), range(40)))
    assert _fault_of_grid(grid) == ""
    assert "overlap" in _fault_of_grid([*grid[:-1], grid[0]])


def _fault_of_grid(cells: Sequence[tuple[int, int]]) -> str:
    return fault((120, 80), [Block((3 * row, 2 * column), (3, 2)) for row, column in cells])
