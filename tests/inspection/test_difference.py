"""What changed, against numpy on the whole states."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.errors import CheckpointNotFoundError, CorruptionError
from incckpt.inspection import difference
from incckpt.inspection.tally import Measure
from tests.effort import tries

pytestmark = pytest.mark.slow


def measure_of(one: incckpt.TensorDifference) -> Measure:
    assert one.measure is not None
    return one.measure


def compared(before: Any, after: Any, folder: Path, **options: Any) -> Any:
    incckpt.save(before, folder, run="before")
    incckpt.save(after, folder, run="after")
    return incckpt.diff(f"{folder}#before", f"{folder}#after", **options)


_DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)


@settings(max_examples=tries(20), deadline=None)
@given(
    dtype=_DTYPES,
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 50)),
    transposed=st.tuples(st.booleans(), st.booleans()),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_norms_are_those_of_the_whole_tensors(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    transposed: tuple[bool, bool],
    share: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def laid_out(tensor: torch.Tensor, swap: bool) -> torch.Tensor:
        return tensor.t().contiguous().t() if swap else tensor

    old = (torch.randn(*sizes, generator=generator) * 5).to(dtype)
    where = torch.rand(*sizes, generator=generator) < share
    new = torch.where(where, (torch.randn(*sizes, generator=generator) * 5).to(dtype), old)
    store = f"memory://{uuid.uuid4()}"
    with incckpt.CheckpointManager(store) as manager:
        manager.save(1, {"w": laid_out(old, transposed[0]), "same": torch.ones(3)})
        manager.save(2, {"w": laid_out(new, transposed[1]), "same": torch.ones(3)})
    found = incckpt.diff(f"{store}#@1", f"{store}#@2")
    differs = int((old != new).sum())
    if not differs:
        assert (found.tensors, bool(found), found.same_tensors) == ((), False, 2)
        return
    [one] = found.tensors
    assert (one.name, one.change, one.changed_bytes) == ("w", "changed", differs * old.element_size())
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = old.to(wide).reshape(-1), new.to(wide).reshape(-1)
    assert measure_of(one).before == pytest.approx(float(a.norm()))
    assert measure_of(one).after == pytest.approx(float(b.norm()))
    assert measure_of(one).moved == pytest.approx(float((b - a).norm()))


def test_large_tensors_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many chunks, cut at different places in the two, with elements across the cuts."""
    monkeypatch.setattr(difference, "_BATCH", 3 << 20)
    old = torch.randn(1_500_001, dtype=torch.float64)
    new = old.clone()
    new[[0, 131_072, 1_000_000, 1_500_000]] += 1.0
    with incckpt.CheckpointManager(tmp_path, run="a", chunk_bytes=1 << 20) as manager:
        manager.save(1, {"w": old}).result()
    with incckpt.CheckpointManager(tmp_path, run="b", chunk_bytes=3 << 20) as manager:
        manager.save(1, {"w": new}).result()
    seen: list[tuple[int, int]] = []
    found = incckpt.diff(f"{tmp_path}#a", f"{tmp_path}#b", progress=lambda *count: seen.append(count))
    [one] = found.tensors
    assert one.changed_bytes == 32
    assert measure_of(one).moved == pytest.approx(2.0)
    assert measure_of(one).largest == pytest.approx(1.0)
    assert measure_of(one).before == pytest.approx(float(old.norm()))
    assert seen[-1] == (old.nbytes, old.nbytes)


def test_what_is_the_same_is_not_read(tmp_path: Path) -> None:
    state = {"frozen": torch.randn(400_000), "w": torch.zeros(300_000)}
    incckpt.save(state, tmp_path, step=1)
    state["w"][:5] = 1.0
    incckpt.save(state, tmp_path, step=2)
    for path in tmp_path.glob("objects/*/*"):  # reading `frozen` would raise
        if path.stat().st_size > 1_000_000:
            path.write_bytes(b"damaged")
    found = incckpt.diff(f"{tmp_path}#@1", f"{tmp_path}#@2")
    assert [(one.name, one.changed_bytes) for one in found.tensors] == [("w", 20)]
    assert (found.same_tensors, found.same_bytes) == (1, 1_600_000)
    assert 0 < found.new_bytes < 100_000
    assert not incckpt.diff(f"{tmp_path}#@2", f"{tmp_path}#@2")


