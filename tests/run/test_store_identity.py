"""A store that is removed, renamed or replaced under a writer is an error before anything is announced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.base import ReadableBuffer
from incckpt.backends.local import LocalBackend
from incckpt.errors import CorruptionError, SaveError, StoreNotFoundError, StoreReplacedError


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1000,), value)}


def test_removed_and_put_back(tmp_path: Path) -> None:
    store = tmp_path / "ck"
    manager = incckpt.CheckpointManager(store)
    manager.save(1, state(1)).result()
    store.rename(tmp_path / "away")
    with pytest.raises(StoreNotFoundError, match="is gone: it was removed or renamed"):
        manager.save(2, state(2)).result()
    assert not store.exists(), "nothing is in the way of putting it back"
    (tmp_path / "away").rename(store)
    with pytest.raises(SaveError, match="is gone"):
        manager.save(2, state(2))
    assert manager.save(2, state(2)).result().step == 2
    manager.close()
    assert torch.equal(incckpt.load(store)["w"], state(2)["w"])


def test_removed_and_restored(tmp_path: Path) -> None:
    store = tmp_path / "ck"
    target = state(0)
    with incckpt.CheckpointManager(store) as manager:
        manager.save(1, state(1)).result()
        assert manager.restore(target) == 1
        shutil.rmtree(store)
        with pytest.raises(StoreNotFoundError):
            manager.save(2, state(2)).result()
        with pytest.raises(SaveError):
            manager.save(3, state(3))
    with incckpt.CheckpointManager(store) as manager:
        assert manager.restore(target) is None


def test_removed_and_skipped(tmp_path: Path) -> None:
    store = tmp_path / "ck"
    with incckpt.CheckpointManager(store) as manager:
        manager.save(1, state(1)).result()
        assert manager.save(1, state(2), if_exists="skip").result().step == 1
        shutil.rmtree(store)
        with pytest.raises(StoreNotFoundError):
            manager.save(1, state(2), if_exists="skip").result()


def test_replaced(tmp_path: Path) -> None:
    store, other = tmp_path / "ck", tmp_path / "other"
    for url in (store, other):
        with incckpt.CheckpointManager(url) as first:
            first.save(1, state(1)).result()
    manager = incckpt.CheckpointManager(store)
    manager.save(2, state(2)).result()
    shutil.rmtree(store)
    with incckpt.CheckpointManager(other) as second:
        second.save(2, state(3)).result()
    other.rename(store)  # its run has an attempt of the same number
    with pytest.raises(StoreReplacedError, match="was replaced by another"):
        manager.save(3, state(4)).result()
    with pytest.raises(SaveError):
        manager.close()
    with incckpt.CheckpointManager(store, read_only=True) as reader:
        assert [checkpoint.step for checkpoint in reader.checkpoints()] == [1, 2]
    assert torch.equal(incckpt.load(store)["w"], state(3)["w"])


def test_a_run_that_was_removed(tmp_path: Path) -> None:
    manager = incckpt.CheckpointManager(tmp_path)
    manager.save(1, state(1)).result()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(CorruptionError, match=r"attempts/000001.from is gone, though this process .* incckpt.recover"):
        manager.save(2, state(2)).result()
    with pytest.raises(CorruptionError):
        manager.close()


class RemovedDuringTheSave(LocalBackend):
    """The store is removed once an object of a save is put."""

    armed = False

    def put_many(self, values: list[tuple[str, ReadableBuffer]]) -> None:  # type: ignore[override]
        super().put_many(values)
        if self.armed:
            shutil.rmtree(self._root)


def test_removed_during_a_save(tmp_path: Path) -> None:
    backend = RemovedDuringTheSave(tmp_path / "ck")
    manager = incckpt.CheckpointManager(backend)
    manager.save(1, state(1)).result()
    backend.armed = True
    with pytest.raises(StoreNotFoundError, match="is gone"):
        manager.save(2, state(2)).result()
    with pytest.raises(SaveError):
        manager.close()
    assert not list(tmp_path.glob("ck/refs/**/*-*")), "not committed"
