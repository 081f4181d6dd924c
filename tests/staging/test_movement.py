"""How far tensors moved, from a sample: near the truth, exact for small tensors, and about committed checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import incckpt
from incckpt.run.report import SaveReport
from incckpt.staging.baseline import Baseline
from incckpt.staging.movement import MovementMeter
from incckpt.state.flatten import flatten
from tests.effort import tries

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn]


class Meter:
    """A meter over a baseline, as a writer has them."""

    def __init__(self) -> None:
        self.base = Baseline(1 << 20)
        self.meter = MovementMeter()
        self.step = 0

    def __call__(self, state: object, *, commit: bool = True) -> dict[str, tuple[float, float]]:
        flat = flatten(state)
        layout, contents = self.base.stage(flat, SaveReport())
        self.step += 1
        found = self.meter.measure(self.step, layout, flat.tensors, contents)
        if commit:
            self.meter.settle()
        return found


def truth(before: torch.Tensor, now: torch.Tensor) -> tuple[float, float]:
    old, new = (torch.view_as_real(x) if x.is_complex() else x for x in (before, now))
    old, new = old.double(), new.double()
    return float((new - old).norm() / old.norm()), float(old.norm())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 11), (1000, 1000)], ids=["small", "large"])
def test_relative_change_is_near_the_truth(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = torch.complex64 if dtype.is_complex else torch.float32
    before = torch.randn(shape, generator=generator, dtype=draw).to(dtype)
    now = (before.to(draw) * 1.2 + 0.1 * torch.randn(shape, generator=generator, dtype=draw)).to(dtype)
    meter = Meter()
    assert meter({"w": before}) == {}
    relative, norm = meter({"w": now})["w"]
    tolerance = 1e-3 if math.prod(shape) * (2 if dtype.is_complex else 1) <= 256 else 0.25
    assert (relative, norm) == pytest.approx(truth(before, now), rel=tolerance)


def test_a_change_in_columns_or_rows_is_seen() -> None:
    """Places at a fixed distance would lie in one column of a matrix whose width divides it."""
    before = torch.ones(4096, 1024)
    for part in (np.s_[:, :512], np.s_[:2048]):
        now = before.clone()
        now[part] = 2.0
        meter = Meter()
        meter({"w": before})
        assert meter({"w": now})["w"][0] == pytest.approx(math.sqrt(0.5), rel=0.2)


def test_what_did_not_move_is_left_out_though_its_chunk_changed() -> None:
    meter = Meter()
    state = {"a": torch.ones(5), "b": torch.ones(5), "count": torch.ones(5, dtype=torch.int64), "one": torch.ones(())}
    meter(state)
    state["a"] += 1
    state["count"] += 1
    state["one"] += 1
    found = meter(state)
    assert found.keys() == {"a"}
    assert found["a"] == pytest.approx((1.0, math.sqrt(5)), rel=1e-3)


def test_zeros_and_nan() -> None:
    meter = Meter()
    meter({"from zero": torch.zeros(3), "to nan": torch.ones(3), "nan": torch.full((3,), math.nan)})
    found = meter({"from zero": torch.ones(3), "to nan": torch.full((3,), math.nan), "nan": torch.full((3,), math.nan)})
    assert found.keys() == {"from zero", "to nan"}
    assert found["from zero"] == (math.inf, 0.0)
    assert math.isnan(found["to nan"][0])


def test_another_layout_with_the_same_tensors_is_compared() -> None:
    meter = Meter()
    meter({"a": torch.ones(300), "b": torch.ones(3)})
    found = meter({"a": torch.ones(300), "b": torch.ones(3) * 2, "new": torch.ones(3)})
    assert found == {}, "another set of tensors has nothing to compare with"
    assert meter({"a": torch.ones(300) * 3, "b": torch.ones(3) * 2, "new": torch.ones(3)}).keys() == {"a"}


@settings(max_examples=tries(30), deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.5, 2.0, width=32)), min_size=1, max_size=8))
def test_compares_with_the_last_committed(saves: list[tuple[bool, float]]) -> None:
    meter, committed = Meter(), None
    for commit, value in saves:
        now = torch.full((17,), value)
        found = meter({"w": now}, commit=commit)
        if committed is None or torch.equal(committed, now):
            assert found == {}
        else:
            assert found["w"] == pytest.approx(truth(committed, now), rel=2e-3)
        committed = now if commit else committed


def test_manifests_say_what_moved_and_how_long_the_caller_waited(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000), "frozen": torch.ones(1000)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, state).result()
        state["w"] *= 3
        manager.save(4, state).result()
        report = manager.history[-1]
        lineage = manager._view.run.lineage()
        first, second = (manager._store.manifest(manager._view.run.read(name)) for name in lineage.live)  # type: ignore[arg-type]
    assert (first.norms, first.norms_since) == (None, None)
    assert second.norms == report.norms
    assert report.norms.keys() == {"w"}
    assert report.norms["w"] == pytest.approx((2.0, math.sqrt(1000)), rel=1e-3)
    assert second.norms_since == 1
    assert second.blocked is not None
    assert second.blocked == pytest.approx(report.blocked, abs=1e-6)
    assert second.blocked.keys() == {"wait", "flatten", "stage"}