def test_added_removed_reshaped_and_values(tmp_path: Path) -> None:
    before = {
        "gone": torch.zeros(2),
        "shape": torch.zeros(4),
        "kind": torch.zeros(3),
        "lr": 0.1,
        "l": [1, "x"],
        "t": (1,),
    }
    after = {
        "shape": torch.zeros(2, 2),
        "kind": torch.zeros(3).half(),
        "new": np.zeros(3),
        "lr": 0.2,
        "l": [1, "x", 3],
        "t": [1],
    }
    found = compared(before, after, tmp_path)
    assert {one.name: one.change for one in found.tensors} == {
        "gone": "removed",
        "shape": "reshaped",
        "kind": "reshaped",
        "new": "added",
    }
    values = {one.name: (one.before, one.after) for one in found.values}
    assert values == {"lr": ("0.1", "0.2"), "l.2": (None, "3"), "t": ("tuple", None)}


def test_packed_values_and_names_that_occur_twice(tmp_path: Path) -> None:
    before = {"long": list(range(5000)), "a": {"b": torch.zeros(2)}, "a.b": torch.zeros(3)}
    after = {"long": [*range(4999), 0], "a": {"b": torch.zeros(2)}, "a.b": torch.ones(3)}
    found = compared(before, after, tmp_path)
    assert [(one.name, one.shape) for one in found.tensors] == [("a.b", (3,))]
    [value] = found.values
    assert value.name == "long"
    assert value.before != value.after
    assert not compared(before, before, tmp_path / "same")


def test_a_packed_value_is_compared_to_its_end_and_apart_from_its_neighbours(tmp_path: Path) -> None:
    large, small = bytes(20 << 20), "a" * 300_000
    before = {"large": large, "small": small, "next": small + "b"}
    after = {"large": large[:-1] + b"x", "small": small, "next": small + "c"}
    found = compared(before, after, tmp_path)
    assert {value.name for value in found.values} == {"large", "next"}
    assert all(value.before != value.after for value in found.values)


def test_special_numbers_and_views(tmp_path: Path) -> None:
    shared = torch.arange(10.0)
    before = {
        "nan": torch.tensor([math.nan, 1.0]),
        "gap": shared[::3],
        "wide": torch.zeros(1).expand(4),
        "conj": torch.zeros(2, dtype=torch.complex64).conj(),
        "records": np.zeros(2, [("a", "i2"), ("b", "S3")]),
    }
    after = {
        "nan": torch.tensor([math.nan, math.inf]),
        "gap": shared[::3] + 1,
        "wide": torch.ones(1).expand(4),
        "conj": torch.ones(2, dtype=torch.complex64),
        "records": np.array([(0, b""), (1, b"x")], [("a", "i2"), ("b", "S3")]),
    }
    found = {one.name: one for one in compared(before, after, tmp_path).tensors}
    assert found.keys() == before.keys()
    assert math.isnan(measure_of(found["nan"]).before)
    assert measure_of(found["gap"]).moved == pytest.approx(2.0)
    assert measure_of(found["conj"]).after == pytest.approx(math.sqrt(2))
    assert (found["records"].measure, found["records"].changed_bytes) == (None, 5)


def test_two_stores_and_what_is_not_there(tmp_path: Path) -> None:
    incckpt.save({"w": torch.zeros(3)}, tmp_path / "a")
    incckpt.save({"w": torch.ones(3)}, tmp_path / "b")
    [one] = incckpt.diff(tmp_path / "a", tmp_path / "b").tensors
    assert measure_of(one).relative == math.inf
    with pytest.raises(CheckpointNotFoundError):
        incckpt.diff(tmp_path / "a", f"{tmp_path / 'b'}#none")


def test_damage_where_they_differ_is_named(tmp_path: Path) -> None:
    incckpt.save({"w": torch.randn(300_000)}, tmp_path, step=1)
    incckpt.save({"w": torch.randn(300_000)}, tmp_path, step=2)
    path = max(tmp_path.glob("objects/*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=path.name):
        incckpt.diff(f"{tmp_path}#@1", f"{tmp_path}#@2")
