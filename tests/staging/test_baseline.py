"""Staging: what changed is copied, buffers are recycled and never shared, device memory takes the same way."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.staging.baseline import Baseline, StageReport
from incckpt.staging.content import Content, DeltaHistory
from incckpt.staging.hostmem import HostPool
from incckpt.state.flatten import FlatState, flatten
from incckpt.store.manifest import Chunk
from incckpt.testing.compare import assert_same_state
from tests.effort import tries

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 1 << 20


def as_is(flat: FlatState) -> FlatState:
    return flat


def as_on_a_device(flat: FlatState) -> FlatState:
    """Make host memory look like that of a device to the staging: it is copied from before it is compared."""
    for item in flat.ranges[::2]:
        item.tensor = torch.frombuffer(memoryview(_memory(item.address, item.nbytes)), dtype=torch.uint8)
    return flat


def _memory(address: int, nbytes: int) -> Any:
    import ctypes

    return (ctypes.c_uint8 * nbytes).from_address(address)


def chunks_of(contents: list[Content]) -> list[bytes]:
    return [content.raw.tobytes() for content in contents if content.raw is not None]


@pytest.mark.parametrize("where", [as_is, as_on_a_device])
@settings(max_examples=tries(25), deadline=None)
@given(data=st.data())
def test_contents_are_the_state_and_only_what_changed_is_new(
    where: Callable[[FlatState], FlatState], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 7, 1000, 300_000, 700_000]), min_size=1, max_size=5))
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.int8]), min_size=len(sizes), max_size=len(sizes)))
    state = [torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    base, fresh, giving = Baseline(MIB, threads=2), Baseline(MIB, threads=1), Baseline(MIB, threads=1)
    before: list[Content] = []
    for _ in range(3):
        report = StageReport()
        _, contents = base.stage(where(flatten(state)), report)
        fresh.forget()
        _, expected = fresh.stage(flatten(state), StageReport())
        assert chunks_of(contents) == chunks_of(expected)
        copies = [tensor.clone() for tensor in state]
        gifts = data.draw(st.sets(st.sampled_from(copies).map(lambda copy: copy.untyped_storage().data_ptr())))
        _, found = giving.stage(where(flatten(copies)), StageReport(), given=frozenset(gifts))
        assert chunks_of(found) == chunks_of(expected)
        for copy in copies:
            if copy.untyped_storage().data_ptr() not in gifts:
                copy.fill_(77)
        assert chunks_of(found) == chunks_of(expected), "what was not given was copied"
        kept = sum(one is other for one, other in zip(before, contents, strict=False))
        same = sum(
            np.array_equal(one.raw, other.raw)  # type: ignore[arg-type]
            for one, other in zip(before, contents, strict=False)
        )
        assert kept == same
        assert report.changed_chunks == len(contents) - kept
        before = contents
        for index in data.draw(st.sets(st.integers(0, len(sizes) - 1))):
            state[index][data.draw(st.integers(0, sizes[index] - 1))] += 1


def test_memory_that_is_given_is_kept_where_a_chunk_is_all_of_a_storage() -> None:
    whole, half = torch.rand(MIB // 4), torch.rand(MIB // 2)
    small, tiny, other, large = torch.rand(10), torch.rand(2), torch.rand(MIB // 4), torch.rand(MIB // 2)
    state = [whole, half[: MIB // 4], small, tiny, other, large]
    given = frozenset(tensor.untyped_storage().data_ptr() for tensor in (whole, half, small, tiny, large))
    base = Baseline(MIB)
    _, contents = base.stage(flatten(state), StageReport(), given=given)
    raws = [content.raw for content in contents if content.raw is not None]
    assert sum(raw.nbytes for raw in raws) == 5 * MIB + 48
    kept = [tensor for tensor in state if any(np.shares_memory(tensor.numpy(), raw) for raw in raws)]
    assert len(kept) == 1
    assert kept[0] is whole, "a part of a storage, or one cut into chunks, would keep alive what is not needed"
    assert base.pool.used_bytes == 4 * MIB + 48
    _, again = base.stage(flatten([tensor.clone() for tensor in state]), StageReport(), given=given)
    assert all(one is other for one, other in zip(contents, again, strict=True))


@pytest.mark.slow
def test_buffers_are_recycled_but_not_while_in_use() -> None:
    pool = HostPool()
    first = pool.take(MIB)
    address = first.ctypes.data
    assert address % 64 == 0
    assert pool.take(MIB).ctypes.data != address
    assert (pool.used_bytes, pool.free_bytes) == (MIB, MIB)
    part = first[MIB // 2 :][1:]
    del first
    gc.collect()
    assert (pool.used_bytes, pool.free_bytes) == (MIB, MIB), "a view of a view is a use"
    del part
    gc.collect()
    assert (pool.used_bytes, pool.free_bytes) == (0, 2 * MIB)
    assert pool.take(MIB).ctypes.data == address
    pool.trim(MIB)
    assert pool.free_bytes == MIB
    pool.trim(0)
    assert pool.free_bytes == 0


@pytest.mark.slow
def test_host_memory_is_one_copy_of_the_state_besides_what_is_in_flight(tmp_path: Path) -> None:
    state = {f"w{i}": torch.zeros(MIB) for i in range(8)}
    with incckpt.CheckpointManager(tmp_path, chunk_bytes=MIB) as manager:
        for step in range(1, 6):
            for value in state.values():
                value[: MIB // 2] += step
            manager.save(step, state)
            used, free = manager.host_bytes
            assert used <= 3 * 32 * MIB
        manager.wait()
        used, free = manager.host_bytes
        assert used == 32 * MIB
        assert free <= 16 * MIB, "what the last save staged"


def test_the_layout_may_change(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.zeros(400_000)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step, more in enumerate([{}, {"b": torch.ones(400_000)}, {"c": torch.ones(3)}], start=1):
            state |= more
            manager.save(step, state)
        del state["a"]
        manager.save(4, state)
    assert_same_state(incckpt.load(tmp_path), state)
    assert list(incckpt.load(tmp_path, step=1)) == ["a"]


_sizes = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0, 3, 2000, 300_000, 700_000]), min_size=1)


@settings(max_examples=tries(25), deadline=None)
@given(before=_sizes, after=_sizes, changed=st.sets(st.sampled_from("abcdef")))
def test_one_changed_size_does_not_forget_the_rest(
    before: dict[str, int], after: dict[str, int], changed: set[str]
) -> None:
    """Large tensors of the same name and size are compared still, whatever comes, goes, grows and moves around them."""

    def flat(sizes: dict[str, int], changed: set[str] = frozenset()) -> tuple[FlatState, dict[str, torch.Tensor]]:  # type: ignore[assignment]
        state = {name: torch.full((size,), ord(name) + (name in changed)) for name, size in sizes.items()}
        return flatten(state), state

    base, fresh, report = Baseline(MIB), Baseline(MIB), StageReport()
    earlier, kept = flat(before)
    layout, first = base.stage(earlier, StageReport())
    for content in first:
        content.stored = Chunk("0" * 64, content.nbytes, 8, "0" * 16, 1)
    base.settle(layout, first)
    later, also_kept = flat(after, changed)
    layout, contents = base.stage(later, report)
    assert chunks_of(contents) == chunks_of(fresh.stage(later, StageReport())[1])
    same = {name for name in after if before.get(name) == after[name] and name not in changed}
    large = {entry.range: entry.name for entry in later.tensors if entry.nbytes >= MIB}
    for index, name in large.items():
        for chunk, _, _ in layout.ranges[index].pieces:
            assert contents[chunk] in first or name not in same, f"{name} was copied, and had not changed"
            assert contents[chunk] not in first or name not in changed
            assert base.full(layout, chunk) is not None or before.get(name) != after[name]
    del kept, also_kept


@given(
    full=st.integers(100, 10_000), growth=st.floats(0.0, 0.5), start=st.floats(0.01, 0.9), index=st.integers(0, 1000)
)
def test_a_cycle_of_deltas_ends_near_its_cheapest(full: int, growth: float, start: float, index: int) -> None:
    history, size, costs = DeltaHistory(), start * full, [float(full)]
    for count in range(1, 200):
        if history.is_over(full, index):
            break
        history.add(int(size))
        costs.append((full + history.total) / (count + 1))
        size *= 1 + growth
    assert costs[-1] <= 1.35 * min(costs) + 1


def cycle(history: DeltaHistory, index: int, sizes: Iterable[float]) -> list[float]:
    """Return what a save costs on average, after each delta of a cycle that begins with 1,000,000 bytes."""
    costs = [1e6]
    for count, size in enumerate(sizes, start=1):
        if history.is_over(1_000_000, index):
            break
        history.add(int(1e6 * size))
        costs.append((1e6 + history.total) / (count + 1))
    return costs


def dense(start: float, slope: float) -> list[float]:
    """Return sizes of deltas that grow as those of dense training do: ever more slowly."""
    return [min(start + slope * math.log(count), 1.0) for count in range(1, 300)]


@given(start=st.floats(0.02, 0.9), slope=st.floats(0.01, 0.15), index=st.integers(0, 1000))
def test_but_for_the_first_a_cycle_ends_where_it_is_cheapest(start: float, slope: float, index: int) -> None:
    sizes = dense(start, slope)
    costs = cycle(DeltaHistory(first=False), index, sizes)
    best = min((1e6 + 1e6 * sum(sizes[:count])) / (count + 1) for count in range(len(sizes)))
    assert costs[-1] <= 1.03 * best


def test_first_cycles_differ_in_length() -> None:
    for start, slope in ((0.82, 0.03), (0.5, 0.15), (0.1, 0.02)):
        sizes = dense(start, slope)
        longest = len(cycle(DeltaHistory(first=False), 0, sizes)) - 1
        lengths = [len(cycle(DeltaHistory(), index, sizes)) - 1 for index in range(100)]
        assert set(lengths) == set(range(2, longest + 1))
        assert max(lengths.count(length) for length in set(lengths)) <= 2 * 100 / (longest - 1)


@pytest.mark.slow
def test_a_chunk_has_one_first_cycle(tmp_path: Path) -> None:
    weights = torch.randn(1 << 16)
    with incckpt.CheckpointManager(tmp_path) as manager:
        firsts = []
        for step in range(1, 30):
            weights += 1e-3 * torch.randn(1 << 16)
            manager.save(step, {"w": weights}).result()
            manager.wait()
            full = manager._base._current[1][0].full
            assert full is not None
            firsts.append((full.deltas.first, full.deltas.count))
    starts = [first for first, count in firsts if count == 0]
    assert len(starts) > 2
    assert starts == [True] + [False] * (len(starts) - 1)


@cuda
@pytest.mark.cuda
def test_cuda_round_trip(tmp_path: Path) -> None:
    state = {"w": torch.randn(3 * MIB, device="cuda"), "small": torch.arange(9, device="cuda"), "host": torch.ones(4)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        expected = state["w"].clone()
        state["w"].add_(1)  # enqueued at once: the save must not see it
        manager.save(2, state).result()
        assert torch.equal(incckpt.load(tmp_path, step=1)["w"], expected)
        assert_same_state(incckpt.load(tmp_path), state)
        state["small"][0] = 5
        manager.save(3, state).result()
        manager.wait()
        assert manager.history[-1].changed_chunks == 1
        target = {
            "w": torch.zeros(3 * MIB, device="cuda"),
            "small": torch.zeros_like(state["small"]),
            "host": torch.zeros(4),
        }
        assert manager.restore(target) == 3
        assert_same_state(target, state)
    assert incckpt.load(tmp_path, map_location="cpu")["w"].device.type == "cpu"
