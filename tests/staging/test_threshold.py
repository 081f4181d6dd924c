"""Thresholds: what is skipped never drifts, what is exact stays exact."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import OptionError
from incckpt.staging.threshold import Thresholds
from incckpt.store.refs import Ref
from tests.effort import tries

pytestmark = pytest.mark.slow


def relative(current: torch.Tensor, stored: torch.Tensor) -> float:
    """Return the relative L2 distance, in float64."""
    base = stored.double()
    return float((current.double() - base).norm() / base.norm())


def test_many_saves_just_below_the_threshold_do_not_drift(tmp_path: Path) -> None:
    """Lesson 1 of the seed: after 200 saves at 0.9e-4 the restore was 1.8 % off."""
    threshold = 1e-4
    torch.manual_seed(0)
    state = {
        "large": torch.randn(300_000),
        "half": torch.randn(1000).bfloat16(),
        "small": torch.randn(50, dtype=torch.float64),
        "count": torch.tensor(0),
    }
    step_by = {name: value.clone() * 0.9 * threshold for name, value in state.items() if value.is_floating_point()}
    backend = MemoryBackend(str(tmp_path))
    with incckpt.CheckpointManager(backend, threshold=threshold, keep_last_n=1) as manager:
        for step in range(1, 401):
            for name, change in step_by.items():
                state[name] += change
            state["count"] += 1
            manager.save(step, state)
            if step % 50 == 0:
                manager.wait()
                with incckpt.CheckpointManager(backend, read_only=True) as reader:
                    restored = {name: torch.empty_like(value) for name, value in state.items()}
                    assert reader.restore(restored) == step
                for name, value in state.items():
                    assert relative(value, restored[name]) <= threshold, (step, name)
                assert restored["count"] == step
        manager.wait()
        saved = sum(report.changed_bytes for report in manager.history)
        assert saved < 0.6 * 400 * manager.history[0].nbytes, "every other save should have skipped the floats"


@settings(max_examples=tries(15), deadline=None)
@given(
    threshold=st.sampled_from([1e-3, 1e-2, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]),
    moves=st.lists(st.floats(0, 0.5), min_size=1, max_size=12),
    size=st.integers(1, 3000),
    seed=st.integers(0, 2**16),
)
def test_every_restore_is_within_the_threshold(
    threshold: float, dtype: torch.dtype, moves: list[float], size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    state = {"w": torch.randn(size).to(dtype), "n": torch.arange(5)}
    with incckpt.CheckpointManager(MemoryBackend(uuid.uuid4().hex), threshold=threshold) as manager:
        for step, move in enumerate(moves):
            state["w"] = state["w"] + (torch.randn(size) * move).to(dtype)
            state["n"][step % 5] += 1
            manager.save(step, state).result()
            target = {"w": torch.zeros(size, dtype=dtype), "n": torch.zeros(5, dtype=torch.int64)}
            with incckpt.CheckpointManager(manager._store.backend, read_only=True) as reader:
                reader.restore(target)
            assert torch.equal(target["n"], state["n"])
            as_wide = torch.complex128 if dtype.is_complex else torch.float64
            difference = (state["w"].to(as_wide) - target["w"].to(as_wide)).norm()
            assert difference <= threshold * target["w"].to(as_wide).norm() * (1 + 1e-6)


def test_nan_and_infinity_are_changes(tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    with incckpt.CheckpointManager(tmp_path, threshold=0.5) as manager:
        manager.save(0, state).result()
        for step, value in enumerate([float("nan"), 1.0, float("inf"), float("-inf"), 1.0], start=1):
            state["w"][7] = value
            manager.save(step, state).result()
            assert incckpt.load(tmp_path)["w"].numpy().tobytes() == state["w"].numpy().tobytes()


def test_thresholds_by_name_and_norms(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "model": {"w": torch.ones(400_000), "b": torch.ones(10)},
        "moments": {"m": torch.ones(100)},
        "array": np.ones(9, np.float32),
        "ids": torch.arange(10),
    }
    with incckpt.CheckpointManager(tmp_path, threshold={"model.b": 0.0, "model.*": 0.01, "array": 0.01}) as manager:
        manager.save(1, state).result()
        for value in (state["model"]["w"], state["model"]["b"], state["moments"]["m"], state["array"]):
            value += 0.001
        manager.save(2, state).result()
        manager.wait()
        report = manager.history[-1]
    assert set(report.norms) == {"model.w", "array"}
    assert report.norms["model.w"] == pytest.approx((0.001, 400_000**0.5), rel=1e-3)
    restored = incckpt.load(tmp_path)
    assert restored["model"]["w"][0] == 1
    assert restored["model"]["b"][0] == state["model"]["b"][0]
    assert restored["moments"]["m"][0] == state["moments"]["m"][0]
    with incckpt.CheckpointManager(tmp_path, read_only=True) as reader:
        run = reader._view.run
        ref = run.read(run.lineage().live[-1])
        assert isinstance(ref, Ref)
        assert set(reader._store.manifest(ref).norms or {}) == {"model.w", "array"}


def test_views_of_a_tensor_are_exact(tmp_path: Path) -> None:
    whole = torch.ones(10_000)
    state = {"whole": whole, "part": whole[:3]}
    with incckpt.CheckpointManager(tmp_path, threshold=0.1) as manager:
        manager.save(1, state).result()
        whole[0] = 1.2  # 0.2 % of the whole, 12 % of the part
        manager.save(2, state).result()
    assert incckpt.load(tmp_path)["part"][0] == state["part"][0]


@pytest.mark.parametrize("threshold", [-1, 1, float("nan"), "0.1", {"*": 2}, {"*": None}, {"a": [1]}])
def test_bad_thresholds(threshold: Any) -> None:
    with pytest.raises(OptionError, match="threshold"):
        Thresholds(threshold)


def test_a_threshold_needs_a_base(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="base=True"):
        incckpt.CheckpointManager(tmp_path, threshold=0.1, base=False)
