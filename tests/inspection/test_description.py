"""What a checkpoint holds, by its manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.errors import CheckpointNotFoundError, CorruptionError
from tests.stores import object_keys


def test_it_agrees_with_the_store(tmp_path: Path) -> None:
    shared = torch.randn(300_000)
    state = {
        "model": {"w": shared, "tied": shared, "half": torch.zeros(3, 5, dtype=torch.bfloat16)},
        "numpy": np.arange(4, dtype=">i2"),
        "empty": torch.empty(0, 7),
        "values": [1, "two", 3.0],
    }
    incckpt.save(state, tmp_path, step=5, metrics={"loss": 0.25})
    found = incckpt.describe(tmp_path)
    assert [(one.name, one.dtype, one.shape, one.nbytes) for one in found.tensors] == [
        ("model.w", "float32", (300_000,), 1_200_000),
        ("model.tied", "float32", (300_000,), 1_200_000),
        ("model.half", "bfloat16", (3, 5), 30),
        ("numpy", ">i2", (4,), 8),
        ("empty", "float32", (0, 7), 0),
    ]
    assert found.values == 3
    assert (found.checkpoint.step, found.checkpoint.metrics) == (5, {"loss": 0.25})
    assert found.checkpoint == incckpt.list_checkpoints(tmp_path)[0]
    with open_backend(tmp_path) as backend:
        sizes = {entry.key: entry.size for entry in backend.list()}
        keys = object_keys(backend)
    assert found.stored_bytes == sum(sizes[key] for key in keys) == found.checkpoint.written
    assert (found.objects, found.deltas) == (len(keys) - 1, 0)


def test_a_bare_tensor_and_a_run_without_checkpoints(tmp_path: Path) -> None:
    incckpt.save(torch.zeros(2), tmp_path)
    [component] = incckpt.describe(tmp_path).components
    assert (component.name, component.tensors, component.nbytes) == ("", 1, 8)
    with pytest.raises(CheckpointNotFoundError):
        incckpt.describe(tmp_path, run="other")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    incckpt.save({"w": torch.zeros(2)}, tmp_path, step=4)
    for path in (tmp_path / "objects").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptionError, match="manifest of step 4"):
        incckpt.describe(tmp_path)
