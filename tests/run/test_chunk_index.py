"""What one run of a store holds is not put again by another that this process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.generic import GenericBackend
from incckpt.backends.registry import open_backend
from incckpt.run import upload
from incckpt.run.chunk_index import ChunkIndex
from incckpt.store.manifest import Chunk, Stored
from incckpt.store.objects import chunk_keys
from tests.stores import object_keys, orphans


def chunk(number: int, base: Stored | None = None) -> Chunk:
    return Chunk(f"{number:064x}", 100, 4, "0" * 16, 90, base)


def test_the_least_recently_used_is_forgotten_first() -> None:
    index = ChunkIndex(most=3)
    index.add("store", [chunk(1), chunk(2), chunk(3)])
    assert index.find("store", chunk(1).identity) == chunk(1)
    index.add("store", [chunk(4)])
    assert [number for number in range(1, 5) if index.find("store", chunk(number).identity)] == [1, 3, 4]
    assert len(index) == 3


def test_stores_are_apart() -> None:
    index = ChunkIndex()
    index.add("one", [chunk(1)])
    assert index.find("other", chunk(1).identity) is None


def test_what_was_collected_is_forgotten() -> None:
    index = ChunkIndex()
    delta = chunk(2, Stored("f" * 64, "1" * 16, 80))
    index.add("store", [chunk(1), delta])
    index.forget("store", [str(chunk_keys(chunk(2))[0]), "objects/a-stray-file"])
    assert index.find("store", delta.identity) == delta, "another object of the same content"
    index.forget("store", [str(chunk_keys(delta)[0]), str(chunk_keys(chunk(1))[0])])
    assert index.find("store", delta.identity) is None
    assert len(index) == 0


@pytest.mark.slow
def test_runs_of_one_process_store_common_content_once(tmp_path: Path) -> None:
    """Five runs, all past their first saves, begin to hold the same new content."""
    backend = open_backend(tmp_path)
    managers = [incckpt.CheckpointManager(tmp_path, run=f"run{number}") for number in range(5)]
    for number, manager in enumerate(managers):
        manager.save(0, {"own": torch.full((10_000,), float(number))}).result()
    before = object_keys(backend)
    common = torch.randn(1 << 19)
    for number, manager in enumerate(managers):
        state = {"own": torch.full((10_000,), float(number)), "common": common}
        manager.save(1, state).result()
        manager.wait()
    put = [manager.history[-1].put_objects for manager in managers]
    assert put == [1, 0, 0, 0, 0]
    assert len(object_keys(backend) - before) == 1 + 5, "and five manifests"
    for manager in managers:
        manager.close()
    assert not orphans(tmp_path)


def test_what_another_run_has_pruned_is_put_again(tmp_path: Path) -> None:
    common = torch.randn(1 << 19)
    with (
        incckpt.CheckpointManager(tmp_path, run="a", keep_last_n=1) as a,
        incckpt.CheckpointManager(tmp_path, run="b") as b,
    ):
        b.save(0, {"x": 0}).result()
        a.save(0, {"common": common}).result()
        a.save(1, {"x": 1}).result()
        a.wait()
        b.save(1, {"common": common}).result()
        b.wait()
        assert b.history[-1].put_objects == 1
    assert torch.equal(incckpt.load(tmp_path, run="b")["common"], common)
    assert not orphans(tmp_path)


def test_parts_that_a_killed_put_left_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of fsspec's may leave a part of a value behind at its key."""
    weights = torch.randn(1 << 18)
    with incckpt.CheckpointManager(tmp_path, run="a") as manager:
        manager.save(1, {"w": weights}).result()
    (largest,) = (path for path in (tmp_path / "objects").rglob("*.*") if path.stat().st_size > 1 << 19)
    with largest.open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(upload, "process_index", ChunkIndex)  # as in another process
    backend = GenericBackend(f"local://{tmp_path}", {})
    with incckpt.CheckpointManager(backend, run="b") as manager:
        manager.save(1, {"w": weights}).result()
    assert torch.equal(incckpt.load(tmp_path, run="b")["w"], weights)
