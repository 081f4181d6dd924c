"""Who needs which bytes: against what deleting really frees."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends import open_backend
from incckpt.errors import CheckpointNotFoundError
from tests.effort import tries
from tests.stores import object_keys

pytestmark = pytest.mark.slow


def stored(folder: Path) -> int:
    with open_backend(folder) as backend:
        keys = object_keys(backend)
        return sum(entry.size for entry in backend.list() if entry.key in keys)


_saves = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=tries(8), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    saves=st.lists(_saves, min_size=1, max_size=5),
    data=st.data(),
)
def test_own_bytes_are_what_deleting_frees(
    tmp_path: Path, saves: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    for run, first, second in saves:
        state = {"first": torch.full((2000,), first), "second": torch.full((70_000,), second), "x": 1}
        incckpt.save(state, folder, run=run)
    found = incckpt.usage(folder)
    assert found.store_bytes == stored(folder)
    assert (found.unneeded_objects, found.missing, found.unreadable) == (0, (), ())
    assert sum(run.own_bytes for run in found.runs) <= found.store_bytes
    assert sum(one.nbytes for one in found.objects) == found.store_bytes
    if len(found.runs) == 1:
        assert found.runs[0].own_bytes == found.runs[0].needed_bytes == found.store_bytes
    victim = data.draw(st.sampled_from(found.checkpoints))
    with incckpt.CheckpointManager(folder, run=victim.run) as manager:
        manager.delete(victim.step)
    assert stored(folder) == found.store_bytes - victim.own_bytes


def test_a_base_counts_for_its_delta(tmp_path: Path) -> None:
    w = torch.randn(300_000)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": w}).result()
        w[:10] += 1
        manager.save(2, {"w": w}).result()
    first, second = incckpt.usage(tmp_path).checkpoints
    assert second.needed_bytes > first.needed_bytes
    [alone] = incckpt.usage(tmp_path, step=2).checkpoints
    assert alone == second
    kinds = sorted(one.kind for one in incckpt.usage(tmp_path, step=2).objects)
    assert kinds == ["delta", "full", "manifest"]


def test_what_is_unreadable_or_missing_is_told(tmp_path: Path) -> None:
    incckpt.save({"w": torch.randn(300_000)}, tmp_path, step=1)
    incckpt.save({"w": torch.randn(300_000)}, tmp_path, step=2)
    [ref] = tmp_path.glob("refs/default/*-000000000001-*")
    ref.write_bytes(b"no JSON at all")
    largest = max(tmp_path.glob("objects/*/*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    found = incckpt.usage(tmp_path)
    assert "run 'default'" in found.unreadable[0]
    assert [one.step for one in found.checkpoints] == [2]
    assert found.missing == (str(largest.relative_to(tmp_path)),) or found.unneeded_objects == 1
    with pytest.raises(CheckpointNotFoundError):
        incckpt.usage(tmp_path, step=9)
